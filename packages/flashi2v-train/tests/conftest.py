"""A small world to train in: videos, store, model directory and configuration files."""

import contextlib
import copy
import json
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import world
from hypothesis import settings
from world import NUM_FRAMES, SIZE

# No example has to be quick, and a failure on one machine is one on all.
settings.register_profile("every machine", deadline=None, derandomize=True, database=None)
settings.load_profile("every machine")


class Workspace:
    """Writes the two configuration files, with changes, and the command line's options."""

    def __init__(self, directory: Path, inputs: Path) -> None:
        self.directory = directory
        # Changes for a run that reads features; where from is `data.dataset_param.features_path`.
        self.loaded = {
            "model.load_video_features": True,
            "model.load_text_features": True,
            "data.dataset_param.load_video_features": True,
            "data.dataset_param.load_text_features": True,
        }
        self.model = {
            "load_video_features": False,
            "task": "t2v",
            "ae": {"model_id": "wan_video_vae", "from_pretrained": str(inputs / "model/vae"), "do_sample": True},
            "text_encoder": {
                "model_id": "UMT5",
                "from_pretrained": str(inputs / "model/text_encoder"),
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
        self.data = {
            "dataset_param": {
                "dataset_type": "flashi2v",
                "metafile_or_dir_path": str(inputs / "store"),
                "text_tokenizer_path": str(inputs / "model/tokenizer"),
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

    def files(self, changes: dict[str, Any] | None = None) -> dict[str, Path]:
        """Write both files; changes are dotted keys, first part `model` or `data`."""
        contents = {"model": copy.deepcopy(self.model), "data": copy.deepcopy(self.data)}
        for key, value in (changes or {}).items():
            *path, last = key.split(".")
            place: Any = contents
            for part in path:
                place = place[part]
            place[last] = value
        for name, content in contents.items():
            text = json.dumps(content, indent=2)
            (self.directory / f"{name}.json").write_text("# as users write them\n" + text.replace("\n}", ",\n}"))
        return {"mm_model": self.directory / "model.json", "mm_data": self.directory / "data.json"}

    def arguments(self, changes: dict[str, Any] | None = None, **options: Any) -> list[str]:
        """Return a command line."""
        values = {"device": "cpu", "save": self.directory / "run", **self.files(changes), **options}
        return [part for key, value in values.items() for part in (f"--{key.replace('_', '-')}", str(value))]


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    return world.copy_into(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def new_workspace(inputs) -> Callable[[Path], Workspace]:
    return lambda directory: Workspace(directory, inputs)


@pytest.fixture(scope="session")
def free_ports() -> Callable[[int], list[int]]:
    """Free ports, of those that the system gives to nobody who does not ask for them."""

    def find(number: int) -> list[int]:
        found: set[int] = set()
        while len(found) < number:
            with socket.socket() as free, contextlib.suppress(OSError):
                port = random.randrange(20_000, 32_000)
                free.bind(("localhost", port))
                found.add(port)
        return [*found]

    return find


@pytest.fixture
def workspace(tmp_path, inputs) -> Workspace:
    return Workspace(tmp_path, inputs)
