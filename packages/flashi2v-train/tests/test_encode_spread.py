"""Encoding over a Ray cluster: the features and the report of one process, and a run that goes on."""

import json
import os
import re
import sys
from pathlib import Path

import lmdb
import pytest
import ray_nodes

from flashi2v_data.store.reader import open_store, write_store
from flashi2v_train import encode, encode_spread

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster():
    """A cluster with two processors, joined by this process."""
    with ray_nodes.cluster() as made:
        ray.init(address=made.address, log_to_driver=False)
        yield
        ray.shutdown()


def run(monkeypatch, workspace, output: str, *options: str, changes=None, code: int = 0) -> Path:
    files = {"device": "cpu", "output": workspace.directory / output, **workspace.files(changes)}
    arguments = [part for key, value in files.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    monkeypatch.setattr(sys, "argv", ["flashi2v-encode", *arguments, *options])
    with pytest.raises(SystemExit) as stop:
        encode.main()
    assert stop.value.code == code
    return workspace.directory / output


def features(folder: Path) -> dict[bytes, bytes]:
    found = {}
    for store in folder.glob("*.lmdb"):
        with lmdb.open(str(store), readonly=True, lock=False) as environment, environment.begin() as transaction:
            for key, value in transaction.cursor():
                assert found.setdefault(key, value) == value
    return found


def test_a_cluster_encodes_what_one_process_encodes_and_goes_on(cluster, workspace, inputs, monkeypatch, capsys):
    broken = workspace.directory / "broken.mp4"
    broken.write_bytes(b"not a video")
    store = open_store(inputs / "store")
    records = [{**store[i], "path": str(broken)} if i == 3 else store[i] for i in range(len(store))]
    path = write_store(workspace.directory / "broken.lmdb", records, store.config)
    changes = {"data.dataset_param.metafile_or_dir_path": str(path)}
    monkeypatch.setattr(encode_spread, "PIECE_RECORDS", 2)
    alone = run(monkeypatch, workspace, "alone", changes=changes)
    Path(f"{path}.quarantine.jsonl").unlink()
    spread = run(monkeypatch, workspace, "spread", "--engine", "ray", "--jobs", "2", changes=changes)
    whole = features(alone)
    assert features(spread) == whole
    assert (spread / "report.json").read_text() == (alone / "report.json").read_text()
    assert str(broken) in json.loads((spread / "report.json").read_text())["unreadable"][0]
    assert not (spread / "encode.ledger").exists()
    before = {part: part.stat().st_size for part in spread.glob("*.lmdb/data.mdb")}
    lost = [key for key in whole if key != b"header"][:3]
    for part in spread.glob("*.lmdb"):
        with lmdb.open(str(part)) as environment, environment.begin(write=True) as transaction:
            for key in lost:
                transaction.delete(key)
    (spread / "report.json").unlink()
    run(monkeypatch, workspace, "spread", "--engine", "ray", "--jobs", "1", changes=changes)
    assert features(spread) == whole
    (added,) = set(spread.glob("*.lmdb/data.mdb")) - before.keys()
    with lmdb.open(str(added.parent), readonly=True, lock=False) as environment, environment.begin() as transaction:
        again = {key for key, _ in transaction.cursor()} - {b"header"}
    assert again >= {*lost}
    assert len(again) <= len(lost) + 1, "only what stands in for the broken video may be encoded twice"


def test_clips_of_several_shapes_are_encoded_over_a_cluster_as_by_one_process(
    cluster, workspace, mixed, monkeypatch, caplog
):
    monkeypatch.setattr(encode_spread, "PIECE_RECORDS", 3)
    caplog.set_level("INFO", "flashi2v_train")
    alone = run(monkeypatch, workspace, "alone", changes=mixed)
    spread = run(monkeypatch, workspace, "spread", "--engine", "ray", "--jobs", "2", changes=mixed)
    assert features(spread) == features(alone)
    assert (spread / "report.json").read_text() == (alone / "report.json").read_text()
    for number, found in zip((1, 2), re.findall(r"encode: (.*)", caplog.text), strict=True):
        assert re.fullmatch(rf"\d+ clips in .* by {number} encoders: .* waiting for decoders.* allows", found)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (("--address", "10.0.0.1:6379"), "--address and --jobs are of --engine ray"),
        (("--engine", "ray", "--nproc-per-node", "2"), "--engine ray starts its own processes"),
        (("--engine", "ray", "--address", "127.0.0.1:9"), "--address 127.0.0.1:9"),
    ],
)
def test_what_does_not_fit_together_is_refused_in_one_line(workspace, monkeypatch, capsys, options, fault):
    run(monkeypatch, workspace, "refused", *options, code=2)
    assert fault in capsys.readouterr().err
    assert not os.path.exists(workspace.directory / "refused")
