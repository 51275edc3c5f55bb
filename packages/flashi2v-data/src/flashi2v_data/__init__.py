"""Video data for diffusion training: meta JSON, filters, LMDB, decoding, transforms and resumable loading."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashi2v_data.curation.config import FilterConfig
    from flashi2v_data.curation.report import FilterReport
    from flashi2v_data.curation.stream import filter_records
    from flashi2v_data.errors import DecodeError, InputError, StorageError
    from flashi2v_data.loading.config import DataConfig
    from flashi2v_data.loading.dataset import FlashI2VDataset
    from flashi2v_data.loading.loader import StatefulLoader, build_dataloader, collate
    from flashi2v_data.loading.sampler import SampleKey, StatefulDistributedSampler
    from flashi2v_data.loading.transforms import build_transform, center_crop_resize, normalise, to_tensor
    from flashi2v_data.randomness import generator
    from flashi2v_data.settings import load_config
    from flashi2v_data.shapes.scenes import write_shapes
    from flashi2v_data.store.features import FeatureStore, FeatureWriter
    from flashi2v_data.store.reader import LmdbStore, open_store, write_store
    from flashi2v_data.video.decode import read_frames
    from flashi2v_data.video.write import write_video

__version__ = "0.1.0"

_HOMES = {
    "curation.config": ("FilterConfig",),
    "curation.report": ("FilterReport",),
    "curation.stream": ("filter_records",),
    "errors": ("DecodeError", "InputError", "StorageError"),
    "loading.config": ("DataConfig",),
    "loading.dataset": ("FlashI2VDataset",),
    "loading.loader": ("StatefulLoader", "build_dataloader", "collate"),
    "loading.sampler": ("SampleKey", "StatefulDistributedSampler"),
    "loading.transforms": ("build_transform", "center_crop_resize", "normalise", "to_tensor"),
    "randomness": ("generator",),
    "settings": ("load_config",),
    "shapes.scenes": ("write_shapes",),
    "store.features": ("FeatureStore", "FeatureWriter"),
    "store.reader": ("LmdbStore", "open_store", "write_store"),
    "video.decode": ("read_frames",),
    "video.write": ("write_video",),
}

__all__ = [
    "DataConfig",
    "DecodeError",
    "FeatureStore",
    "FeatureWriter",
    "FilterConfig",
    "FilterReport",
    "FlashI2VDataset",
    "InputError",
    "LmdbStore",
    "SampleKey",
    "StatefulDistributedSampler",
    "StatefulLoader",
    "StorageError",
    "__version__",
    "build_dataloader",
    "build_transform",
    "center_crop_resize",
    "collate",
    "filter_records",
    "generator",
    "load_config",
    "normalise",
    "open_store",
    "read_frames",
    "to_tensor",
    "write_shapes",
    "write_store",
    "write_video",
]


def __dir__() -> list[str]:
    """List what is imported when it is first used, too."""
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: filtering should not wait for torch."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
