"""One small world for all packages' tests: videos, a store of them, a whole model, pictures and settings.

It is made once for all processes of a run, and for later runs as long as the sources are the same. Tests get a copy.
"""

import contextlib
import hashlib
import io
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: then several processes may make it, and the last one's stays
    fcntl = None  # type: ignore[assignment]

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".pytest_cache/worlds"
SIZE, NUM_FRAMES, NUM_VIDEOS = 32, 5, 8
FILTER = {
    "ann_txt_path": "shapes/videos.txt",
    "save_path": "store",
    "sample_height": SIZE,
    "sample_width": SIZE,
    "sample_num_frames": NUM_FRAMES,
    "min_hxw": SIZE * SIZE,
    "train_fps": 16,
    "max_h_div_w_ratio": 1.2,
    "min_h_div_w_ratio": 0.4,
}
# Of clips as they are, of halves of them, and of pictures.
BUCKETS = [[NUM_FRAMES, SIZE, SIZE], [NUM_FRAMES, SIZE, SIZE // 2], [1, SIZE, SIZE]]


def copy_into(directory: Path) -> Path:
    """Put `shapes` (videos of 5 frames of 32x32), `store` and `model` (random weights) into a directory.

    The store names the videos where they were made, so a copy of them may be changed at will.
    """
    return Path(shutil.copytree(made(), directory, dirs_exist_ok=True))


def made() -> Path:
    """Return the directory that is made once; nothing in it may be changed."""
    sources = sorted([Path(__file__), *ROOT.glob("packages/*/src/**/*.py")])
    key = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    place = CACHE / key
    with _alone():
        if not (place / "whole").exists():
            shutil.rmtree(place, ignore_errors=True)  # unfinished
            for old in CACHE.glob("*"):  # of other sources; another run may be using a young one
                if time.time() - old.stat().st_mtime > 86_400:
                    shutil.rmtree(old, ignore_errors=True)
            place.mkdir(parents=True)
            _make(place)
            (place / "whole").touch()
    return place


def model_settings(directory: Path) -> dict[str, Any]:
    """Return the contents of a model file for training in a world in a directory, which may be a relative one."""
    return {
        "load_video_features": False,
        "task": "t2v",
        "ae": {"model_id": "wan_video_vae", "from_pretrained": str(directory / "model/vae"), "do_sample": True},
        "text_encoder": {
            "model_id": "UMT5",
            "from_pretrained": str(directory / "model/text_encoder"),
            "dtype": "fp32",
        },
        "diffusion": {
            "model_id": "flow_matching",
            "use_dynamic_shifting": True,
            "use_logitnorm_time_sampling": True,
        },
        "predictor": {
            "model_id": "flashi2vdit",
            "dtype": "fp32",
            "hidden_size": 48,
            "num_heads": 2,
            "num_layers": 2,
            "ffn_dim": 64,
            "freq_dim": 32,
            "text_dim": 64,
            "text_len": 16,
        },
    }


def data_settings(directory: Path) -> dict[str, Any]:
    """Return the contents of a data file for a world in a directory, which may be a relative one."""
    return {
        "dataset_param": {
            "dataset_type": "flashi2v",
            "metafile_or_dir_path": str(directory / "store"),
            "text_tokenizer_path": str(directory / "model/tokenizer"),
            "sample_height": SIZE,
            "sample_width": SIZE,
            "sample_num_frames": NUM_FRAMES,
            "train_fps": 16,
            "text_drop_ratio": 0.1,
            "tokenizer_max_length": 16,
            "return_prompt_mask": True,
            "transform_pipeline": {
                "video": [
                    {"trans_type": "CenterCropResizeVideo", "param": {"transform_size": [SIZE, SIZE]}},
                    {"trans_type": "ToTensorVideo"},
                    {"trans_type": "norm_fun", "param": {"mean": 0.5, "std": 0.5}},
                ]
            },
        },
        "dataloader_param": {
            "dataloader_mode": "sampler",
            "sampler_type": "StatefulDistributedSampler",
            "collate_param": {"model_name": "flashi2v"},
            "shuffle": True,
            "drop_last": True,
            "pin_memory": False,
            "num_workers": 0,
        },
    }


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    CACHE.parent.mkdir(exist_ok=True)
    with open(CACHE.with_suffix(".lock"), "w") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make(directory: Path) -> None:
    # Imported here: most tests need no world, or have it from an earlier run.
    from flashi2v_data.curation.config import FilterConfig
    from flashi2v_data.curation.meta import read_entries
    from flashi2v_data.curation.stream import filter_records
    from flashi2v_data.records import Annotation
    from flashi2v_data.shapes.scenes import write_shapes
    from flashi2v_data.store.reader import write_store
    from flashi2v_model.cli import init

    write_shapes(directory / "shapes", NUM_VIDEOS, 0, SIZE, SIZE, NUM_FRAMES)
    limits = FilterConfig(**FILTER)
    entries = read_entries(Annotation(str(directory / "shapes"), str(directory / "shapes/videos.json")))
    write_store(directory / "store/clips.lmdb", filter_records(entries, limits), limits.model_dump())
    with contextlib.redirect_stdout(io.StringIO()):  # the command's word on it
        init(directory / "model", preset="tiny")
