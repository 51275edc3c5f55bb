"""Forty clips as people have them, through `meta`, `init --lora`, `run.sh`, an interrupt, and `run.sh` again."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cold
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from flashi2v_data import DataConfig, FilterConfig, load_config, open_store, read_frames
from flashi2v_data.loading.buckets import resolve
from flashi2v_data.video.probe import probe
from flashi2v_train.config import TrainModelConfig

MAKE_CLIPS = Path(__file__).parents[1] / "own_videos/make_clips.py"
SCRIPTS = Path(sys.executable).parent
STEPS = 100


def command(directory: Path, *words: object, code: int = 0) -> str:
    """Return what an installed script prints; of one that fails, the last line."""
    done = cold.command(directory, *words, code=code)
    return done.stdout if code == 0 else done.stderr.splitlines()[-1]


def start(place: Path, run: str = "runs/mine") -> subprocess.Popen[str]:
    path = f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        ["bash", f"{run}/run.sh"], cwd=place, env={**os.environ, "PATH": path}, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # tests may run in the background
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def init(place: Path, run: str, *words: object) -> str:
    return command(
        place, "flashi2v-train", "init", run, "--videos", "meta.json", "--from", "demo", "--size", "48x64",
        "--frames", 9, "--device", "cpu", "--memory", 4, *words,
    )  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A directory in which forty clips became the files of a run."""
    place = tmp_path_factory.mktemp("own")
    command(place, "python", MAKE_CLIPS, "clips")
    told = command(place, "flashi2v-data", "meta", "clips", "-o", "meta.json")
    assert "no caption: clips/clip_07.mkv" in told
    assert "39 clips in meta.json, 1 without a caption and 0 unreadable left out" in told
    said = init(place, "runs/mine", "--lora", "--train-iters", STEPS)
    assert "videos       39 with captions, 38 opened: 96x96 to 192x108, 16 to 30 fps" in said
    assert "cannot be read:\n  clips/clip_05.mp4" in said
    assert "samples      9 frames of 48x64 at 16 fps: 38 of the opened clips fit, 3 of them are held out" in said
    assert "words        20 are new to the model: round, 色, " in said
    assert said.endswith("now: bash runs/mine/run.sh\n")
    return place


def test_the_files_are_those_of_the_reference_and_short(place, monkeypatch):
    monkeypatch.chdir(place)
    run = Path("runs/mine")
    limits = load_config(run / "filter.yaml", FilterConfig)
    data, model = load_config(run / "data.json", DataConfig), load_config(run / "model.json", TrainModelConfig)
    assert (limits.sample_num_frames, limits.train_fps, data.dataset_param.held_out_clips) == (9, 16, 3)
    assert model.predictor.from_pretrained == "runs/mine/base/transformer"
    for name in ("filter.yaml", "data.json", "model.json", "run.sh"):
        assert len((run / name).read_text().splitlines()) < 65, name
    assert Image.open(run / "first_frame.png").size[0] >= 96


def test_buckets_are_proposed_for_a_mixed_set_and_found_in_its_store(place, monkeypatch):
    monkeypatch.chdir(place)
    Image.new("RGB", (120, 90), "red").save("clips/image.png")
    Path("clips/image.txt").write_text("a large red star")
    said = command(
        place, "flashi2v-train", "init", "runs/mixed", "--videos", "clips", "--from", "demo", "--buckets",
        "--device", "cpu", "--memory", 4,
    )  # fmt: skip
    Path("clips/image.png").unlink()
    assert "1 images among them are clips of one frame" in said
    proposed = dict(line.split()[1:3] for line in said.splitlines() if line.startswith("  bucket "))
    assert len(proposed) > 1
    run = Path("runs/mixed")
    assert load_config(run / "filter.yaml", FilterConfig).sample_num_frames == 1
    command(place, "flashi2v-data", "filter", "--filter_config", run / "filter.yaml")
    data = load_config(run / "data.json", DataConfig).dataset_param
    assert data.buckets == "auto"
    found = resolve(data).buckets
    assert {f"{bucket}:" for bucket in found if not bucket.is_image} == {*proposed}
    assert all(bucket.num_frames <= data.sample_num_frames for bucket in found)


def test_the_small_model_knows_the_words_of_the_captions(place):
    from transformers import AutoTokenizer

    from flashi2v_infer import demo

    base = place / "runs/mine/base"
    tokenizer = AutoTokenizer.from_pretrained(base / "tokenizer")
    caption = (place / "clips/clip_02.txt").read_text("utf-8").strip()
    chinese = tokenizer(caption).input_ids
    assert len(chinese) == len(caption) + 1 > 12  # a letter is a word, and the end
    assert tokenizer.unk_token_id not in chinese
    old = AutoTokenizer.from_pretrained(demo.DIRECTORY / "tokenizer")
    known = "the large star moves quickly to the upper right"
    assert tokenizer(known).input_ids == old(known).input_ids
    ours, theirs = (load_file(directory / "text_encoder/model.safetensors") for directory in (base, demo.DIRECTORY))
    rows, known_rows = ours.pop("shared.weight"), theirs.pop("shared.weight")
    assert len(rows) == len(known_rows) + 20
    assert torch.equal(rows[: len(known_rows)], known_rows)
    assert torch.pdist(rows).min() > 0.1
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def turned(video: Path) -> float:
    """Return by how many degrees the shape goes round the middle; that of the clips goes 180 in 9 frames."""
    frames = read_frames(video, range(9)).astype(float)
    away = np.abs(frames - np.median(frames, axis=(1, 2), keepdims=True)).sum(-1)
    away[away < 60] = 0
    y, x = np.indices(away.shape[1:])
    centre = ((x + 1j * y) * away).sum((1, 2)) / away.sum((1, 2))
    angle = np.unwrap(np.angle(centre - (away.shape[2] - 1 + 1j * (away.shape[1] - 1)) / 2))
    return float(np.degrees(angle[-1] - angle[0]))


def test_one_command_trains_a_motion_and_goes_on_after_an_interrupt(place):
    run = place / "runs/mine"
    first = start(place)
    while not (run / "train/metrics.jsonl").exists() and first.poll() is None:
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGINT)
    output = first.communicate()[0]
    assert first.returncode != 0, output
    assert not (run / "lora.safetensors").exists()
    before = (run / "store/report.txt").stat().st_mtime_ns
    again = start(place)
    output = again.communicate()[0]
    assert again.returncode == 0, output
    assert (run / "store/report.txt").stat().st_mtime_ns == before, "filtered once"
    assert len(open_store(run / "store")) == 38
    steps = [json.loads(line)["step"] for line in (run / "train/metrics.jsonl").read_text().splitlines()]
    assert steps == [*range(1, STEPS + 1)]
    info = probe(run / "sample.mp4")
    assert (info.num_frames, info.height, info.width, info.fps) == (9, 48, 64, 16)
    for picture in ("sample.png", "train/train_loss.png", "train/validation.png"):
        with Image.open(run / picture) as image:
            assert np.asarray(image.convert("L")).std() > 0
    assert f"before training  at step {STEPS}  real clips" in output
    assert "flashi2v-infer --model runs/mine/base --lora runs/mine/lora.safetensors --image" in output.splitlines()[-1]
    assert all(key.startswith("diffusion_model.") for key in load_file(run / "lora-comfyui.safetensors"))
    assert not (run / "model").exists()
    without = shlex.split(output.splitlines()[-1].replace("--lora runs/mine/lora.safetensors", ""))
    without[without.index("-o") + 1] = "without.mp4"
    command(place, *without)
    assert turned(run / "sample.mp4") > 30
    assert abs(turned(place / "without.mp4")) < 15


def test_all_weights_become_a_model(place):
    init(place, "runs/whole", "--train-iters", 2)
    for part in ("store", "features"):  # what the steps before training have made
        shutil.copytree(place / "runs/mine" / part, place / "runs/whole" / part)
    run = start(place, "runs/whole")
    output = run.communicate()[0]
    assert run.returncode == 0, output
    assert (place / "runs/whole/model/model_index.json").is_file()
    assert probe(place / "runs/whole/sample.mp4").num_frames == 9
    assert "flashi2v-infer --model runs/whole/model --image" in output.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--videos", "empty"), "holds no video"),
        (("--videos", "latin"), "line 1: is not UTF-8; save it as UTF-8"),
        (("--size", "50x64"), "height 50 is not divisible by 16: use 48 or 64"),
        (("--frames", "6"), "must be 4k + 1 for the VAE: use 5 or 9"),
        (("--memory", "0.01"), "one sample takes"),
        (("--from", "nowhere"), "no such directory; name one, a hub id"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(place, words, expected):
    (place / "empty").mkdir(exist_ok=True)
    (place / "latin").mkdir(exist_ok=True)
    (place / "latin/a.mp4").write_bytes(b"")
    (place / "latin/a.txt").write_bytes(b"caf\xe9")
    options = {"--videos": "meta.json", "--from": "demo", "--device": "cpu", "--memory": "4", **dict([words])}
    arguments = [word for pair in options.items() for word in pair]
    assert expected in command(place, "flashi2v-train", "init", "runs/other", *arguments, code=2)
    assert not (place / "runs/other").exists()
    assert not [*place.glob("runs/.other*")]
