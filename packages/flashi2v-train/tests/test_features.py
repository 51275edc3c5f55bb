"""Features on the way and ahead: the same samples on every layout, the same losses from a store as from pixels."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing

from flashi2v_data.errors import InputError
from flashi2v_train import encode, features
from flashi2v_train.config import read_run_config
from flashi2v_train.encode import made_by
from flashi2v_train.features import FeatureSource
from flashi2v_train.options import TrainOptions
from flashi2v_train.parallel import join_world
from flashi2v_train.trainer import train

LOADED = {
    "model.load_video_features": True,
    "model.load_text_features": True,
    "data.dataset_param.load_video_features": True,
    "data.dataset_param.load_text_features": True,
}


def run_encode(workspace, monkeypatch, changes=None, output=None, code=0, **options) -> Path:
    """Run the command in this process."""
    output = output or workspace.directory / "features"
    files = [part for key, path in workspace.files(changes).items() for part in (f"--{key}", str(path))]
    more = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    arguments = ["flashi2v-encode", *files, "--output", str(output), "--device", "cpu", *more]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stop:
        encode.main()
    assert stop.value.code == code
    return output


def run_training(workspace, name, changes=None, **options) -> list[float]:
    values = {"device": "cpu", "train_iters": 6, "micro_batch_size": 2, "lr": 1e-3, **options}
    save = workspace.directory / name
    train(read_run_config(TrainOptions(**workspace.files(changes), save=save, **values)))
    return [json.loads(line)["loss"] for line in (save / "metrics.jsonl").read_text().splitlines()]


def test_training_from_features_equals_training_from_pixels(workspace, monkeypatch, caplog):
    """To the last bit, over an epoch's end: every clip has one crop in time; text is dropped, posteriors are drawn."""
    place = {**LOADED, "data.dataset_param.features_path": str(run_encode(workspace, monkeypatch))}
    pixels = run_training(workspace, "pixels")

    def refuse(*_):
        raise AssertionError("no encoder is needed")

    monkeypatch.setattr(features, "load_vae", refuse)
    monkeypatch.setattr(features, "load_text_encoder", refuse)
    assert run_training(workspace, "features", place) == pixels


def test_only_text_may_come_from_a_store_and_the_vae_may_then_be_another(workspace, inputs, monkeypatch):
    output = run_encode(workspace, monkeypatch)
    other = workspace.directory / "vae"
    shutil.copytree(inputs / "model/vae", other)
    (other / "note.json").write_text("{}")
    texts = {key: value for key, value in LOADED.items() if "text" in key}
    place = {**texts, "data.dataset_param.features_path": str(output), "model.ae.from_pretrained": str(other)}
    assert run_training(workspace, "texts", place) == run_training(workspace, "pixels")


def test_an_interrupted_encoding_goes_on(workspace, monkeypatch, capsys):
    plain = run_encode(workspace, monkeypatch, output=workspace.directory / "plain")
    calls = []
    whole = features.encode_clip

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(encode, "_BATCH", 2)
    monkeypatch.setattr(features, "encode_clip", interrupted)
    output = run_encode(workspace, monkeypatch, code=130)
    assert not (output / "report.json").exists()
    run_encode(workspace, monkeypatch)
    assert len(calls) == 6 + 8 - 4  # four of five were written
    assert (output / "report.json").read_text() == (plain / "report.json").read_text()
    assert json.loads((output / "report.json").read_text()) == {"clips": 8, "unreadable": [], "captions": 9}


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
    output = run_encode(workspace, monkeypatch)
    if value == "OTHER":
        value = str(workspace.directory / "vae")
        shutil.copytree(inputs / "model/vae", value)
        (Path(value) / "note.json").write_text("{}")
    changes = {key: value}
    if key.endswith("max_length"):
        changes["model.predictor.text_len"] = value
    with pytest.raises(InputError, match=words):
        run_training(workspace, "run", {**changes, **LOADED, "data.dataset_param.features_path": str(output)})
    run_encode(workspace, monkeypatch, changes, code=2)
    assert words in capsys.readouterr().err


def test_fingerprints_see_every_byte(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(bytes(100_000))
    assert encode.fingerprint(str(tmp_path / "one")) == encode.fingerprint(str(tmp_path / "two"))
    (tmp_path / "two/model.safetensors").write_bytes(bytes(99_999) + b"1")
    assert encode.fingerprint(str(tmp_path / "one")) != encode.fingerprint(str(tmp_path / "two"))
    assert encode.fingerprint("owner/name") == "owner/name"


def test_an_unreadable_video_is_named_and_stood_in_for_as_in_training_from_pixels(
    workspace, inputs, tmp_path, monkeypatch, caplog
):
    from flashi2v_data.store import open_store, write_store

    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video")
    store = open_store(inputs / "store")
    records = [{**store[i], "path": str(broken)} if i == 3 else store[i] for i in range(len(store))]
    write_store(tmp_path / "broken.lmdb", records, store.config)
    changes = {"data.dataset_param.metafile_or_dir_path": str(tmp_path / "broken.lmdb")}
    output = run_encode(workspace, monkeypatch, changes)
    assert str(broken) in json.loads((output / "report.json").read_text())["unreadable"][0]
    place = {**changes, **LOADED, "data.dataset_param.features_path": str(output)}
    assert run_training(workspace, "features", place) == run_training(workspace, "pixels", changes)


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
        num_places, num_peers, samples = SHARES[name]
        size = num_places * num_peers
        if rank >= size:
            continue
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        config = read_run_config(options)
        with join_world("cpu", config.layout(size)) as world:
            source = FeatureSource(config, world, samples)
            served = [next(source) for _ in range(3)]
            state = source.state_dict()  # within a round of two
            source.close()
            source = FeatureSource(config, world, samples)
            source.load_state_dict(state)
            served.append(next(source))
            source.close()
        found = [
            (key, path, caption, *(part[i] for part in vars(step.features).values()))
            for step in served
            for i, (key, path, caption) in enumerate(zip(step.keys, step.paths, step.captions))
        ]
        torch.save(found, directory / f"{name}-{rank}.pt")


@pytest.mark.slow
def test_processes_that_share_samples_see_what_one_sees(workspace, tmp_path, free_ports):
    """Read and encoded in turns by real processes, a resume in the middle of a round included."""
    cases = []
    for name, (num_places, num_peers, _) in SHARES.items():
        parallel = {"context_parallel_size": num_peers} if num_peers < 4 else {"tensor_model_parallel_size": 2}
        parallel |= {"context_parallel_size": 2} if num_peers == 4 else {}
        options = TrainOptions(
            **workspace.files({"model.predictor.num_heads": 4}), device="cpu", nproc_per_node=num_places, **parallel
        )
        cases.append((name, options))
    torch.multiprocessing.spawn(serve, (cases, free_ports(len(cases)), tmp_path), nprocs=4)
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
    assert made_by(config).keys() == made_by(config, text=False).keys() | made_by(config, video=False).keys()
    assert made_by(config, video=False)["tokenizer_max_length"] == 16
