"""The FlashI2V diffusion transformer, flow matching, encoders and weights."""

import lazy_loader

__version__ = "0.1.0"

# The names are in __init__.pyi; each is imported when it is first used: torch and diffusers take seconds.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
