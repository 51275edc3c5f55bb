"""Captions: cleaned as the public code does, cut by a tokenizer, and what is lost thereby."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
