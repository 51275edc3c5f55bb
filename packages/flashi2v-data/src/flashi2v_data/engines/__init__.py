"""Engines: what runs stages over numbered pieces of work, on this machine or many. `protocol` tells who does what."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
