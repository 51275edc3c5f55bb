"""A transformer or a VAE shared among processes, from outside: none of them knows of it.

`parallelise_context` shares out the tokens of each video, `parallelise_tensors` the matrices, `parallelise_samples` the
samples of a batch (of which the two branches of guidance are one each), `parallelise_tiles` a VAE's tiles. `degrees`
says which numbers of processes fit, and `traffic` what they send each other.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
