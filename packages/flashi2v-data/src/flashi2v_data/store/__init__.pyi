from .features import (
    FeatureStore as FeatureStore,
    FeatureWriter as FeatureWriter,
    text_key as text_key,
    video_key as video_key,
)
from .reader import LmdbStore as LmdbStore, open_store as open_store, write_store as write_store
from .table import export_parquet as export_parquet
