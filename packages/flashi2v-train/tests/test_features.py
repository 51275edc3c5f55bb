"""Features on the way and ahead: the same samples on every layout, the same losses from a store as from pixels."""

import json
import os
import shutil
import sys
from itertools import islice
from pathlib import Path

import forked
import lmdb
import pytest
import torch

from flashi2v_data.errors import InputError
from flashi2v_data.store.reader import open_store, write_store
from flashi2v_train import encode, encoding, features
from flashi2v_train.config import RunConfig, read_run_config
from flashi2v_train.features import FeatureSource
from flashi2v_train.options import TrainOptions
from flashi2v_train.provenance import provenance
from flashi2v_train.trainer import train
from flashi2v_train.world import join_world

# One frame of five, mirrored or not: features are then of the first epoch's draws.
DRAWN = {"data.dataset_param.sample_num_frames": 1}


def run_encode(workspace, monkeypatch, changes=None, output="features", code=0, **options) -> Path:
    """Run the command in this process."""
    values = {"device": "cpu", "output": workspace.directory / output, **workspace.files(changes), **options}
    arguments = [part for key, value in values.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    monkeypatch.setattr(sys, "argv", ["flashi2v-encode", *arguments])
    with pytest.raises(SystemExit) as stop:
        encode.main()
    assert stop.value.code == code
    return values["output"]


def loading(workspace, changes=None) -> dict:
    """The settings of a run that reads what `run_encode` wrote."""
    return {
        **workspace.loaded,
        "data.dataset_param.features_path": str(workspace.directory / "features"),
        **(changes or {}),
    }


def run_training(workspace, name, changes=None, **options) -> list[float]:
    values = {"device": "cpu", "train_iters": 6, "micro_batch_size": 2, "lr": 1e-3, **options}
    save = workspace.directory / name
    train(read_run_config(TrainOptions(**workspace.files(changes), save=save, **values)))
    return [json.loads(line)["loss"] for line in (save / "metrics.jsonl").read_text().splitlines()]


def read(workspace, changes=None, **options) -> RunConfig:
    return read_run_config(TrainOptions(**workspace.files(changes), device="cpu", **options))


def read_samples(config: RunConfig, num_steps: int) -> list[tuple]:
    """(epoch, index), path, caption and tensors of every sample of a source's first steps, in order."""
    data = config.data.dataset_param
    loads = {"video": data.load_video_features, "text": data.load_text_features}
    found = []
    with join_world("cpu", config.parallel_dims(1)) as world:
        source = FeatureSource(config, world, provenance(config, **loads) if any(loads.values()) else None)
        for series, origins in (next(source) for _ in range(num_steps)):
            tensors = (
                part for batch in series.batches for part in zip(batch["latents"], batch["condition"], batch["text"])
            )
            found += [(*origin, of_sample) for origin, of_sample in zip(origins, tensors, strict=True)]
        found.append(source.num_skipped)
    return found


def assert_same(ours: list[tuple], theirs: list[tuple]) -> None:
    assert ours[-1] == theirs[-1]  # unreadable videos
    assert [sample[:3] for sample in ours[:-1]] == [sample[:3] for sample in theirs[:-1]]
    for (*_, one), (*_, other) in zip(ours[:-1], theirs[:-1], strict=True):
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(one, other, strict=True))


def test_training_from_features_equals_training_from_pixels(workspace, monkeypatch, caplog):
    """To the last bit, over an epoch's end: every clip has one crop in time; text is dropped, posteriors are drawn."""
    run_encode(workspace, monkeypatch)
    pixels = run_training(workspace, "pixels")

    def refuse(*_):
        raise AssertionError("no encoder is needed")

    monkeypatch.setattr(features, "load_vae", refuse)
    monkeypatch.setattr(features, "load_text_encoder", refuse)
    assert run_training(workspace, "features", loading(workspace)) == pixels


def test_only_text_may_come_from_a_store_and_the_vae_may_then_be_another(workspace, inputs, monkeypatch):
    output = run_encode(workspace, monkeypatch)
    other = workspace.directory / "vae"
    shutil.copytree(inputs / "model/vae", other)
    (other / "note.json").write_text("{}")
    texts = {key: value for key, value in workspace.loaded.items() if "text" in key}
    place = {**texts, "data.dataset_param.features_path": str(output), "model.ae.from_pretrained": str(other)}
    assert run_training(workspace, "texts", place) == run_training(workspace, "pixels")


@pytest.mark.parametrize("changes", [{}, DRAWN], ids=["one crop", "drawn crops, mirroring"])
def test_features_from_a_store_equal_those_from_pixels(workspace, monkeypatch, changes):
    """With neither encoder loaded; in every epoch where nothing is drawn, else in the first."""
    if changes:
        crop, *others = workspace.data["dataset_param"]["transform_pipeline"]["video"]
        mirror = {"trans_type": "RandomHorizontalFlipVideo"}
        changes = {**changes, "data.dataset_param.transform_pipeline.video": [mirror, crop, *others]}
    expected = read_samples(read(workspace, changes), 8 if changes else 16)
    run_encode(workspace, monkeypatch, changes)
    config = read(workspace, loading(workspace, changes))
    for loader in ("load_vae", "load_text_encoder"):
        monkeypatch.delattr(f"flashi2v_train.features.{loader}")
    assert_same(read_samples(config, len(expected) - 1), expected)


def test_an_unreadable_video_is_named_counted_and_stood_in_for_as_from_pixels(workspace, monkeypatch, capsys, inputs):
    broken = workspace.directory / "broken.mp4"
    broken.write_bytes(b"not a video")
    store = open_store(inputs / "store")
    records = [{**store[i], "path": str(broken)} if i == 3 else store[i] for i in range(len(store))]
    path = write_store(workspace.directory / "broken.lmdb", records, store.config)
    changes = {**DRAWN, "data.dataset_param.metafile_or_dir_path": str(path)}
    expected = read_samples(read(workspace, changes), 8)
    output = run_encode(workspace, monkeypatch, changes)
    assert "1 videos could not be read" in capsys.readouterr().err
    assert str(broken) in json.loads((output / "report.json").read_text())["unreadable"][0]
    Path(f"{path}.quarantine.jsonl").unlink()  # the store alone must do
    assert expected[-1] == 1
    assert_same(read_samples(read(workspace, loading(workspace, changes)), 8), expected)


@pytest.mark.slow
def test_an_interrupted_encoding_goes_on_on_any_number_of_processes(workspace, monkeypatch):
    features = run_encode(workspace, monkeypatch)
    whole = {key: value for store in features.glob("*.lmdb") for key, value in entries(store).items()}
    with lmdb.open(str(features / "process_0000.lmdb")) as environment, environment.begin(write=True) as transaction:
        for key in islice((key for key in whole if key != b"header"), 5):
            transaction.delete(key)
    run_encode(workspace, monkeypatch, nproc_per_node=2)
    stores = [entries(store) for store in sorted(features.glob("*.lmdb"))]
    assert {key: value for store in stores for key, value in store.items()} == whole
    assert sum(len(store) - 1 for store in stores) <= len(whole)  # nothing but a caption of both is there twice


def entries(store: Path) -> dict[bytes, bytes]:
    with lmdb.open(str(store), readonly=True) as environment, environment.begin() as transaction:
        return dict(transaction.cursor())


def test_an_interrupted_encoding_goes_on(workspace, monkeypatch, capsys):
    plain = run_encode(workspace, monkeypatch, output="plain")
    calls = []
    whole = features.encode_clip

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(encoding, "_BATCH", 2)
    monkeypatch.setattr(features, "encode_clip", interrupted)
    output = run_encode(workspace, monkeypatch, code=130)
    assert not (output / "report.json").exists()
    run_encode(workspace, monkeypatch)
    assert len(calls) == 6 + 8 - 4  # four of five were written
    assert (output / "report.json").read_text() == (plain / "report.json").read_text()
    report = json.loads((output / "report.json").read_text())
    assert (report["clips"], report["unreadable"], report["captions"], report["empty_captions"]) == (8, [], 9, 0)


def test_an_encoding_killed_while_its_stores_are_made_goes_on_and_counts_what_is_lost_of_captions(
    workspace, monkeypatch, capsys
):
    """What a kill leaves of a store: its directory, its lock, its first pages."""
    output = workspace.directory / "features"
    for name in ("process_0000.lmdb", "process_0001.lmdb", "process_0002.lmdb"):
        (output / name).mkdir(parents=True)
    (output / "process_0001.lmdb" / "lock.mdb").write_bytes(b"")
    (output / "process_0002.lmdb" / "data.mdb").write_bytes(b"")
    with lmdb.open(str(output / "process_0003.lmdb")):
        pass
    changes = {"data.dataset_param.tokenizer_max_length": 2, "model.predictor.text_len": 2}
    assert run_encode(workspace, monkeypatch, changes) == output
    assert sorted(path.name for path in output.iterdir()) == ["process_0000.lmdb", "report.json"]
    report = json.loads((output / "report.json").read_text())
    assert report["cut_captions"] == report["captions"] - 1 > 0
    assert "have more than the 2 tokens that are read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model.ae.from_pretrained", "OTHER", "made with vae"),
        ("model.ae.dtype", "bf16", "made with vae_dtype"),
        ("data.dataset_param.tokenizer_max_length", 12, "made with tokenizer_max_length"),
        ("model.text_encoder.use_attention_mask", False, "made with use_attention_mask"),
    ],
)
def test_what_was_made_by_something_else_is_refused(workspace, inputs, monkeypatch, capsys, key, value, words):
    """When training reads it, and when encoding would add to it."""
    run_encode(workspace, monkeypatch)
    if value == "OTHER":
        value = str(workspace.directory / "vae")
        shutil.copytree(inputs / "model/vae", value)
        (Path(value) / "note.json").write_text("{}")
    changes = {key: value}
    if key.endswith("max_length"):
        changes["model.predictor.text_len"] = value
    with pytest.raises(InputError, match=words):
        run_training(workspace, "run", loading(workspace, changes))
    run_encode(workspace, monkeypatch, changes, code=2)
    assert words in capsys.readouterr().err


# Data parallel places, tensor and context parallel processes, samples per step of one place.
SHARES = {
    "one": (1, 1, 4),
    "two places": (2, 1, 2),
    "two peers, evenly": (1, 2, 4),
    "four peers, a sample each": (1, 4, 4),
    "two places, two peers, rounds of two steps": (2, 2, 1),
    "four peers, rounds of two steps": (1, 4, 2),
}


def serve(rank: int, cases: list[tuple[str, TrainOptions]], ports: list[int], directory: Path) -> None:
    torch.set_num_threads(1)
    for (name, options), port in zip(cases, ports):
        num_places, num_peers, _ = SHARES[name]
        size = num_places * num_peers
        if rank >= size:
            continue
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        config = read_run_config(options)
        with join_world("cpu", config.parallel_dims(size)) as world:
            source = FeatureSource(config, world)
            served = [next(source) for _ in range(3)]
            state = source.state_dict()  # within a round of two
            source.close()
            source = FeatureSource(config, world)
            source.load_state_dict(state)
            served.append(next(source))
            source.close()
        found = [
            ((*origin.key,), origin.path, origin.caption, *sample)
            for series, origins in served
            for origin, sample in zip(origins, (one for b in series.batches for one in zip(*b.values())), strict=True)
        ]
        torch.save(found, directory / f"{name}-{rank}.pt")


@pytest.mark.slow
def test_processes_that_share_samples_see_what_one_sees(workspace, tmp_path, free_ports):
    """Read and encoded in turns by real processes, a resume in the middle of a round included."""
    cases = []
    for name, (_, num_peers, samples) in SHARES.items():
        parallel = {"context_parallel_size": num_peers} if num_peers < 4 else {"tensor_model_parallel_size": 2}
        parallel |= {"context_parallel_size": 2} if num_peers == 4 else {}
        options = TrainOptions(
            **workspace.files({"model.predictor.num_heads": 4}), device="cpu", micro_batch_size=samples, **parallel
        )
        cases.append((name, options))
    forked.call("flashi2v-train", 4, serve, cases, free_ports(len(cases)), tmp_path)
    whole = torch.load(tmp_path / "one-0.pt")
    assert len({key for key, *_ in whole}) == 16  # two epochs of eight
    for name, (num_places, num_peers, samples) in SHARES.items():
        for rank in range(num_places * num_peers):
            place = rank // num_peers
            expected = whole[place::num_places][: 4 * samples]
            for (*origin, latents, condition, context), wanted in zip(
                torch.load(tmp_path / f"{name}-{rank}.pt"), expected, strict=True
            ):
                assert origin == list(wanted[:3]), name
                for tensor, other in zip((latents, condition, context), wanted[3:], strict=True):
                    assert torch.equal(tensor, other), name


def test_a_set_smaller_than_a_step_is_refused(workspace):
    with pytest.raises(InputError, match="holds 8 records, fewer than the 12 of one optimizer step"):
        run_training(workspace, "run", micro_batch_size=3, global_batch_size=12)


def test_features_depend_on_what_is_read_alone(workspace):
    config = read_run_config(TrainOptions(**workspace.files(), device="cpu"))
    assert provenance(config).keys() == provenance(config, text=False).keys() | provenance(config, video=False).keys()
    assert provenance(config, video=False)["tokenizer_max_length"] == 16
