"""Videos with fewer calls of the network: from Python, the command line, files and the web."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler

from flashi2v_infer import FlashI2VPipeline, InputError, demo
from flashi2v_infer.defaults import read_defaults
from flashi2v_infer.execution import Execution
from flashi2v_infer.files.records import differences, origin
from flashi2v_infer.load import ModelDirectory
from flashi2v_infer.settings import Request, SamplingSettings
from flashi2v_infer.web.schema import Limits, Order, Served
from flashi2v_model.sampling import set_timesteps
from flashi2v_model.scheduler import euler_scheduler
from flashi2v_model.speed.calibration import FILE, Calibration, as_text
from flashi2v_model.speed.plan import SamplingPlan
from flashi2v_model.weights.fingerprint import fingerprint

STEPS = 8


def write_calibration(transformer: Path) -> None:
    """Beside a transformer: velocities that bend a little, and the more the later."""
    scheduler = euler_scheduler(7.0)
    set_timesteps(scheduler, 16, torch.device("cpu"))
    levels = scheduler.sigmas.tolist()
    vectors = [[1.0, s, s**3, (1 - s) ** 4] for s in levels[:-1]]
    rows = [v + [0.0] * 4 for v in vectors] + [[0.0] * 4 + [0.2 * x for x in v] for v in vectors]
    found = Calibration(
        weights=fingerprint(transformer), made_from="a formula", guidance_scale=5.0, sigmas=levels,
        energies=(1.0, 0.5), covered=2.0,
        products=[[math.fsum(a * b for a, b in zip(x, y)) for y in rows[: i + 1]] for i, x in enumerate(rows)],
    )  # fmt: skip
    (transformer / FILE).write_text(as_text(found))


@pytest.fixture(scope="module")
def directory(model_directory, tmp_path_factory) -> Path:
    copy = tmp_path_factory.mktemp("calibrated") / "model"
    shutil.copytree(model_directory, copy)
    write_calibration(copy / "transformer")
    return copy


@pytest.fixture(scope="module")
def calibrated(directory) -> FlashI2VPipeline:
    pipe = FlashI2VPipeline.from_pretrained(directory)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def sample(calibrated, photograph):
    scheduler = calibrated.scheduler

    def call(prompt="a red circle", seeds=(1,), **changes):
        settings = {
            "num_frames": 5,
            "height": 32,
            "width": 48,
            "num_inference_steps": STEPS,
            "guidance_scale": 5.0,
            "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
            "output_type": "latent",
            "max_sequence_length": 24,
        }
        return calibrated(image=photograph, prompt=prompt, **{**settings, **changes})

    yield call
    calibrated.scheduler = scheduler


def test_exact_is_the_plain_run_and_records_nothing(sample):
    plain = sample()
    assert plain.calls is None
    for plan in ("exact", 1, "1", SamplingPlan(budget=0.0)):
        same = sample(plan=plan)
        assert torch.equal(same.frames, plain.frames)
        assert same.calls is None


def test_fewer_calls_make_nearly_the_same_video(sample):
    plain, planned = sample().frames, sample(plan=2.0)
    assert planned.calls["num_calls"] == STEPS
    assert planned.calls["num_calls_exact"] == 2 * STEPS
    for branch in planned.calls["calls"].values():
        assert sorted(branch["called"] + branch["skipped"]) == [*range(STEPS)]
    assert 0 < (planned.frames - plain).norm() / plain.norm() < 0.5
    assert torch.equal(planned.frames, sample(plan=2.0).frames)


def test_a_batch_makes_the_decisions_of_each_of_its_videos(sample):
    both = sample(prompt=["a red circle", "a blue square"], seeds=(1, 2), plan="2.5")
    for i, prompt in enumerate(("a red circle", "a blue square")):
        alone = sample(prompt=prompt, seeds=(i + 1,), plan=2.5)
        assert alone.calls == both.calls
        torch.testing.assert_close(alone.frames[0], both.frames[i], atol=1e-4, rtol=0)


def test_decisions_are_the_same_in_every_process(directory):
    """Whatever the seed of hashes, the number of threads or the noise: nothing of a run but its settings counts."""
    code = (
        "import sys; from pathlib import Path; from flashi2v_model.speed.calibration import read_calibration\n"
        "from flashi2v_model.speed.choice import choose_calls; from flashi2v_model.speed.plan import SamplingPlan\n"
        "found = read_calibration([Path(sys.argv[1])])\n"
        "both = [(times, scale) for times in (1.5, 2.5, 4) for scale in (None, 3.0)]\n"
        "print([choose_calls(SamplingPlan(times=t), found, found.sigmas, scale) for t, scale in both])\n"
        "assert 'torch' not in sys.modules"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", code, str(directory / "transformer")], capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("0", "1", "12345")
    }  # fmt: skip
    assert len(told) == 1


def test_what_else_a_call_takes_goes_with_a_plan(sample, calibrated):
    steps, previews = [], []

    def callback(pipe, step, timestep, tensors):
        steps.append(step)
        previews.append(tensors["denoised"].shape)
        pipe._interrupt = step == 4

    ended = sample(plan=2.0, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["denoised"])
    assert steps == [*range(5)]
    assert max(ended.calls["calls"]["prompt"]["called"] + ended.calls["calls"]["prompt"]["skipped"]) == 4
    for changes in ({"low_freq_energy_ratio": 0.3}, {"cfg_batch": True}, {"guidance_scale": 1.0}):
        assert sample(plan=2.0, **changes).frames.isfinite().all()
    unguided = sample(plan=2.0, guidance_scale=1.0).calls
    assert (unguided["num_calls"], list(unguided["calls"])) == (STEPS // 2, ["prompt"])
    calibrated.scheduler = UniPCMultistepScheduler.from_config(calibrated.scheduler.config)
    assert sample(plan=2.0).calls["num_calls"] == STEPS
    calibrated.scheduler = FlowMatchHeunDiscreteScheduler(shift=7.0)
    with pytest.raises(InputError, match="FlowMatchHeunDiscreteScheduler draws noise on the way, or looks twice"):
        sample(plan=2.0)


def test_adapters_are_told_of(sample, calibrated, make_adapter, caplog):
    calibrated.load_lora_weights(
        {f"transformer.{key}": value for key, value in make_adapter(calibrated.transformer).items()}
    )
    try:
        assert sample(plan=2.0).calls["num_calls"] == STEPS
    finally:
        calibrated.unload_lora_weights()
    assert "calibrated without adapters" in caplog.text


def test_a_model_without_calibration_or_with_another_is_refused(sampled, photograph, directory, tmp_path):
    with pytest.raises(InputError, match="flashi2v-model calibrate DIR --pictures FOLDER"):
        sampled(image=photograph, plan="fast")
    other = shutil.copytree(directory, tmp_path / "other")
    config = other / "transformer" / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(InputError, match="was made for other weights"):
        ModelDirectory(str(other), Execution()).calls(SamplingSettings(5, 32, 48, speed="fast"))


def test_a_calibration_does_not_make_it_another_model(model_directory, directory):
    assert fingerprint(model_directory) == fingerprint(directory)


def test_a_plan_is_told_before_anything_is_loaded(directory):
    model = ModelDirectory(str(directory), Execution())
    calls = model.calls(SamplingSettings(5, 32, 48, num_inference_steps=STEPS, speed=2.0))
    assert calls.num_calls == STEPS
    assert model.calls(SamplingSettings(5, 32, 48)) is None


def test_an_exact_record_is_what_it_was_before_there_was_a_choice():
    exact, fast = (origin(Request("a", "a.png", settings=SamplingSettings(speed=speed)), "1") for speed in (1, "fast"))
    assert "speed" not in exact["settings"]
    assert differences(exact, exact) == []
    assert differences(exact, fast) == ['settings.speed was null, is "fast"']
    assert differences(fast, exact) == ['settings.speed was "fast", is null']


@pytest.mark.parametrize("speed", ["fast", 2.0])
def test_the_command_line_records_calls_and_tells_them_ahead(tmp_path, monkeypatch, speed):
    monkeypatch.chdir(tmp_path)
    options = ("--num-inference-steps", 10, "--guidance-scale", 4, "--speed", speed, "--device", "cpu")
    done = forked.run("flashi2v-infer", "--model", "demo", "--plan", *options)
    assert done.returncode == 0, done.stderr
    record = json.loads(Path("demo.json").read_text())
    assert record["settings"]["speed"] == speed
    plan = record["sampling_plan"]
    assert plan["num_calls"] < plan["num_calls_exact"] == 20
    assert f"20 in all, of which {plan['num_calls']} are made" in done.stdout


def test_the_command_line_refuses_in_one_line(directory, model_directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for options, message in (
        (("--model", "demo", "--speed", "quick"), "speed must be one of exact, balanced, fast, or a number from 1"),
        (
            ("--model", model_directory, "--image", demo.IMAGE, "--prompt", "a", "-o", "a.mp4", "--speed", "fast"),
            "flashi2v-model calibrate DIR --pictures FOLDER",
        ),
    ):
        done = forked.run("flashi2v-infer", *options)
        assert done.returncode == 2
        assert message in done.stderr.splitlines()[-1]


def test_a_configuration_file_says_it_too(job, directory):
    file = job(
        predictor={"from_pretrained": str(directory / "transformer")},
        diffusion={"num_inference_steps": STEPS, "speed": 2},
    )
    done = forked.run("flashi2v-infer", "--mm-model", file)
    assert done.returncode == 0, done.stderr
    record = json.loads(Path("samples/video_0.json").read_text())
    assert (record["settings"]["speed"], record["sampling_plan"]["num_calls"]) == (2.0, STEPS)
    again = forked.run("flashi2v-infer", "--mm-model", file, "--resume")
    assert "0 videos (2 had been finished before)" in again.stdout


def test_the_web_takes_it_where_the_model_is_calibrated():
    served = Served("demo", demo.NAME, read_defaults("demo"), Limits(), {}, is_calibrated=True)
    values = served.request(Order(prompt="a", speed="2.5"), "images/none")
    assert values["settings"]["speed"] == 2.5
    plain = Served("demo", demo.NAME, read_defaults("demo"), Limits(), {})
    assert plain.request(Order(prompt="a"), "images/none")["settings"]["speed"] == "exact"
    with pytest.raises(InputError, match="speed: this model is not calibrated"):
        plain.request(Order(prompt="a", speed="fast"), "images/none")
    with pytest.raises(InputError, match="speed must be one of"):
        served.request(Order(prompt="a", speed="quick"), "images/none")
