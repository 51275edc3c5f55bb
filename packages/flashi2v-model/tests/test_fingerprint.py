"""What tells weights apart, and what does not."""

import os

import pytest
import torch
from safetensors.torch import save_file

from flashi2v_model.weights.fingerprint import fingerprint


@pytest.mark.parametrize(
    ("save", "file"),
    [(save_file, "a.safetensors"), (torch.save, "a.pt"), (torch.save, "__0_0.distcp")],
    ids=["safetensors", "torch", "distributed"],
)
def test_a_model_is_known_again_by_its_contents_wherever_it_lies(tmp_path, save, file):
    # A large layer, and a small one that alone was trained.
    state = {"trunk": torch.ones(1000, 500), "shift": torch.arange(8.0), "head": torch.ones(300, 500)}
    for name in ("first", "second", "trained"):
        (tmp_path / name / "transformer").mkdir(parents=True)
        shift = state["shift"] + 1e-3 * (name == "trained")
        save({**state, "shift": shift}, tmp_path / name / "transformer" / file)
    os.utime(tmp_path / "second" / "transformer" / file, (0, 0))
    (tmp_path / "second" / ".cache").mkdir()
    (tmp_path / "second" / ".cache" / "notes").write_text("downloaded on a Monday")
    first, second, trained = (fingerprint(tmp_path / name) for name in ("first", "second", "trained"))
    assert first == second != trained
    (tmp_path / "second" / "config.json").write_text("{}")
    assert fingerprint(tmp_path / "second") != first
    files = [tmp_path / name / "transformer" / file for name in ("first", "second", "trained")]
    assert fingerprint(files[0]) == fingerprint(files[1]) != fingerprint(files[2])
    assert fingerprint("owner/name") == "owner/name"


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 7, b"\xff" * 100, b"\2\0\0\0\0\0\0\0[]", b"PK\5\6" + b"\1" * 16 + b"\0" * 2]
)
def test_damaged_weights_have_a_fingerprint_too(tmp_path, content):
    for name in ("weights.safetensors", "weights.pt"):
        (tmp_path / name).write_bytes(content)
        assert fingerprint(tmp_path / name).startswith("blake2b:")


def test_the_whole_of_the_files_counts_where_it_is_asked_for(tmp_path):
    state = {"weight": torch.zeros(100_000)}
    for name in ("one", "two", "other"):
        (tmp_path / name).mkdir()
        state["weight"][-1] = name == "other"  # far behind the first bytes
        save_file(state, tmp_path / name / "model.safetensors")
    quick, whole = (
        [fingerprint(tmp_path / name, whole=whole) for name in ("one", "two", "other")] for whole in (False, True)
    )
    assert quick[0] == quick[1] == quick[2]
    assert whole[0] == whole[1] != whole[2]
