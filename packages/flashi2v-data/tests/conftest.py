import json
import os
from pathlib import Path
from typing import Any

import av
import pytest
from hypothesis import settings

from flashi2v_data.curation.config import FilterConfig
from flashi2v_data.curation.meta import read_entries
from flashi2v_data.curation.stream import filter_records
from flashi2v_data.loading.config import DataConfig
from flashi2v_data.records import Annotation
from flashi2v_data.shapes.scenes import write_shapes
from flashi2v_data.signals import Clip
from flashi2v_data.store.reader import write_store
from flashi2v_data.video.write import write_video

# No example has to be quick, and a failure on one machine is one on all.
settings.register_profile("every machine", deadline=None, derandomize=True, database=None)
settings.load_profile("every machine")

HEIGHT, WIDTH, NUM_FRAMES, NUM_VIDEOS = 32, 48, 13, 12


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    """A directory of small moving-shapes videos."""
    directory = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(directory, NUM_VIDEOS, 7, HEIGHT, WIDTH, NUM_FRAMES)
    return directory


@pytest.fixture(scope="session")
def store_path(shapes: Path) -> Path:
    """An LMDB of the moving-shapes videos, filtered for 5 frames at 16 fps."""
    config = FilterConfig(**filter_settings())
    entries = read_entries(Annotation(str(shapes), str(shapes / "videos.json")))
    return write_store(shapes.parent / "shapes.lmdb", filter_records(entries, config), config.model_dump())


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory) -> Path:
    """A word-level tokenizer of the real class, saved as a user's would be."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "</s>", "<unk>", "a", "small", "medium", "large", "moves", "to", "the", "on", "red", "circle"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(path)
    return path


@pytest.fixture
def write_hanging_video():
    """Write a file whose end a decoder takes hours to see: a transport stream with a terabyte of nothing."""

    def write(path: Path) -> None:
        with av.open(str(path), "w", format="mpegts") as container:
            stream = container.add_stream("mpeg2video", rate=25)
            stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
            for packet in [*stream.encode(av.VideoFrame(48, 32, "yuv420p")), *stream.encode(None)]:
                container.mux(packet)
        os.truncate(path, 1 << 40)

    return write


def filter_settings(**changes: Any) -> dict[str, Any]:
    return {
        "ann_txt_path": "videos.txt",
        "save_path": "lmdb",
        "sample_height": HEIGHT,
        "sample_width": WIDTH,
        "sample_num_frames": 5,
        "min_hxw": 1,
        "train_fps": 16,
        "max_h_div_w_ratio": 1.2,
        "min_h_div_w_ratio": 0.4,
    } | changes


def data_settings(store: Path, tokenizer: Path) -> dict[str, Any]:
    return {
        "dataset_param": {
            "dataset_type": "flashi2v",
            "metafile_or_dir_path": str(store),
            "text_tokenizer_path": str(tokenizer),
            "sample_height": HEIGHT,
            "sample_width": WIDTH,
            "sample_num_frames": 5,
            "train_fps": 16,
            "text_drop_ratio": 0.3,
            "tokenizer_max_length": 8,
            "return_prompt_mask": True,
            "transform_pipeline": {
                "video": [
                    {
                        "trans_type": "CenterCropResizeVideo",
                        "param": {"transform_size": [HEIGHT, WIDTH], "align_corners": False, "antialias": True},
                    },
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
            "pin_memory": True,
            "num_workers": 0,
        },
    }


@pytest.fixture
def filter_config():
    """FilterConfig(...) with some settings changed."""
    return lambda **changes: FilterConfig(**filter_settings(**changes))


@pytest.fixture
def raw_data_config(store_path: Path, tokenizer_path: Path) -> dict[str, Any]:
    """What a data.json over the moving shapes holds."""
    return data_settings(store_path, tokenizer_path)


@pytest.fixture
def data_config(raw_data_config, tmp_path):
    """DataConfig with some settings of dataset_param and dataloader_param changed, and a quarantine of its own."""

    def make(num_workers: int = 0, loader: dict[str, Any] | None = None, **changes: Any) -> DataConfig:
        raw = json.loads(json.dumps(raw_data_config))
        raw["dataset_param"].update({"quarantine_path": str(tmp_path / "quarantine.jsonl")} | changes)
        raw["dataloader_param"].update({"num_workers": num_workers} | (loader or {}))
        return DataConfig(**raw)

    return make


@pytest.fixture
def measured(tmp_path):
    """Write frames as a video and return what a signal says of it."""

    def measure(signal: Any, frames: Any, *, crf: int = 20, **entry: Any) -> Any:
        path = tmp_path / "measured.mp4"
        write_video(path, frames, 16, crf=crf)
        with Clip({"path": str(path), **entry}, signal.frames) as clip:
            return signal(clip)

    return measure
