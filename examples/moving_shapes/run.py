"""From nothing to new videos: the moving-shapes demo.

    python examples/moving_shapes/run.py            # minutes on two CPU cores
    python examples/moving_shapes/run.py --full     # hours: how the model of `flashi2v-infer --model demo` was made

Run from the repository's root. Every step is a command that a user would type; what they leave is in demo/. A run that
was stopped goes on where it was when it is started again.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot
from PIL import Image

from flashi2v_data import read_frames
from flashi2v_data.video.strips import film_strip, stack
from flashi2v_infer import demo

HERE = Path("examples/moving_shapes")
DEMO = Path("demo")
MODEL, DATA = HERE / "pretrain_model.json", HERE / "data.json"
SIZE, FRAMES = "64x64", 17


def run(*command: object) -> None:
    """Run a console script of this environment, shown as one would type it; where it fails, so does the demo."""
    words = [str(word) for word in command]
    print(f"\n$ {shlex.join(words)}", flush=True)
    if code := subprocess.run([Path(sys.executable).with_name(words[0]), *words[1:]]).returncode:
        sys.exit(code)


def run_unless(made: Path, *command: object) -> None:
    """Run a command whose output, which appears whole or not at all, is not there yet."""
    if not made.exists():
        run(*command)


def get_encoders(options: argparse.Namespace) -> None:
    """Train VAE and text encoder, or take those of the model that comes with flashi2v-infer."""
    encoders = DEMO / "encoders"
    if options.full:
        fast = ["--bf16"] if options.fast else []
        script = HERE / "train_encoders.py"
        run_unless(encoders / "vae", "python", script, "--output", encoders, "--device", options.device, *fast)
        return
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(demo.DIRECTORY / part, encoders / part, dirs_exist_ok=True)


def make_features(options: argparse.Namespace) -> None:
    """Make and filter videos, and encode them."""
    run_unless(
        DEMO / "shapes",
        *("flashi2v-data", "shapes", DEMO / "shapes", "--num", options.videos),
        *("--size", SIZE, "--frames", FRAMES, "--pairs", "seen"),
    )
    run_unless(DEMO / "store", "flashi2v-data", "filter", "--filter_config", HERE / "filter_config.yaml")
    processes = 2 if options.device == "cpu" else 1  # one clip is too small for the threads of one
    run(
        *("flashi2v-encode", "--mm-model", model_file(options), "--mm-data", DATA, "--output", DEMO / "features"),
        *("--device", options.device, "--nproc-per-node", processes),
    )


def train(options: argparse.Namespace) -> None:
    """Train the transformer, in one sitting or more: each starts from the averaged weights of the one before."""
    fast = ["--bf16", "--compile"] if options.fast else ["--no-bf16"]
    start = None
    for number, steps in enumerate(options.steps, 1):
        last = number == len(options.steps)
        save = DEMO / ("run" if last else f"run_{number}")
        if number == 1:
            rate = ("--lr", 1.5e-3, "--lr-decay-style", "WSD", "--lr-wsd-decay-style", "linear")
            rate += ("--lr-wsd-decay-iters", steps // 4)
        else:
            rate = ("--lr", 1e-3, "--lr-decay-style", "linear")
        run(
            *("flashi2v-train", "--mm-model", model_file(options, start), "--mm-data", DATA, "--save", save),
            *("--train-iters", steps, "--device", options.device, "--micro-batch-size", 32),
            *(*rate, "--lr-warmup-iters", min(100, steps // 10), "--proj-lr-scale", 5, "--adam-beta2", 0.99),
            *("--ema-decay", 0.998 if options.full else 0.98, "--save-interval", 1000, "--keep-checkpoints", 2, *fast),
        )
        start = convert(save, DEMO / ("model" if last else f"model_{number}")) / "transformer"


def model_file(options: argparse.Namespace, start: Path | None = None) -> Path:
    """Return the model's config, as it is or with what this run changes: the VAE in bf16, weights to start from."""
    changes = {}
    if options.fast:
        changes['"dtype": "fp32", # of the VAE'] = '"dtype": "bf16",'
    if start:
        name = '"model_id": "flashi2vdit",'
        changes[name] = f'{name}\n        "from_pretrained": "{start}",'
    if not changes:
        return MODEL
    text = MODEL.read_text()
    for old, new in changes.items():
        assert text.count(old) == 1, f"{MODEL} no longer says {old}"
        text = text.replace(old, new)
    made = DEMO / (f"{start.parent.name}_go_on.json" if start else MODEL.name)
    made.write_text(text)
    return made


def convert(trained: Path, model: Path) -> Path:
    """Make a model of a run, for flashi2v-infer."""
    run_unless(
        model,
        *("flashi2v-model", "convert", trained, model, "--to", "diffusers", "--encoders", DEMO / "encoders"),
        *("--dtype", "fp16", "--shift", 3),
    )
    return model


def sample(num_videos: int) -> None:
    """Sample from scenes that training did not see, and draw film strips of what came of them."""
    shutil.rmtree(DEMO / "held_out", ignore_errors=True)
    run(
        *("flashi2v-data", "shapes", DEMO / "held_out", "--num", num_videos),
        *("--seed", 2, "--size", SIZE, "--frames", FRAMES),
    )
    records = json.loads((DEMO / "held_out/videos.json").read_text())
    for number, record in enumerate(records):
        frame = read_frames(DEMO / "held_out" / record["path"], [0])[0]
        Image.fromarray(frame).save(DEMO / f"held_out/first_frame_{number}.png")
    (DEMO / "prompt.txt").write_text("".join(f"{record['cap']}\n" for record in records))
    (DEMO / "image.txt").write_text(
        "".join(f"{DEMO}/held_out/first_frame_{number}.png\n" for number in range(num_videos))
    )
    run("flashi2v-infer", "--mm-model", HERE / "inference_model.json")
    draw_strips(records)


def draw_strips(records: list[dict]) -> None:
    """Put condition, generated frames and the real video side by side, one picture per video and one of all."""
    strips = []
    for number, record in enumerate(records):
        truth = read_frames(DEMO / "held_out" / record["path"], range(FRAMES))
        generated = read_frames(DEMO / f"videos/video_{number}.mp4", range(FRAMES))
        strip = film_strip(truth[0], generated, truth, tile_height=96)
        strip.save(DEMO / f"strip_{number}.png")
        strips.append(strip)
    stack(strips).save(DEMO / "film_strips.png")


def draw_loss() -> tuple[float, float]:
    """Plot the loss, and write it down; return its mean over the first and last tenth of the steps, at most 100."""
    logs = [*sorted(DEMO.glob("run_*/metrics.jsonl")), DEMO / "run/metrics.jsonl"]
    metrics = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    loss = np.array([line["loss"] for line in metrics])
    window = min(100, max(1, len(loss) // 10))
    lines = (f"{step + 1},{loss[step : step + 20].mean():.4f}\n" for step in range(0, len(loss), 20))
    (DEMO / "loss.csv").write_text(f"first_step,mean_loss_of_20\n{''.join(lines)}")
    smooth = np.convolve(loss, np.ones(window) / window, mode="valid")
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(np.arange(len(loss)) + 1, loss, color="0.8", label="step")
    axes.plot(np.arange(len(smooth)) + window, smooth, label=f"mean of {window} steps")
    axes.set(xlabel="step", ylabel="loss", yscale="log", title="FlashI2V on moving shapes")
    axes.legend()
    figure.savefig(DEMO / "loss.png", dpi=120)
    return float(loss[:window].mean()), float(loss[-window:].mean())


def claim_directory(options: argparse.Namespace) -> None:
    """Note in demo/ how it is made, and stop where it is being made in another way."""
    told, note = json.dumps(vars(options)), DEMO / "recipe.json"
    if DEMO.exists() and (not note.exists() or note.read_text() != told):
        sys.exit(f"{DEMO}/ is there from something else: move it away or remove it, then run again")
    DEMO.mkdir(exist_ok=True)
    note.write_text(told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="train the encoders, too, and everything for long")
    parser.add_argument("--videos", type=int, help="training videos (default: 800, of --full 5000)")
    parser.add_argument(
        "--steps", type=int, nargs="+", help="training steps of each sitting (default: 800, of --full 3500 6500)"
    )
    parser.add_argument("--samples", type=int, default=6, help="videos to sample (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="to train on: cpu, cuda or npu (default: %(default)s)")
    parser.add_argument(
        "--fast", action="store_true", help="bf16 and compiled: for CPUs with AMX or GPUs, and a C++ compiler"
    )
    options = parser.parse_args()
    options.videos = options.videos or (5000 if options.full else 800)
    options.steps = options.steps or ([3500, 6500] if options.full else [800])
    claim_directory(options)

    started = time.monotonic()
    get_encoders(options)
    make_features(options)
    train(options)
    sample(options.samples)
    first, last = draw_loss()
    if options.full:
        found = DEMO / "evaluation"
        run_unless(found, "python", HERE / "evaluate.py", "--model", DEMO / "model", "--output", found)
    print(
        f"\ndemo/ holds model/, videos/, film_strips.png and loss.png.\n"
        f"loss {first:.3f} -> {last:.3f} in {sum(options.steps)} steps; "
        f"{time.monotonic() - started:.0f} s in all"
    )


if __name__ == "__main__":
    main()
