"""The model that comes with the package: the picture decides how a video looks, the prompt how it moves."""

import json
import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from PIL import Image

from flashi2v_data import read_frames
from flashi2v_data.randomness import generator
from flashi2v_data.shapes.pictures import Background, Thing
from flashi2v_data.shapes.sentences import DIRECTIONS, Motion
from flashi2v_data.shapes.stories import UNITS, Stage, Story
from flashi2v_data.shapes.watching import watch
from flashi2v_infer import FlashI2VPipeline, demo
from flashi2v_infer.commands.sampler import psnr
from flashi2v_model.encoders import encode_video

SIZE, FRAMES = 96, 17
# The bundled image, from whose middle there is room to all sides.
SKY = Background("graded", ((110, 180, 235), (235, 240, 250)), angle=math.pi / 2)
CAR = Thing("car", ((215, 60, 50), (250, 225, 120), (45, 45, 55)), 0.2)
STORY = Story(SKY, (CAR,), ((0.5, 0.5),), (0,), (0.25, 0.0), Motion("right"), demo.PROMPT)
run_demo = partial(forked.run, "flashi2v-infer", "--model", "demo")


@pytest.fixture(scope="module")
def pipeline() -> FlashI2VPipeline:
    loaded = FlashI2VPipeline.from_pretrained(demo.DIRECTORY)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def sample(pipeline: FlashI2VPipeline, story: Story, prompts: list[str], seed: int = 0) -> np.ndarray:
    """Videos from a story's first frame, (B, T, H, W, 3)."""
    (videos,) = pipeline(
        image=[Stage(story, SIZE, SIZE).frame(0)] * len(prompts), prompt=prompts,
        generator=[generator(seed, "noise", 0, i) for i in range(len(prompts))], output_type="np", return_dict=False,
    )  # fmt: skip
    return (videos * 255).round().astype(np.uint8)


def test_it_is_small():
    sizes = [path.stat().st_size for path in demo.DIRECTORY.rglob("*") if path.is_file()]
    assert sum(sizes) < 24e6


@torch.no_grad()
def test_latents_of_a_clip_are_those_of_every_fourth_frame(pipeline):
    """The network moves pictures; the decoder alone knows what lies between them."""
    film = torch.from_numpy(Stage(STORY, SIZE, SIZE).film(9)).permute(3, 0, 1, 2)[None] / 127.5 - 1
    whole = encode_video(pipeline.vae, film)
    alone = [encode_video(pipeline.vae, film[:, :, frame : frame + 1]) for frame in (0, 4, 8)]
    torch.testing.assert_close(whole, torch.cat(alone, 2), atol=0.05, rtol=0)  # in the weights' fp16
    assert (whole[:, :, 1] - whole[:, :, 0]).abs().max() > 1


def test_the_bundled_image_shows_a_story():
    assert np.array_equal(np.asarray(Image.open(demo.IMAGE)), Stage(STORY, 384, 384).frame(0))


def test_with_no_other_option_it_samples_the_bundled_image(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run_demo("--strip", "strip.png", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "wrote demo.mp4 and strip.png\n"
    assert "WARNING" not in done.stderr
    shown = read_frames("demo.mp4", range(FRAMES))
    assert shown.shape == (FRAMES, 384, 384, 3)
    shrunk = [np.asarray(Image.fromarray(frame).resize((SIZE, SIZE), Image.Resampling.BOX)) for frame in shown]
    seen = watch(np.stack(shrunk), STORY)
    assert seen.direction == "right"
    assert seen.background_jump < 6
    assert seen.background_change < 10
    record = json.loads(Path("demo.json").read_text())
    assert record["first_frame_psnr"] > 24
    assert record["settings"]["num_inference_steps"] == 6
    assert record["scale"] == 4


def test_one_picture_goes_where_the_prompt_says(pipeline):
    told = {
        **{f"it moves to the {name}" if " " in name or name in ("left", "right") else f"it moves {name}": name
           for name in DIRECTIONS},
        "it stays where it is": "still",
    }  # fmt: skip
    ways = {name: tuple(0.25 / math.hypot(*unit) * length for length in unit) for name, unit in UNITS.items()}
    right = 0
    for frames, direction in zip(sample(pipeline, STORY, [*told]), told.values()):
        story = replace(STORY, way=ways.get(direction, (0.0, 0.0)))
        seen = watch(frames, story)
        right += seen.direction == direction
        assert psnr(frames[0], Stage(story, SIZE, SIZE).frame(0)) > 24, direction
        assert seen.background_jump < 6, direction
        assert seen.background_change < 12, direction
    assert right >= len(told) - 1


def test_without_words_for_a_motion_the_picture_stays(pipeline):
    (frames,) = sample(pipeline, STORY, ["a picture"])
    seen = watch(frames, replace(STORY, way=(0.0, 0.0)))
    assert seen.direction == "still"
    assert seen.background_change < 10


def test_seeds_give_other_motions_where_words_leave_them_open(pipeline):
    ways = []
    for seed in range(4):
        (frames,) = sample(pipeline, STORY, ["it moves"], seed)
        ways.append(frames[-1].astype(float))
    apart = [np.abs(one - other).max() for i, one in enumerate(ways) for other in ways[:i]]
    assert min(apart) > 60  # the thing is elsewhere


def test_it_says_so_where_it_is_asked_for_more_than_it_knows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8)
    Image.fromarray(noise).save("photo.png")
    done = run_demo("--image", "photo.png", "--prompt", "a cat jumps up slowly", "-o", "cat.gif", "--device", "cpu",
                    "--num-inference-steps", 2)  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "wrote cat.gif\n")
    words, picture = [line for line in done.stderr.splitlines() if "demo model" in line]
    nearest = "'it moves slowly up'"
    assert words == f"WARNING the demo model cannot read cat, jumps; the nearest sentence that it knows: {nearest}"
    assert picture.startswith("WARNING the image is far from what the demo model knows")
    assert done.stderr.index("cannot read cat") < done.stderr.index("first frame")  # before anything is sampled


def test_an_image_without_words_shows_five_sentences():
    done = run_demo("--image", demo.IMAGE)
    assert done.returncode == 2
    assert all(sentence in done.stderr for sentence in demo.SENTENCES)
    assert len(demo.SENTENCES) == 5


@pytest.mark.parametrize(
    ("prompt", "nearest"),
    [
        ("the cat wanders leftward", "it moves to the left"),
        ("zooms to the upper rigth", "it moves quickly to the upper right"),
        ("a leaf falls gently", "it moves slowly down"),
        ("the dog freezes", "it stays where it is"),
        ("something", "it moves to the right"),
        ("the boat drifts up, the tree stays", "it moves slowly up"),
    ],
)
def test_the_nearest_sentence_tells_the_same_motion(prompt, nearest):
    assert demo.nearest_sentence(prompt) == nearest
    assert demo.prompt_note(nearest) is None


def test_known_sentences_are_of_known_words():
    assert {word for sentence in demo.SENTENCES for word in re.findall(r"\w+", sentence)} < demo.known_words()
    assert demo.prompt_note(demo.PROMPT.upper()) is None
