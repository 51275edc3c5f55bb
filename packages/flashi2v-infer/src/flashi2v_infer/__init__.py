"""Videos from an image and a prompt with FlashI2V."""

import lazy_loader

from flashi2v_infer.announcing import announce

__version__ = "0.1.0"

# The names are in __init__.pyi; each is imported when it is first used: `--help` should not wait for torch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

announce()
