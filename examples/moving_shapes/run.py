"""From nothing to a new video in minutes: the moving-shapes demo.

    python examples/moving_shapes/run.py

Run from the repository's root.  Every step is a command that a user would type; what they leave is in demo/: the
sampled videos, a film strip of each (condition, generated frames, how the real video went on), and the loss curve.
"""

import argparse
import json
import shlex
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
from flashi2v_data.strips import film_strip

HERE = Path("examples/moving_shapes")
DEMO = Path("demo")
SIZE, FRAMES = "64x64", 9


def run(*command: object) -> None:
    """Run a console script of this environment, shown as one would type it."""
    words = [str(word) for word in command]
    print(f"\n$ {shlex.join(words)}", flush=True)
    subprocess.run([Path(sys.executable).with_name(words[0]), *words[1:]], check=True)


def prepare_held_out(num_videos: int) -> list[dict]:
    """Make scenes that training does not see; their first frames and captions are what is sampled from."""
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
    return records


def draw_strips(records: list[dict]) -> None:
    """Put condition, generated frames and the real video side by side, one picture per video and one of all."""
    strips = []
    for number, record in enumerate(records):
        truth = read_frames(DEMO / "held_out" / record["path"], range(FRAMES))
        generated = read_frames(DEMO / f"videos/video_{number}.mp4", range(FRAMES))
        strip = film_strip(truth[0], generated, truth, tile_height=96)
        strip.save(DEMO / f"strip_{number}.png")
        strips.append(strip)
    sheet = Image.new("RGB", (strips[0].width, sum(strip.height for strip in strips)), "white")
    for number, strip in enumerate(strips):
        sheet.paste(strip, (0, number * strip.height))
    sheet.save(DEMO / "film_strips.png")


def draw_loss() -> tuple[float, float]:
    """Plot the loss; return its mean over the first and last tenth of the run."""
    metrics = [json.loads(line) for line in (DEMO / "run/metrics.jsonl").read_text().splitlines()]
    loss = np.array([line["loss"] for line in metrics])
    window = max(1, len(loss) // 10)
    smooth = np.convolve(loss, np.ones(window) / window, mode="valid")
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(np.arange(len(loss)) + 1, loss, color="0.8", label="step")
    axes.plot(np.arange(len(smooth)) + window, smooth, label=f"mean of {window} steps")
    axes.set(xlabel="step", ylabel="loss", title="FlashI2V on moving shapes")
    axes.legend()
    figure.savefig(DEMO / "loss.png", dpi=120)
    return float(loss[:window].mean()), float(loss[-window:].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=800, help="training videos (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1200, help="training steps (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=6, help="videos to sample (default: %(default)s)")
    options = parser.parse_args()
    if DEMO.exists():
        sys.exit(f"{DEMO}/ exists: move it away or remove it, then run again")
    started = time.monotonic()

    run("flashi2v-data", "shapes", DEMO / "shapes", "--num", options.videos, "--size", SIZE, "--frames", FRAMES)
    run("flashi2v-data", "filter", "--filter_config", HERE / "filter_config.yaml")
    training_started = time.monotonic()
    run(
        *("flashi2v-train", "--mm-model", HERE / "pretrain_model.json", "--mm-data", HERE / "data.json"),
        *("--save", DEMO / "run", "--train-iters", options.steps, "--micro-batch-size", 16, "--device", "cpu"),
        *("--lr", 2e-3, "--lr-decay-style", "cosine", "--lr-warmup-iters", min(20, options.steps)),
        *("--proj-lr-scale", 3, "--adam-beta2", 0.99, "--ema-decay", 0.98, "--feature-cache-gib", 1),
    )
    training_seconds = time.monotonic() - training_started
    records = prepare_held_out(options.samples)
    run("flashi2v-infer", "--mm-model", HERE / "inference_model.json")

    draw_strips(records)
    first, last = draw_loss()
    print(
        f"\ndemo/ holds videos/, film_strips.png and loss.png.\n"
        f"loss {first:.3f} -> {last:.3f} in {options.steps} steps ({training_seconds:.0f} s); "
        f"{time.monotonic() - started:.0f} s in all"
    )


if __name__ == "__main__":
    main()
