"""Weights on disk: read, compared, renamed from one published layout to another, loaded, written.

`read_state_dict` takes whatever holds weights, `convert_state_dict` gives them the names of a layout, `load_weights`
fills a model, exactly or not at all, `write_file` writes one file.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
