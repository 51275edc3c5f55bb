"""The model that comes with the package: what it samples must move as the prompt says."""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import forked
import numpy as np
import pytest
from PIL import Image

from flashi2v_data import read_frames
from flashi2v_data.randomness import generator
from flashi2v_data.shapes.scenes import DIRECTIONS, Scene, centres, render
from flashi2v_data.shapes.tracking import look, track
from flashi2v_infer import FlashI2VPipeline, demo
from flashi2v_infer.commands.sampler import psnr

# The bundled image; a pair of shape and colour that training did not show.
STAR = Scene("star", "pink", "large", "dark blue", "upper right", "quickly", 0.45 * 16 / 17, (0.0, 1.0))
run_demo = partial(forked.run, "flashi2v-infer", "--model", "demo")


@pytest.fixture(scope="module")
def pipeline() -> FlashI2VPipeline:
    loaded = FlashI2VPipeline.from_pretrained(demo.DIRECTORY)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_it_is_small():
    sizes = [path.stat().st_size for path in demo.DIRECTORY.rglob("*") if path.is_file()]
    assert sum(sizes) < 16e6


def test_the_bundled_image_and_prompt_are_of_one_scene():
    assert STAR.caption == demo.PROMPT
    assert np.array_equal(np.asarray(Image.open(demo.IMAGE)), render(STAR, 17, 64, 64, 16)[0])


def test_with_no_other_option_it_samples_the_bundled_image(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run_demo("--strip", "strip.png", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "wrote demo.mp4 and strip.png\n"
    assert "WARNING" not in done.stderr
    shown = read_frames("demo.mp4", range(17))
    assert shown.shape == (17, 384, 384, 3)
    video = np.stack([np.asarray(Image.fromarray(frame).resize((64, 64), Image.Resampling.BOX)) for frame in shown])
    motion = track(video, STAR)
    assert (motion.direction, motion.pace) == ("upper right", "quickly")
    assert np.linalg.norm(motion.path[0] - centres(STAR, 17, 64, 64, 16)[0]) < 3
    assert look(video[-1], STAR, motion.path[-1]) == ("star", "pink")
    record = json.loads(Path("demo.json").read_text())
    assert record["first_frame_psnr"] > 22
    assert record["settings"]["num_inference_steps"] == 25
    assert record["scale"] == 6


def test_one_image_moves_as_the_prompt_says(pipeline):
    scene = Scene("cross", "cyan", "medium", "brown", "still", "slowly", 0.0, (0.5, 0.5))
    scenes = [replace(scene, direction=direction) for direction in DIRECTIONS]
    image = render(scene, 1, 64, 64, 16)[0]
    (videos,) = pipeline(
        image=[image] * len(scenes), prompt=[told.caption for told in scenes],
        num_frames=17, height=64, width=64, num_inference_steps=25, guidance_scale=1.0,
        generator=generator(0, "noise", 0, 0), output_type="np", return_dict=False,
    )  # fmt: skip
    right = 0
    for frames, told in zip((videos * 255).round().astype(np.uint8), scenes):
        motion = track(frames, told)
        right += motion.direction == told.direction
        assert psnr(frames[0], image) > 20, told.caption
        assert look(frames[-1], told, motion.path[-1])[1] == "cyan"
    assert right >= len(scenes) - 1


def test_it_says_so_where_it_is_asked_for_more_than_it_knows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8)
    Image.fromarray(noise).save("photo.png")
    done = run_demo("--image", "photo.png", "--prompt", "a red cat moves up", "-o", "cat.gif", "--device", "cpu",
                    "--num-inference-steps", 2)  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "wrote cat.gif\n")
    words, picture = [line for line in done.stderr.splitlines() if "demo model" in line]
    nearest = demo.nearest_sentence("a red cat moves up")
    assert words == f"WARNING the demo model cannot read cat; the nearest sentence that it knows: {nearest!r}"
    assert {"red", "moves", "up"} <= {*nearest.split()}
    assert picture.startswith("WARNING the image is far from what the demo model knows")
    assert done.stderr.index("cannot read cat") < done.stderr.index("first frame")  # before anything is sampled


def test_an_image_without_words_shows_five_sentences():
    done = run_demo("--image", demo.IMAGE)
    assert done.returncode == 2
    assert all(sentence in done.stderr for sentence in demo.SENTENCES)
    assert len(demo.SENTENCES) == 5


def test_known_sentences_are_of_known_words():
    assert {word for sentence in demo.SENTENCES for word in re.findall(r"\w+", sentence)} < demo.known_words()
    assert demo.prompt_note(demo.PROMPT.upper()) is None
    assert "'a large" in demo.prompt_note("a huge star flies to the right")
