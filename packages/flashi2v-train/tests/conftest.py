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
        self.model = world.model_settings(inputs)
        self.data = world.data_settings(inputs)

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

    def base(self, changes: dict[str, Any] | None = None) -> Path:
        """Write a transformer to start from, no layer of which is zero, in diffusers' layout."""
        import torch

        from flashi2v_train.config import TrainOptions, read_run_config

        config = read_run_config(TrainOptions(**self.files(changes)))
        torch.manual_seed(0)
        transformer = config.recipe.build(config.model.predictor)
        for parameter in transformer.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
        transformer.save_pretrained(self.directory / "base")
        return self.directory / "base"

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


@pytest.fixture
def mixed(workspace):
    """Changes for a run on a store of whole clips, left halves, first frames and one clip that is too short."""
    from flashi2v_data.store.reader import open_store, write_store

    store = open_store(workspace.data["dataset_param"]["metafile_or_dir_path"])
    clips = [store[index] for index in range(len(store))]
    halves = [clip | {"crop": [0, 16, 0, 32]} for clip in clips[1:]]
    shorter = [clips[0] | {"num_frames": 2}]
    records = [*clips, *halves, *(clip | {"num_frames": 1} for clip in clips), *shorter]
    path = write_store(workspace.directory / "mixed.lmdb", records, store.config)
    return {"data.dataset_param.metafile_or_dir_path": str(path), "data.dataset_param.buckets": world.BUCKETS}
