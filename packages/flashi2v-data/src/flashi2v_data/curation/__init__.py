"""From meta JSON to a store: what is read, judged, counted and kept. `stream` tells how."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
