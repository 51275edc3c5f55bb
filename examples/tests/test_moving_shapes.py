"""The whole way through the console scripts: videos, filter, training, a run turned into a model, new videos."""

import json
import subprocess
import sys
from pathlib import Path

import forked
import pytest
from cold import command
from PIL import Image

from flashi2v_data import read_frames
from flashi2v_data.video.probe import probe

EXAMPLES = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """A directory in which the demo ran, much shorter than `nox -s demo` runs it."""
    directory = tmp_path_factory.mktemp("checkout")
    (directory / "examples").symlink_to(EXAMPLES)
    script = "examples/moving_shapes/run.py"
    done = command(directory, "python", script, "--videos", 32, "--steps", 4, 2, "--samples", 2)
    assert "in 6 steps" in done.stdout.splitlines()[-1]
    return directory


def test_the_demo_leaves_videos_strips_and_the_loss_curve(demo):
    for number in range(2):
        video = demo / f"demo/videos/video_{number}.mp4"
        info = probe(video)
        assert (info.num_frames, info.height, info.width, info.fps) == (17, 64, 64, 16)
        record = json.loads(video.with_suffix(".json").read_text())
        assert record["first_frame_psnr"] > 0
    strips = Image.open(demo / "demo/film_strips.png")
    assert strips.height == 2 * Image.open(demo / "demo/strip_0.png").height
    assert Image.open(demo / "demo/loss.png").width > 500
    assert (demo / "demo/loss.csv").read_text().count("\n") == 2  # both sittings in one line of twenty
    steps = [json.loads(line)["step"] for line in (demo / "demo/run/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]


def test_a_run_becomes_a_model_that_samples_from_one_image(demo):
    forked.run(
        "flashi2v-infer", "--model", "demo/model", "--image", "demo/held_out/first_frame_0.png",
        "--prompt", "a red circle moves to the right", "-o", "one.mp4", "--strip", "one.png", "--seed", 1,
        "--num-frames", 9, "--height", 32, "--width", 48, "--num-inference-steps", 2, "--device", "cpu",
        cwd=demo, check=True,
    )  # fmt: skip
    assert read_frames(demo / "one.mp4", range(9)).shape == (9, 32, 48, 3)
    assert Image.open(demo / "one.png").width > 500


def test_training_resumes_where_the_demo_stopped(demo):
    done = forked.run(
        "flashi2v-train", "--mm-model", "examples/moving_shapes/pretrain_model.json",
        "--mm-data", "examples/moving_shapes/data.json", "--save", "demo/run", "--train-iters", 3,
        "--micro-batch-size", 32, "--device", "cpu", cwd=demo, check=True,
    )  # fmt: skip
    assert "resumed from demo/run/iter_0000002" in done.stderr
    assert (demo / "demo/run/latest_checkpointed_iteration.txt").read_text().strip() == "3"


def test_the_demo_goes_on_only_where_it_was_the_same(demo):
    script = demo / "examples/moving_shapes/run.py"
    done = subprocess.run([sys.executable, script, "--videos", "8"], cwd=demo, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("demo/ is there from something else: move it away or remove it")


@pytest.mark.slow
def test_a_model_is_evaluated(demo):
    command(
        demo, "python", "examples/moving_shapes/evaluate.py", "--model", "demo/model", "--output", "evaluation",
        "--scenes", 6, "--seeds", 2, "--num-inference-steps", 2,
    )  # fmt: skip
    found = json.loads((demo / "evaluation/evaluation.json").read_text())
    assert [(row["scene"], row["seed"]) for row in found["videos"]] == [(i, seed) for seed in (0, 1) for i in range(6)]
    # After four steps of training nothing moves as it should; what is real does.
    lines = (demo / "evaluation/report.md").read_text().splitlines()
    assert sum(line.endswith("| 100.0% |") for line in lines) == 7
    for picture in ("film_strips.png", "distributions.png"):
        assert Image.open(demo / "evaluation" / picture).width > 500
