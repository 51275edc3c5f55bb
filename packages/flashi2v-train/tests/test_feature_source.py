"""The samples of a store against those from pixels, where crops and mirroring are drawn and where videos are broken."""

import json
import sys
from itertools import islice
from pathlib import Path

import lmdb
import pytest
import torch

from flashi2v_data.store import open_store, write_store
from flashi2v_train import encode
from flashi2v_train.config import RunConfig, read_run_config
from flashi2v_train.features import FeatureSource
from flashi2v_train.layout import Layout
from flashi2v_train.options import TrainOptions
from flashi2v_train.parallel import join_world

AHEAD = {
    "model.load_video_features": True,
    "model.load_text_features": True,
    "data.dataset_param.load_video_features": True,
    "data.dataset_param.load_text_features": True,
}
# One frame of five, mirrored or not: features are then of the first epoch's draws.
DRAWN = {"data.dataset_param.sample_num_frames": 1}


def layout(data: int = 1, peers: int = 1) -> Layout:
    return Layout(tensor=1, context=peers, pipeline=1, data=data, replicas=1, layers=(2,))


def read(workspace, changes=None, **options) -> RunConfig:
    return read_run_config(TrainOptions(**workspace.files(changes), device="cpu", **options))


def ahead(workspace, changes=None) -> dict:
    return {**AHEAD, "data.dataset_param.features_path": str(workspace.directory / "features"), **(changes or {})}


def origin(config: RunConfig) -> dict:
    data = config.data.dataset_param
    return encode.made_by(config, video=data.load_video_features, text=data.load_text_features)


def samples(source: FeatureSource, num_steps: int) -> list[tuple]:
    """(epoch, index), path, caption and tensors of every sample, in order."""
    found = []
    for step in (next(source) for _ in range(num_steps)):
        tensors = zip(step.features.latents, step.features.condition, step.features.context, strict=True)
        found += zip(step.keys, step.paths, step.captions, tensors, strict=True)
    return found


def read_samples(config: RunConfig, number: int, made_by=None) -> list[tuple]:
    with join_world("cpu", layout()) as world:
        return samples(FeatureSource(config, world, 1, made_by), number)


def assert_same(ours: list[tuple], theirs: list[tuple]) -> None:
    assert [sample[:3] for sample in ours] == [sample[:3] for sample in theirs]
    for (*_, one), (*_, other) in zip(ours, theirs, strict=True):
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(one, other, strict=True))


def run_encode(monkeypatch, capsys, workspace, changes=None, code=0, **options) -> str:
    files = workspace.files(changes)
    values = {**files, "output": workspace.directory / "features", "device": "cpu", **options}
    arguments = [part for key, value in values.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    monkeypatch.setattr(sys, "argv", ["flashi2v-encode", *arguments])
    with pytest.raises(SystemExit) as stop:
        encode.main()
    message = capsys.readouterr().err
    assert stop.value.code == code, message
    return message


@pytest.mark.parametrize("changes", [{}, DRAWN], ids=["one crop", "drawn crops, mirroring"])
def test_features_from_a_store_equal_those_from_pixels(workspace, monkeypatch, capsys, changes):
    """With neither encoder loaded; in every epoch where nothing is drawn, else in the first."""
    if changes:
        crop, *others = workspace.data["dataset_param"]["transform_pipeline"]["video"]
        mirror = {"trans_type": "RandomHorizontalFlipVideo"}
        changes = {**changes, "data.dataset_param.transform_pipeline.video": [mirror, crop, *others]}
    expected = read_samples(read(workspace, changes), 8 if changes else 16)
    run_encode(monkeypatch, capsys, workspace, changes)
    config = read(workspace, ahead(workspace, changes))
    for loader in ("load_vae", "load_text_encoder"):
        monkeypatch.delattr(f"flashi2v_train.features.{loader}")
    assert_same(read_samples(config, len(expected), origin(config)), expected)


def test_an_unreadable_video_is_named_counted_and_stood_in_for_as_from_pixels(workspace, monkeypatch, capsys, inputs):
    broken = workspace.directory / "broken.mp4"
    broken.write_bytes(b"not a video")
    store = open_store(inputs / "store")
    records = [{**store[i], "path": str(broken)} if i == 3 else store[i] for i in range(len(store))]
    path = write_store(workspace.directory / "broken.lmdb", records, store.config)
    changes = {**DRAWN, "data.dataset_param.metafile_or_dir_path": str(path)}
    expected = read_samples(read(workspace, changes), 8)
    message = run_encode(monkeypatch, capsys, workspace, changes)
    assert "1 videos could not be read" in message
    assert str(broken) in json.loads((workspace.directory / "features/report.json").read_text())["unreadable"][0]
    Path(f"{path}.quarantine.jsonl").unlink()  # the store alone must do
    config = read(workspace, ahead(workspace, changes))
    with join_world("cpu", layout()) as world:
        source = FeatureSource(config, world, 1, origin(config))
        assert_same(samples(source, 8), expected)
        assert source.num_skipped == 1


@pytest.mark.slow
def test_an_interrupted_encoding_goes_on_on_any_number_of_processes(workspace, monkeypatch, capsys):
    run_encode(monkeypatch, capsys, workspace)
    features = workspace.directory / "features"
    whole = {key: value for store in features.glob("*.lmdb") for key, value in entries(store).items()}
    with lmdb.open(str(features / "process_0000.lmdb")) as environment, environment.begin(write=True) as transaction:
        for key in islice((key for key in whole if key != b"header"), 5):
            transaction.delete(key)
    run_encode(monkeypatch, capsys, workspace, nproc_per_node=2)
    stores = [entries(store) for store in sorted(features.glob("*.lmdb"))]
    assert {key: value for store in stores for key, value in store.items()} == whole
    assert sum(len(store) - 1 for store in stores) <= len(whole)  # nothing but a caption of both is there twice


def entries(store: Path) -> dict[bytes, bytes]:
    with lmdb.open(str(store), readonly=True) as environment, environment.begin() as transaction:
        return dict(transaction.cursor())
