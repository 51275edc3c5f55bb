import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from flashi2v_infer.records import Source, differences, fingerprint, origin
from flashi2v_infer.settings import Request, SamplingSettings

SOURCE = Source("tiny", {"predictor": {"patch_size": (1, 2, 2), "eps": 1e-6}}, {"predictor": "blake2b:1"})
REQUEST = Request("a cat", "cat.png", "dark", seed=1, index=2, fps=8)


def test_what_a_video_was_made_from_differs_in_nothing_from_itself():
    first = origin(REQUEST, "sha256:1", SOURCE)
    made = {**first, "versions": {"torch": "2.6"}, "device": "npu:0", "first_frame_psnr": 30.0}
    assert differences(made, first) == []
    # The same picture and weights, elsewhere.
    elsewhere = origin(replace(REQUEST, image="b/cat.png"), "sha256:1", replace(SOURCE, name="b/tiny"))
    assert differences(made, elsewhere) == []


@pytest.mark.parametrize(
    ("request_", "contents", "source", "message"),
    [
        (replace(REQUEST, prompt="a dog"), "1", SOURCE, 'prompt was "a cat", is "a dog"'),
        (replace(REQUEST, negative_prompt=""), "1", SOURCE, 'negative_prompt was "dark", is ""'),
        (replace(REQUEST, seed=2), "1", SOURCE, "seed was 1, is 2"),
        (replace(REQUEST, fps=16), "1", SOURCE, "fps was 8, is 16"),
        (replace(REQUEST, settings=SamplingSettings(height=64)), "1", SOURCE, "settings.height was 480, is 64"),
        (REQUEST, "2", SOURCE, 'image_contents was "1", is "2"'),
        (REQUEST, "1", replace(SOURCE, weights={"predictor": "x"}), 'weights.predictor was "blake2b:1", is "x"'),
        (
            REQUEST,
            "1",
            replace(SOURCE, settings={"predictor": {"patch_size": (1, 2, 2), "eps": 0.1}}),
            "model_settings.predictor.eps was 1e-06, is 0.1",
        ),
        (REQUEST, "1", replace(SOURCE, settings={"ae": {"dtype": "bf16"}}), 'ae.dtype was null, is "bf16"'),
    ],
)
def test_every_fact_that_differs_is_named_with_both_values(request_, contents, source, message):
    (difference,) = differences(origin(REQUEST, "1", SOURCE), origin(request_, contents, source))
    assert message in difference


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
