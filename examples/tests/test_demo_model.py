"""The whole way through the console scripts: videos, filter, features, training, a model, and what its videos show."""

import json
import subprocess
import sys
from pathlib import Path

import forked
import pytest
from cold import command
from PIL import Image

from flashi2v_data import read_frames
from flashi2v_data.shapes.stories import Stage, sample_story

EXAMPLES = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """A directory in which the demo ran, much shorter than users run it."""
    directory = tmp_path_factory.mktemp("checkout")
    (directory / "examples").symlink_to(EXAMPLES)
    Image.fromarray(Stage(sample_story(5, 0, 64, 64), 64, 64).frame(0)).save(directory / "picture.png")
    command(directory, "python", "examples/demo_model/run.py", "--shorter", 200)
    return directory


def test_a_few_steps_already_keep_the_first_frame(demo):
    found = json.loads((demo / "demo/evaluation/evaluation.json").read_text())
    assert [(row["scene"], row["seed"]) for row in found["videos"]] == [(i, 0) for i in range(6)]
    # It starts from videos that stay; without that, frames are noise after six steps.
    assert all(row["psnr"] > 14 and row["background_jump"] < 20 for row in found["videos"])
    assert (demo / "demo/evaluation/report.md").read_text().count("| 100.0% |\n") == 9  # of what is real
    for picture in ("distributions.png", "strips_as_in_training.png", "nine_pictures.webp", "nine_sentences.webp"):
        assert Image.open(demo / "demo/evaluation" / picture).width > 300


def test_a_run_becomes_a_model_that_samples_from_one_image(demo):
    forked.run(
        "flashi2v-infer", "--model", "demo/model", "--image", "picture.png",
        "--prompt", "it moves to the right", "-o", "one.mp4", "--strip", "one.png", "--seed", 1,
        "--num-frames", 9, "--height", 32, "--width", 48, "--num-inference-steps", 2, "--device", "cpu",
        cwd=demo, check=True,
    )  # fmt: skip
    assert read_frames(demo / "one.mp4", range(9)).shape == (9, 32, 48, 3)
    assert Image.open(demo / "one.png").width > 500


def test_the_references_configuration_samples_the_run(demo):
    (demo / "demo/image.txt").write_text("picture.png\n" * 2)
    (demo / "demo/prompt.txt").write_text("it moves to the right\nit stays where it is\n")
    forked.run("flashi2v-infer", "--mm-model", "examples/demo_model/inference_model.json", cwd=demo, check=True)
    for number in range(2):
        assert read_frames(demo / f"demo/samples/video_{number}.mp4", range(17)).shape == (17, 64, 64, 3)
        assert json.loads((demo / f"demo/samples/video_{number}.json").read_text())["first_frame_psnr"] > 0


def test_the_demo_goes_on_only_where_it_was_the_same(demo):
    script = demo / "examples/demo_model/run.py"
    done = subprocess.run([sys.executable, script, "--shorter", "100"], cwd=demo, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("demo/ is there from something else: move it away or remove it")


def test_every_lever_is_one_of_the_trainer(demo):
    """Each changes the files and options as they are now; what they say is read, and nothing is trained."""
    script = """
import sys
from pathlib import Path
from flashi2v_train.launcher import app
sys.path.insert(0, "examples/demo_model")
import time_to_quality as bench
for lever in bench.LEVERS:
    words = bench.command(lever, bench.SEED, Path("lever"))
    app([*words[1:], "--dry-run"], result_action="return_value")
"""
    done = command(demo, "python", "-c", script)
    assert done.stdout.count("samples per step: 8") == 15
    assert done.stdout.count("samples per step: ") == 17


def test_quick_convolutions_are_those_of_the_vae(demo):
    script = """
import sys
import torch
sys.path.insert(0, "examples/demo_model")
import encoders
torch.manual_seed(0)
vae, latents = encoders.start_vae(), torch.randn(1, 16, 3, 4, 4)
for name, parameter in vae.named_parameters():
    if name.startswith(encoders.COARSEST) and parameter.ndim == 5:
        torch.nn.init.normal_(parameter, std=0.1)  # all taps of time
with torch.no_grad():
    plain = vae.decode(latents).sample
    encoders.WanCausalConv3d.forward = encoders.quick_convolution
    torch.testing.assert_close(vae.decode(latents).sample, plain, atol=1e-4, rtol=1e-4)
    latents[:, :, 0] += 1
    assert (vae.decode(latents).sample - plain)[:, :, -4:].abs().max() > 0.01  # it sees two latents before
"""
    command(demo, "python", "-c", script)


def test_files_of_another_size_say_so_everywhere(demo):
    script = """
import sys
sys.path.insert(0, "examples/demo_model")
import run
from flashi2v_data.curation.config import FilterConfig
from flashi2v_data.settings import load_config, read_values
for sitting in (run.QUICK, run.LONG):
    model, data, filtering = run.write_files(sitting)
    wanted, settings = load_config(filtering, FilterConfig), read_values(data)["dataset_param"]
    print(wanted.sample_height, wanted.min_hxw, settings["sample_width"], settings["sample_height"])
    print(settings["transform_pipeline"]["video"][0]["param"]["transform_size"], data, filtering)
    print(read_values(model)["predictor"]["patch_size"], sitting.patch, model)
"""
    assert command(demo, "python", "-c", script).stdout.splitlines() == [
        "64 4096 64 64",
        "[64, 64] examples/demo_model/data.json examples/demo_model/filter_config.yaml",
        "[1, 2, 2] 2 examples/demo_model/pretrain_model.json",
        "96 9216 96 96",
        "[96, 96] demo/data.json demo/filter_config.yaml",
        "[1, 1, 1] 1 demo/pretrain_model.json",
    ]


def test_minutes_to_quality_are_measured(demo):
    script = "examples/demo_model/time_to_quality.py"
    done = command(demo, "python", script, "--levers", "not compiled", "--minutes", 0.02, "--scenes", 2)
    assert "| not compiled, seed 1024 |" in done.stdout
    (looks,) = json.loads((demo / "demo/quality/quality.json").read_text()).values()
    assert looks[-1]["minutes"] > 0
    assert looks[-1]["first_frame_db"] > 14
