from .curation.config import FilterConfig as FilterConfig
from .curation.report import FilterReport as FilterReport
from .curation.stream import filter_records as filter_records
from .errors import DecodeError as DecodeError, InputError as InputError, StorageError as StorageError
from .loading.config import DataConfig as DataConfig
from .loading.dataset import FlashI2VDataset as FlashI2VDataset
from .loading.loader import StatefulLoader as StatefulLoader, build_dataloader as build_dataloader, collate as collate
from .loading.sampler import SampleKey as SampleKey, StatefulDistributedSampler as StatefulDistributedSampler
from .loading.transforms import (
    build_transform as build_transform,
    center_crop_resize as center_crop_resize,
    normalise as normalise,
    to_tensor as to_tensor,
)
from .randomness import generator as generator
from .settings import load_config as load_config
from .shapes.scenes import write_shapes as write_shapes
from .store.features import FeatureStore as FeatureStore, FeatureWriter as FeatureWriter
from .store.reader import LmdbStore as LmdbStore, open_store as open_store, write_store as write_store
from .video.decode import read_frames as read_frames
from .video.write import write_video as write_video

__version__: str
