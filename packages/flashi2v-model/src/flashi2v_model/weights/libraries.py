"""What diffusers and transformers print on their own account."""

import logging
import warnings


def quieten() -> None:
    """Hide what these libraries say about loading; what cannot be loaded, or does not fit, is an error of ours."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="huggingface_hub")
    # Newer versions call it dtype, older ones know only torch_dtype.
    warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)
