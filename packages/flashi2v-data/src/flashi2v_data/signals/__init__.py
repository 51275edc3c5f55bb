"""Signals: what is measured of a clip, as columns of its record. `protocol` says what one is; `registry` finds them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
