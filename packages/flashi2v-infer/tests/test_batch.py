"""Batches: what one bad image or one failing video costs, and what --resume keeps."""

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import Command
from PIL import Image

from flashi2v_data import read_frames
from flashi2v_data.errors import StorageError
from flashi2v_data.settings import load_config
from flashi2v_infer import InputError, SamplingError, read_record, save_video
from flashi2v_infer.commands.batch import Batch, read_back, read_batch, unfinished, write_together
from flashi2v_infer.commands.run import sample_batch, sample_jobs
from flashi2v_infer.config import InferenceConfig
from flashi2v_infer.execution import Execution
from flashi2v_infer.load import ConfiguredModel
from flashi2v_infer.plan.measured import Meter
from flashi2v_infer.processes import Processes

SAMPLES, WHOLE = Path("samples"), Path("whole")

AS_IT_SAYS = Execution()


@pytest.fixture
def config(job):
    """Three videos, the last with the image of the first; call it to change settings."""
    Path("prompts.txt").write_text("a red circle\na dark object\na blue square\n")
    Path("images.txt").write_text("first.png\nsecond.jpg\nfirst.png\n")
    return lambda **changes: load_config(job(**changes), InferenceConfig)


def read(config: InferenceConfig) -> Batch:
    return read_batch(config, ConfiguredModel(config, AS_IT_SAYS).source())


def contents(directory: Path = SAMPLES) -> dict[str, bytes]:
    # A kill may leave the hidden directory of a file that was being written.
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def grid() -> np.ndarray:
    return read_frames(SAMPLES / "video_grid.mp4", range(5))


def differ(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether videos differ by more than their encoding, for which x264 does not always take as many bits."""
    return first.shape != second.shape or bool(np.abs(first.astype(int) - second).mean() > 3)


@pytest.fixture
def assert_whole():
    """Compare a directory with that of a batch that ran through."""

    def check(directory: Path = SAMPLES) -> None:
        assert contents(directory).keys() == contents(WHOLE).keys()
        for video in WHOLE.glob("*.mp4"):
            assert not differ(*(read_frames(path / video.name, range(5)) for path in (directory, WHOLE)))

    return check


@pytest.fixture
def whole(config) -> Path:
    """The directory of a batch that ran through, and a copy of it."""
    sample_batch(config(), AS_IT_SAYS)
    shutil.copytree(SAMPLES, WHOLE)
    return SAMPLES


@pytest.mark.usefixtures("whole")
def test_a_batch_is_what_its_jobs_are_whatever_their_order_and_number(config, assert_whole):
    model = ConfiguredModel(config(save_path="apart"), Execution(keep_text_encoder=True))
    batch = read_batch(model.config, model.source())
    jobs = batch.jobs
    alone = Processes(torch.device("cpu"))
    pipe = model.load(model.settle())
    sample_jobs(pipe, model, [jobs[2], jobs[0]], alone, Meter(alone.device).on_step_end)
    assert [job.request.index for job in unfinished(jobs)] == [1]
    sample_jobs(pipe, model, jobs[1:2], alone, Meter(alone.device).on_step_end)
    assert unfinished(jobs) == []
    assert write_together(batch) == []
    assert_whole(Path("apart"))
    assert jobs[0].image is jobs[2].image  # read and held once


def test_a_disk_that_fills_up_is_one_line_that_says_how_to_go_on(config):
    resource = pytest.importorskip("resource")  # of Unix
    settings, limits = config(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"cannot write samples/video_0.mp4; .*the same command with --resume"):
            sample_batch(settings, AS_IT_SAYS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not contents()


@pytest.mark.usefixtures("whole")
def test_resuming_a_finished_batch_samples_nothing_and_shows_all(config, assert_whole, capsys, monkeypatch):
    # Nothing to sample: the model is not even loaded.
    monkeypatch.setattr(ConfiguredModel, "load", None)
    Path("samples/video_grid.mp4").unlink()
    sample_batch(config(), AS_IT_SAYS, resume=True, strips=Path("strips"))
    assert_whole()
    assert capsys.readouterr().out.endswith(
        "wrote 0 videos (3 had been finished before) and video_grid.mp4 to samples\n"
    )
    assert sorted(path.name for path in Path("strips").iterdir()) == [f"video_{index}.png" for index in range(3)]
    assert read_record("strips/video_1.png")["prompt"] == "a dark object"


def _without_record(index: int) -> None:
    # As a kill between the two leaves them.
    Path(f"samples/video_{index}.json").unlink()


def _without_video(index: int) -> None:
    Path(f"samples/video_{index}.mp4").unlink()


def _cut(index: int) -> None:
    os.truncate(f"samples/video_{index}.mp4", os.path.getsize(f"samples/video_{index}.mp4") * 2 // 3)


def _empty(index: int) -> None:
    os.truncate(f"samples/video_{index}.mp4", 0)


@pytest.mark.parametrize("damage", [_without_record, _without_video, _cut, _empty])
@pytest.mark.usefixtures("whole")
def test_what_is_not_whole_is_sampled_again_and_nothing_else(config, assert_whole, damage):
    damage(1)
    before = {path: path.stat().st_mtime_ns for path in SAMPLES.glob("video_[02].*")}
    sample_batch(config(), AS_IT_SAYS, resume=True)
    assert_whole()
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_killed_batch_is_resumed_to_the_same_videos(config, whole, assert_whole):
    shutil.rmtree(whole)
    process = Command("flashi2v-infer", "--mm-model", "inference_model.json")
    while not Path("samples/video_0.mp4").exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert Path("samples/video_0.mp4").exists()
    sample_batch(config(), AS_IT_SAYS, resume=True)
    assert_whole()


@pytest.mark.parametrize(
    ("changes", "edit", "message"),
    [
        ({"seed": 4}, None, r"samples/video_0.json was made from something else: seed was 3, is 4 \(and 2 more"),
        ({"negative_prompt": "dark"}, None, 'negative_prompt was "", is "dark"'),
        ({"fps": 16}, None, "fps was 8.0, is 16.0"),
        ({"diffusion": {"shift": 5.0}}, None, "model_settings.diffusion.shift was 7.0, is 5.0"),
        ({"diffusion": {"num_inference_steps": 3}}, None, "settings.num_inference_steps was 2, is 3"),
        ({"ae": {"enable_tiling": True}}, None, "model_settings.ae.enable_tiling was false, is true"),
        ({"predictor": {"text_len": 64}}, None, "model_settings.predictor.text_len was 512, is 64"),
        ({}, ("prompts.txt", "a red circle\nanother\na blue square\n"), "video_1.json .*prompt was .*another"),
        ({}, ("images.txt", "first.png\nsecond.jpg\nsecond.jpg\n"), "video_2.json .*image_contents was"),
        ({}, ("samples/video_2.json", "{}"), "video_2.json holds no record of a sampled video"),
        ({}, ("samples/video_2.json", None), "video_2.mp4 holds no record of a sampled video"),
    ],
)
@pytest.mark.usefixtures("whole")
def test_what_was_made_from_something_else_is_neither_kept_nor_replaced(config, changes, edit, message):
    if edit is not None:
        path, text = Path(edit[0]), edit[1]
        if text is None:  # the video is somebody else's
            path.unlink()
            Path("samples/video_grid.mp4").replace("samples/video_2.mp4")
        else:
            path.write_text(text)
    before = contents()
    with pytest.raises(InputError, match=message) as error:
        sample_batch(config(**changes), AS_IT_SAYS, resume=True)
    assert str(error.value).endswith(
        "set save_path to another directory, restore the settings, or remove what is there"
    )
    assert contents() == before


@pytest.mark.usefixtures("whole")
def test_tiles_that_are_asked_for_make_other_videos(config):
    with pytest.raises(InputError, match=r"model_settings\.vae_tiling was null, is true"):
        sample_batch(config(), Execution(vae_tiling=True), resume=True)
    assert json.loads(Path("samples/video_0.json").read_text())["decoding"] == "whole pictures"


@pytest.mark.usefixtures("whole")
def test_what_changes_nothing_of_the_numbers_is_no_difference(config, capsys):
    sample_batch(config(ae={"dtype": "float32"}, predictor={"dtype": "float32"}), AS_IT_SAYS, resume=True)
    # Nor do tiles matter that are not used.
    sample_batch(config(ae={"tiling_param": {"tile_size": [40, 40]}}), AS_IT_SAYS, resume=True)
    assert capsys.readouterr().out.count("wrote 0 videos (3 had been finished before)") == 2


@pytest.mark.usefixtures("whole")
def test_weights_that_were_trained_further_make_other_videos(config, model_directory, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(model_directory / "transformer" / "diffusion_pytorch_model.safetensors")
    weights["proj_out.bias"] += 1e-3
    save_file(weights, tmp_path / "trained.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"weights.predictor was .blake2b:.*, is .blake2b:"):
        sample_batch(config(predictor={"from_pretrained": "trained.safetensors"}), AS_IT_SAYS, resume=True)


def test_the_same_image_under_another_name_is_the_same(config, whole):
    before = contents()
    Path("first.png").rename("renamed.png")
    Path("images.txt").write_text("renamed.png\nsecond.jpg\nrenamed.png\n")
    sample_batch(config(), AS_IT_SAYS, resume=True)
    assert contents() == before


def test_one_bad_image_costs_its_own_video_until_it_is_mended(config, whole, assert_whole, caplog, capsys):
    shutil.rmtree(whole)
    Path("second.jpg").rename("kept.jpg")
    with pytest.raises(InputError, match=r"^images.txt line 2: no usable image, .* add --resume to sample only"):
        sample_batch(config(), AS_IT_SAYS)
    assert "images.txt line 2: second.jpg: no such file: this video is left out" in caplog.text
    assert contents().keys() == {name for name in contents(WHOLE) if "_1" not in name}
    assert grid().shape == (5, 64, 96, 3)
    assert grid()[:, :32, 48:].max() < 30 < grid()[:, :32, :48].mean()  # black, where the second would be
    assert capsys.readouterr().out.endswith("wrote 2 videos and video_grid.mp4 to samples\n")

    Path("kept.jpg").rename("second.jpg")
    sample_batch(config(), AS_IT_SAYS, resume=True)
    assert_whole()
    assert capsys.readouterr().out == "wrote 1 video (2 had been finished before) and video_grid.mp4 to samples\n"


def test_bad_images_of_every_kind_are_named_and_none_is_sampled_when_all_are_bad(config, photograph):
    Path("broken.png").write_bytes(Path("first.png").read_bytes()[:900])
    Path("deep").mkdir()
    Path("images.txt").write_text("broken.png\nprompts.txt\ndeep\n")
    with pytest.raises(InputError) as error:
        sample_batch(config(predictor={"from_pretrained": "not even there"}), AS_IT_SAYS)
    for line, reason in ((1, "broken.png: cannot be read"), (2, "prompts.txt: not an image"), (3, "deep: cannot be")):
        assert f"images.txt line {line}: {reason}" in str(error.value)
    assert not SAMPLES.exists()


def test_a_video_whose_sampling_fails_costs_itself_and_makes_the_run_a_failure(config, poisoned, caplog):
    Path("prompts.txt").write_text("a red circle\na zebra\na blue square\n")
    changes = {"text_encoder": {"from_pretrained": str(poisoned)}}
    with pytest.raises(SamplingError, match=r"^video_1.mp4: sampling failed, see above$"):
        sample_batch(config(**changes), AS_IT_SAYS)
    assert "video_1.mp4: sampling ended in NaN or infinity" in caplog.text
    assert sorted(contents()) == ["video_0.json", "video_0.mp4", "video_2.json", "video_2.mp4", "video_grid.mp4"]
    assert grid()[:, :32, 48:].max() < 30

    Path("images.txt").write_text("first.png\nsecond.jpg\nnowhere.png\n")
    with pytest.raises(SamplingError, match=r"video_1.mp4: sampling failed, see above; images.txt line 3: no usable"):
        sample_batch(config(**changes), AS_IT_SAYS, resume=True)


@pytest.mark.usefixtures("whole")
def test_a_finished_video_of_another_size_is_not_taken_for_this_one(config):
    (job, *_) = read(config()).jobs
    assert read_back(job).shape == (5, 32, 48, 3)
    record = json.loads(Path("samples/video_0.json").read_text())
    save_video(job.path, np.zeros((5, 64, 48, 3), np.uint8), 8, record)
    assert read_back(job) is None


def test_images_are_relative_to_the_working_directory_not_to_their_list(config, photograph):
    Path("lists").mkdir()
    for name in ("prompts.txt", "images.txt"):
        Path(name).rename(f"lists/{name}")
    Image.fromarray(photograph).save("lists/first.png")
    batch = read(config(prompt="lists/prompts.txt", image="lists/images.txt"))
    assert len(batch.jobs) == 3
    Path("second.jpg").rename("lists/second.jpg")
    assert list(read(config(prompt="lists/prompts.txt", image="lists/images.txt")).bad_lines) == [2]
