from .config import DataConfig as DataConfig
from .dataset import FlashI2VDataset as FlashI2VDataset, Sample as Sample
from .loader import (
    Batch as Batch,
    StatefulLoader as StatefulLoader,
    build_dataloader as build_dataloader,
    collate as collate,
)
from .quarantine import Quarantine as Quarantine
from .sampler import SampleKey as SampleKey, StatefulDistributedSampler as StatefulDistributedSampler
from .transforms import (
    VideoTransform as VideoTransform,
    build_transform as build_transform,
    center_crop_resize as center_crop_resize,
    normalise as normalise,
    to_tensor as to_tensor,
)
