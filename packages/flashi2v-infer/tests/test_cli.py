"""The console script, on real files."""

import json
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

import forked
import numpy as np
import pytest
from PIL import Image

from flashi2v_data import read_frames
from flashi2v_infer import cli, read_record

TINY = ["--num-frames", "5", "--height", "32", "--width", "48", "--num-inference-steps", "2", "--fps", "8"]
IMPORTING = "INFO importing torch and diffusers, which takes seconds"
run_script = partial(forked.run, "flashi2v-infer")


def frames(path: str) -> np.ndarray:
    return read_frames(path, range(5))


@pytest.fixture
def rejected(monkeypatch, capsys):
    """Run the command in this process, expect exit code 2 and nothing written; return the line of the error."""

    def run(*arguments: object) -> str:
        before = sorted(Path().rglob("*"))
        monkeypatch.setattr(sys, "argv", ["flashi2v-infer", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        assert (exit_.value.code, captured.out) == (2, "")
        assert sorted(Path().rglob("*")) == before
        *before_it, line = captured.err.splitlines()
        assert before_it in ([], [IMPORTING])  # what only the libraries can tell is told after they are imported
        return line

    return run


def test_a_batch_and_its_first_video_alone(job, model_directory):
    done = run_script("--mm-model", job(), "--seed", "7")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "wrote 2 videos and video_grid.mp4 to samples\n"
    # stderr is no terminal: no progress bar, and no library's chatter.
    importing, *lines = done.stderr.splitlines()
    assert importing == IMPORTING
    assert [line[:26] for line in lines] == [f"INFO video {i}: first frame " for i in (0, 1)]
    names = ["video_0.json", "video_0.mp4", "video_1.json", "video_1.mp4", "video_grid.mp4"]
    assert sorted(path.name for path in Path("samples").iterdir()) == names

    first, second, grid = (frames(f"samples/video_{name}.mp4") for name in ("0", "1", "grid"))
    assert first.shape == (5, 32, 48, 3)
    assert grid.shape == (5, 32, 96, 3)
    assert np.abs(grid[:, :, :48].astype(int) - first).mean() < 3
    assert np.abs(grid[:, :, 48:].astype(int) - second).mean() < 3
    assert np.abs(first.astype(int) - second).mean() > 6

    record = json.loads(Path("samples/video_1.json").read_text())
    assert record["prompt"] == "a dark object, it stands still"
    assert (record["image"], record["seed"], record["index"], record["fps"]) == ("second.jpg", 7, 1, 8)
    assert record["settings"]["num_inference_steps"] == 2
    assert 0 < record["first_frame_psnr"] < 100
    assert record["versions"]["flashi2v-infer"] == cli.__version__

    alone = run_script(
        "--model", model_directory, "--image", "first.png", "--prompt", "a red circle moves left", "-o", "new/cat.mp4",
        "--seed", "7", "--strip", "new/cat.png", "--dtype", "fp32", "--device", "cpu", *TINY,
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    assert np.array_equal(frames("new/cat.mp4"), first)
    assert sorted(path.name for path in Path("new").iterdir()) == ["cat.json", "cat.mp4", "cat.png"]
    with Image.open("new/cat.png") as strip:
        assert strip.width > 5 * 240
    ours, theirs = (json.loads(Path(path).read_text()) for path in ("new/cat.json", "samples/video_0.json"))
    # The weights are those of a directory here, and named part by part there.
    assert {key for key in ours if ours[key] != theirs[key]} == {"model", "model_settings", "weights"}


def test_prompts_are_preprocessed_when_the_file_says_so(job, monkeypatch):
    from flashi2v_data.settings import load_config
    from flashi2v_infer.commands.run import sample_batch
    from flashi2v_infer.config import InferenceConfig
    from flashi2v_infer.execution import Execution

    Path("prompts.txt").write_text("A Cat at http://cat.com\n")
    Path("images.txt").write_text("first.png\n")
    path = job(use_prompt_preprocess=True, predictor={"dtype": "bf16", "use_fused_rmsnorm": False})
    sample_batch(load_config(path, InferenceConfig), Execution())
    record = json.loads(Path("samples/video_0.json").read_text())
    assert (record["prompt"], record["dtype"], record["seed"]) == ("a cat at", "bfloat16", 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "y", "--resume"], "--resume: only together with --mm-model"),
        ([], "give one of --mm-model FILE (a batch) and --model DIR (one video)"),
        (["--mm-model", "x.json", "--model", "y"], "give one of --mm-model FILE"),
        (["--mm-model", "x.json", "--prompt", "a cat", "--num-frames", "9"], "--prompt, --num-frames: not together"),
        (["--mm-model", "x.json"], "x.json: no such file"),
        (["--model", "y"], "--model also needs --image, --prompt, --output"),
        (["--model", "y", "--image", "first.png", "--prompt", "a cat"], "--model also needs --output"),
        (["--model", "demo", "--resume"], "--resume: only together with --mm-model"),
        (["--modle", "y"], "--modle"),
        (["--model", "y", "--dtype", "int8"], "int8"),
        (["--model", "y", "--height", "tall"], "tall"),
    ],
)
def test_wrong_usage_is_one_line(rejected, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in rejected(*arguments)


ONE = {"--model": "{model}", "--image": "first.png", "--prompt": "a cat", "-o": "cat.mp4", "--device": "cpu"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--height": 50}, "height must be divisible by 16, got 50: use 48 or 64"),
        ({"--num-frames": 50}, "num_frames must be 4k + 1, got 50: use 49 or 53"),
        ({"--fps": 0}, "fps must be positive, got 0"),
        ({"--guidance-scale": 1, "--negative-prompt": "dark"}, "negative_prompt has no effect"),
        ({"-o": "cat.avi"}, "--output: cat.avi must end in .mp4, .gif or .webp, or in / for a directory of PNGs"),
        ({"-o": "photo.mp4"}, "--output: photo.json holds no record of a sampled video: the video's record would go"),
        ({"-o": "cat.gif", "--fps": 60}, "--fps: .gif shows at most 50 frames per second, got 60"),
        ({"--strip": "cat.jpg"}, "--strip: cat.jpg must end in .png"),
        ({"--image": "cat.png"}, "--image: cat.png: no such file"),
        ({"--image": "prompts.txt"}, "--image: prompts.txt: not an image of a known format"),
        ({"--strip": "./first.png"}, "--strip: first.png is the image itself, which would be lost"),
        ({"--image": "first.webp", "-o": "first.webp"}, "--output: first.webp is the image itself"),
        ({"--model": "nowhere"}, "--model: no directory 'nowhere'"),
        ({"--model": "{model}/vae"}, "holds no model_index.json"),
        ({"--model": "broken"}, "--model: cannot load FlashI2VTransformer3DModel from 'broken'"),
        (
            {"--model": "foreign"},
            "--model: foreign does not fit the transformer: missing learnable_proj.proj.0.weight",
        ),
        ({"--device": "npu"}, "device 'npu': torch_npu is not installed"),
        ({"--device": "tpu"}, "unknown device type 'tpu'"),
    ],
)
def test_one_video_that_cannot_be_sampled_is_one_line(rejected, job, model_directory, changes, message):
    Path("photo.json").write_text("somebody's")
    with Image.open("first.png") as picture:
        picture.save("first.webp")
    for name in ("broken", "foreign"):
        if name in changes.values():
            _copy_model(model_directory, Path(name), with_weights=name == "foreign")
    options = {key: str(value).format(model=model_directory) for key, value in {**ONE, **changes}.items()}
    assert message in rejected(*(word for option in options.items() for word in option))


def _copy_model(source: Path, target: Path, *, with_weights: bool) -> None:
    """A pipeline whose transformer lacks its weights, or one of them."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    weights = target / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    weights.unlink()
    if with_weights:
        del tensors["learnable_proj.proj.0.weight"]
        save_file(tensors, weights, {"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_prompt_preprocess": True, "prompt": "links.txt"}, "links.txt line 2: nothing is left of 'http://a.com'"),
        ({"fsp": 16}, "inference_model.json: fsp: unknown key, did you mean 'fps'?"),
        ({"seed": "seven"}, 'inference_model.json: seed: input should be a valid integer, got "seven"'),
        ({"prompt": "first.png"}, "prompt: first.png, line 1: is not UTF-8"),
        ({"image": "prompts.txt"}, "prompts.txt line 1: a red circle moves left: no such file"),
        ({"image": "one.txt"}, "prompts.txt holds 2 prompts, one.txt holds 1 images"),
        ({"save_path": "first.png"}, "save_path: cannot write below"),
        ({"device": "npu"}, 'or choose another: "device": "auto" in the file, or --device auto'),
        ({"ae": "tokenizer"}, "ae.from_pretrained: cannot load AutoencoderKLWan"),
        ({"tokenizer": "nowhere"}, "tokenizer.from_pretrained: no directory"),
        ({"tokenizer": "vae"}, "tokenizer.from_pretrained: "),
        ({"text_encoder": "vae"}, "describes a model of"),
        ({"predictor": "vae"}, "these are the weights of a VAE"),
        ({"predictor": "nowhere"}, "no weights at"),
    ],
)
def test_a_batch_that_cannot_be_sampled_is_one_line(rejected, job, model_directory, changes, message):
    Path("one.txt").write_text("first.png\n")
    Path("links.txt").write_text("a cat\nhttp://a.com\n")
    for key in ("ae", "tokenizer", "text_encoder", "predictor"):
        if key in changes:
            changes = {key: {"from_pretrained": str(model_directory / changes[key])}}
    assert message in rejected("--mm-model", job(**changes))


def test_the_text_encoder_and_the_predictor_must_be_of_one_width(rejected, job):
    from transformers import UMT5Config, UMT5EncoderModel

    UMT5EncoderModel(
        UMT5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=4, is_encoder_decoder=False)
    ).save_pretrained("narrow")
    path = job(text_encoder={"from_pretrained": "./narrow"})
    assert "predictor.text_dim is 64, the text encoder's is 32" in rejected("--mm-model", path)


def test_the_strips_of_a_batch_go_into_a_directory(rejected, job):
    message = "--strip: cat.png: of a batch, name a directory"
    assert message in rejected("--mm-model", job(), "--strip", "cat.png")
    assert "--strip: cannot write below" in rejected("--mm-model", job(), "--strip", "first.png/x")


def test_an_interrupted_batch_says_how_to_go_on(job):
    Path("prompts.txt").write_text(f"{'long ' * 200}\nshort\n")
    path = job(diffusion={"num_inference_steps": 100_000})
    process = forked.Command("flashi2v-infer", "--mm-model", path)
    while process.errors().count("\n") < 2 and process.poll() is None:  # of the prompt, which is cut: sampling begins
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert errors.endswith("interrupted: the same command with --resume goes on from here\n")
    assert process.returncode == 130
    assert list(Path("samples").iterdir() if Path("samples").exists() else []) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--model": "nowhere"}, "--model: no directory 'nowhere'"),
        ({"--device": "npu"}, "device 'npu': torch_npu is not installed"),
        ({"--offload": "group"}, "the device is the CPU"),
    ],
)
def test_a_dry_run_of_one_video_finds_what_a_run_would(rejected, job, model_directory, changes, message):
    job()
    options = {key: str(value).format(model=model_directory) for key, value in {**ONE, **changes}.items()}
    assert message in rejected("--dry-run", *(word for option in options.items() for word in option))


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"predictor": {"from_pretrained": "nowhere.pt"}}, [], "no weights at nowhere.pt"),
        ({"ae": {"from_pretrained": "/nowhere"}}, [], "ae.from_pretrained: no directory"),
        ({"text_encoder": {"from_pretrained": "/nowhere"}}, [], "text_encoder.from_pretrained: no directory"),
        ({"tokenizer": {"from_pretrained": "nowhere"}}, [], "tokenizer.from_pretrained: no directory"),
        ({"device": "npu"}, [], "device 'npu': torch_npu is not installed"),
        ({}, ["--low-memory"], "the device is the CPU"),
        ({}, ["--context-parallel-size", 5, "--ulysses-degree", 5], "without one of the 4 heads"),
        ({}, ["--context-parallel-size", 4, "--ulysses-degree", 3], "3 must divide the context_parallel_size of 4"),
        ({}, ["--guidance-parallel-size", 3], "guidance_parallel_size must be 1 or 2"),
        ({"image": "strips.txt"}, ["--strip", "strips"], "--strip: strips/video_1.png is the image itself"),
    ],
)
def test_a_dry_run_of_a_batch_finds_what_a_run_would(rejected, job, changes, options, message):
    Path("strips").mkdir()
    shutil.copy("first.png", "strips/video_1.png")
    Path("strips.txt").write_text("first.png\nstrips/video_1.png\n")
    assert message in rejected("--mm-model", job(**changes), "--dry-run", *options)


def test_help_shows_both_modes():
    done = run_script("--help")
    assert done.returncode == 0
    assert "flashi2v-infer --mm-model inference_model.json" in done.stdout
    assert "--low-freq-energy-ratio" in done.stdout


@pytest.mark.parametrize(("output", "prompt"), [("new dir/ä b.gif", "-5 degrees, “snow”"), ("frames/", "a\nb")])
def test_one_video_may_be_a_gif_or_a_directory_of_frames(job, model_directory, monkeypatch, capsys, output, prompt):
    Path("first.png").rename("ein bild ä.png")
    one = [
        "--model",
        model_directory,
        "--image",
        "ein bild ä.png",
        "--prompt",
        prompt,
        "-o",
        output,
        *TINY,
        "--scheduler",
        "heun",
    ]
    monkeypatch.setattr(sys, "argv", ["flashi2v-infer", *map(str, one), "--device", "cpu"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert (exit_.value.code, capsys.readouterr().out) == (0, f"wrote {output}\n")
    record = read_record(output)
    assert (record["prompt"], record["image"], record["fps"]) == (prompt, "ein bild ä.png", 8)
    assert record["model_settings"]["scheduler"]["_class_name"] == "FlowMatchHeunDiscreteScheduler"
    assert record["versions"]["flashi2v-infer"] == cli.__version__


def test_a_video_that_becomes_nan_is_a_failure_in_one_line(job, model_directory, monkeypatch, capsys, poisoned):
    model = Path("poisoned")
    shutil.copytree(model_directory, model)
    shutil.copy(poisoned / "model.safetensors", model / "text_encoder")
    one = ["--model", model, "--image", "first.png", "--prompt", "zebra", "-o", "a.mp4", *TINY, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["flashi2v-infer", *map(str, one)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 1
    _, line = capsys.readouterr().err.splitlines()
    assert line.startswith("flashi2v-infer: sampling ended in NaN or infinity")
    assert not Path("a.mp4").exists()
