"""What features encoded ahead depend on: written beside them, and asked of them where they are read."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from flashi2v_data.errors import InputError
from flashi2v_data.store.reader import open_store
from flashi2v_model.weights.fingerprint import fingerprint
from flashi2v_train.config import RunConfig

if TYPE_CHECKING:
    from flashi2v_train.world import World

REPORT = "report.json"


def provenance(config: RunConfig, *, video: bool = True, text: bool = True) -> dict[str, Any]:
    """Return everything that features depend on.

    Args:
        config: of a run.
        video: of the clips.
        text: of the captions.
    """
    data, model = config.data.dataset_param, config.model
    found: dict[str, Any] = {}
    if video:
        transforms = data.transform_pipeline.model_dump(mode="json")
        found |= {
            "clips": len(open_store(data.metafile_or_dir_path)),
            "vae": fingerprint(model.ae.from_pretrained, whole=True),
            "vae_dtype": _dtype(model.ae.dtype),
            "vae_tiles": model.ae.tiling_param.model_dump(mode="json") if model.ae.enable_tiling else None,
            "size": [data.sample_num_frames, data.sample_height, data.sample_width],
            "buckets": [[*bucket] for bucket in sorted(data.buckets)] if isinstance(data.buckets, list) else None,
            "train_fps": data.train_fps,
            "sample_stride": data.sample_stride,
            "transforms": transforms,
            "seed": config.options.seed,
        }
        # Features of earlier versions say nothing of these, and were made so.
        found |= {"geometry": data.geometry} if data.geometry != "reference" else {}
        found |= {"tone_map": True} if data.tone_map else {}
    if text:
        found |= {
            "text_encoder": fingerprint(model.text_encoder.from_pretrained, whole=True),
            "text_encoder_dtype": _dtype(model.text_encoder.dtype),
            "use_attention_mask": model.text_encoder.use_attention_mask,
            "tokenizer": fingerprint(data.text_tokenizer_path, whole=True),
            "tokenizer_max_length": data.tokenizer_max_length,
            "clean_captions": data.clean_captions,
        }
    return found


def _dtype(name: str) -> str:
    return "fp32" if name == "float32" else name


def check_store(features_path: str) -> None:
    """Refuse a store that is not encoded to its end.

    Raises:
        InputError: naming the directory.
    """
    if not (Path(features_path) / REPORT).is_file():
        raise InputError(
            f"{features_path} is no store that flashi2v-encode has finished ({REPORT} is not there): run it, or run it "
            "again to its end"
        )


def provenance_of_features(config: RunConfig, world: "World") -> dict[str, Any] | None:
    """Return what the features of a run must have been made by, where it loads any; called by all processes.

    Raises:
        InputError: the store of features is not encoded to its end.
    """
    data = config.data.dataset_param
    if not (data.load_video_features or data.load_text_features):
        return None
    found: list[dict[str, Any] | None] = [None]
    if world.is_first:  # it takes a while to read all weights
        check_store(str(data.features_path))
        found = [provenance(config, video=data.load_video_features, text=data.load_text_features)]
    dist.broadcast_object_list(found, 0, world.control)
    return found[0]
