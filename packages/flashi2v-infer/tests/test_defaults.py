"""A model directory knows what it was trained for."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline

from flashi2v_infer import FlashI2VPipeline, InputError, demo
from flashi2v_infer.cli import VideoOptions
from flashi2v_infer.defaults import read_defaults
from flashi2v_infer.execution import Execution
from flashi2v_infer.load import ModelDirectory
from flashi2v_infer.settings import SamplingSettings
from flashi2v_model import FlashI2VTransformer3DModel
from flashi2v_model.config import Defaults

TRAINED = {"num_frames": 5, "height": 32, "width": 48, "fps": 8, "num_inference_steps": 2, "guidance_scale": 1.0}


@pytest.fixture
def trained(model_directory, tmp_path) -> Path:
    """A copy of the pipeline that says what it was trained for."""
    directory = shutil.copytree(model_directory, tmp_path / "trained")
    write(directory, TRAINED)
    return directory


def write(directory: Path, defaults: object) -> None:
    file = directory / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "defaults": defaults}))


def test_a_call_starts_from_what_the_model_was_trained_for(trained, photograph, caplog, tmp_path):
    pipe = FlashI2VPipeline.from_pretrained(trained)
    pipe.set_progress_bar_config(disable=True)
    calls: list[int] = []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    with caplog.at_level(logging.WARNING):
        output = pipe(photograph, "a red circle", max_sequence_length=24)
        assert len(calls) == 2
        assert [picture.size for picture in output.frames[0]] == [(48, 32)] * 5
        assert output.fps == 8
        assert not caplog.records
        for _ in range(2):
            pipe(photograph, "a red circle", width=32, max_sequence_length=24, output_type="latent")
    assert caplog.messages == ["sampling 5 frames of 32x32, the model was trained for 5 of 32x48"]
    pipe.save_pretrained(tmp_path / "saved")
    assert read_defaults(str(tmp_path / "saved")) == Defaults(**TRAINED)


def test_the_command_starts_from_it_too(trained):
    options = VideoOptions(model=str(trained), image=Path("a.png"), prompt="a", output="a.mp4", num_inference_steps=7)
    defaults = read_defaults(str(trained))
    settings = options.settings(defaults)
    assert settings == SamplingSettings(5, 32, 48, num_inference_steps=7, guidance_scale=1.0)
    assert options.request(settings, defaults, None).fps == 8
    assert VideoOptions(model="nowhere/known").settings(Defaults()) == SamplingSettings()
    assert VideoOptions(model="demo").settings(read_defaults("demo")) == SamplingSettings(
        17, 96, 96, num_inference_steps=6, guidance_scale=3.0
    )


@pytest.mark.parametrize(
    ("defaults", "message"),
    [
        ({"num_frame": 5}, "defaults: num_frame: unknown key, did you mean 'num_frames'"),
        ({"num_frames": "5"}, "defaults: num_frames: .*integer"),
        ({"num_frames": 6}, r"defaults: num_frames must be 4k \+ 1, got 6: use 5 or 9"),
        ({"height": 0}, "defaults: height: "),
        ({"guidance_scale": -1}, "defaults: guidance_scale: "),
        ([5, 32, 48], "defaults must be an object such as"),
    ],
)
def test_malformed_defaults_are_one_line(trained, defaults, message):
    write(trained, defaults)
    for load in (FlashI2VPipeline.from_pretrained, DiffusionPipeline.from_pretrained, read_defaults):
        with pytest.raises(InputError, match=f"model_index.json: {message}") as caught:
            load(str(trained))
        assert "\n" not in str(caught.value)


def test_the_demo_goes_by_its_name_everywhere():
    assert FlashI2VPipeline.from_pretrained("demo").defaults.num_frames == 17
    assert ModelDirectory("demo", Execution()).name == str(demo.DIRECTORY)


def test_diffusers_finds_the_classes_that_a_directory_names(trained):
    pipe = DiffusionPipeline.from_pretrained(trained, trust_remote_code=True)
    assert type(pipe) is FlashI2VPipeline
    assert pipe.defaults.width == 48
    assert type(AutoModel.from_pretrained(str(trained), subfolder="transformer")) is FlashI2VTransformer3DModel


def test_code_of_a_directory_is_run_by_diffusers_alone_and_only_where_it_is_trusted(trained, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    (trained / "mine.py").write_text(
        "from flashi2v_infer import FlashI2VPipeline\nclass Mine(FlashI2VPipeline):\n    own = 7\n"
    )
    index = json.loads((trained / "model_index.json").read_text())
    (trained / "model_index.json").write_text(json.dumps({**index, "_class_name": ["mine", "Mine"]}))
    with pytest.raises(InputError, match=r"is of a \['mine', 'Mine'\]"):
        FlashI2VPipeline.from_pretrained(trained, trust_remote_code=True)
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(trained)
    assert DiffusionPipeline.from_pretrained(trained, trust_remote_code=True).own == 7


def test_the_package_may_be_imported_before_diffusers():
    program = (
        "import flashi2v_infer, sys\n"
        "assert 'torch' not in sys.modules\n"
        "from diffusers import DiffusionPipeline\n"
        "print(type(DiffusionPipeline.from_pretrained(str(flashi2v_infer.demo.DIRECTORY))).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["FlashI2VPipeline"], done.stderr


def test_a_pipeline_of_t5_loads_here_and_from_the_hub(trained, tmp_path, monkeypatch):
    from transformers import T5Config, T5EncoderModel

    from flashi2v_infer.plan.skeleton import parts_of
    from flashi2v_model.presets import save_pipeline

    pipe = FlashI2VPipeline.from_pretrained(trained)
    config = T5Config(
        vocab_size=384,
        d_model=64,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        is_encoder_decoder=False,
        use_cache=False,
    )
    directory = tmp_path / "models--someone--t5" / "snapshots" / "1"
    FlashI2VPipeline(**pipe.components | {"text_encoder": T5EncoderModel(config)}).save_pretrained(directory)
    expected = FlashI2VPipeline.from_pretrained(directory).encode_prompt("a cat", max_sequence_length=8)[0]
    # A repository as the hub's cache holds it.
    (tmp_path / "models--someone--t5" / "refs").mkdir()
    (tmp_path / "models--someone--t5" / "refs" / "main").write_text("1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in (str(directory), "someone/t5"):
        found = FlashI2VPipeline.from_pretrained(name)
        model = ModelDirectory(name, Execution(device="cpu"))
        for loaded in (found, model.load(model.settle())):
            assert type(loaded.text_encoder) is T5EncoderModel
            assert torch.equal(loaded.encode_prompt("a cat", max_sequence_length=8)[0], expected)
    assert type(parts_of(ModelDirectory(str(directory), Execution()), "cpu").text_encoder) is T5EncoderModel
    save_pipeline(pipe.transformer, tmp_path / "converted", encoders=directory)
    assert type(FlashI2VPipeline.from_pretrained(tmp_path / "converted").text_encoder) is T5EncoderModel
    model = ModelDirectory("someone/other", Execution(device="cpu"))
    with pytest.raises(InputError, match=r"--model: there is no directory someone/other, nor is it on the hub"):
        model.load(model.settle())


def test_a_saved_pipeline_has_a_model_card(trained, tmp_path, monkeypatch):
    pipe = FlashI2VPipeline.from_pretrained(trained)
    pipe.save_pretrained(tmp_path / "mine")
    card = (tmp_path / "mine" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\npipeline_tag: image-to-video\n")
    assert 'FlashI2VPipeline.from_pretrained("mine")' in card
    assert "`num_frames` 5, `height` 32, `width` 48, `fps` 8" in card
    (tmp_path / "mine" / "README.md").write_text("my words")
    FlashI2VPipeline.from_pretrained(tmp_path / "mine").save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text() == "my words"

    seen = {}

    class Made:
        repo_id = "me/mine"

    def upload(directory, repo_id, **options):
        seen.update(card=(Path(directory) / "README.md").read_text(), repo_id=repo_id, **options)

    # The hub alone cannot be had here.
    monkeypatch.setattr("flashi2v_infer.publishing.create_repo", lambda *args, **options: Made)
    pipe = FlashI2VPipeline.from_pretrained(trained)
    monkeypatch.setattr(pipe, "_upload_folder", upload)
    pipe.push_to_hub("me/mine", commit_message="first", private=True)
    assert seen["card"].count('from_pretrained("me/mine")') == 1
    assert (seen["repo_id"], seen["commit_message"], seen["create_pr"]) == ("me/mine", "first", False)
