"""A model whose picture decides how it looks, and whose words decide how it moves.

    python examples/demo_model/run.py            # minutes on two CPU cores, behind the encoders in weights/
    python examples/demo_model/run.py --full     # hours: everything from nothing, the encoders too

Run from the repository's root. Every step is a command that a user would type; what they leave is in demo/. Stopped
anywhere, it goes on where it was when it is started again.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from flashi2v_data.shapes.stories import Stage, sample_story

HERE = Path("examples/demo_model")
WEIGHTS = HERE / "weights"
RUN = Path("demo")
MODEL, DATA = HERE / "pretrain_model.json", HERE / "data.json"


@dataclass(frozen=True)
class Plan:
    """How much of everything.

    Attributes:
        videos: to train on.
        steps: of training.
        decay: of them, with a rate that falls to zero.
        ema: share of the averaged weights that stays at each step.
        scenes: to evaluate on.
        seeds: of each scene.
    """

    videos: int
    steps: int
    decay: int
    ema: float
    scenes: int
    seeds: int


QUICK, LONG = Plan(2400, 1200, 800, 0.99, 60, 1), Plan(12_000, 9600, 6800, 0.998, 200, 3)
# Each process computes on one core, and there is one process for each.
THREADS = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def run(*command: object) -> None:
    """Run a console script of this environment, shown as one would type it; where it fails, so does this one."""
    words = [str(word) for word in command]
    print(f"\n$ {shlex.join(words)}", flush=True)
    if code := subprocess.run([Path(sys.executable).with_name(words[0]), *words[1:]], env=THREADS).returncode:
        sys.exit(code)


def run_unless(made: Path, *command: object) -> None:
    """Run a command whose output, which appears whole or not at all, is not there yet."""
    if not made.exists():
        run(*command)


def get_encoders(options: argparse.Namespace) -> None:
    """Train VAE, tokenizer and text encoder, or take those that are here."""
    encoders = RUN / "encoders"
    if options.full:
        run(
            *("python", HERE / "encoders.py", "--output", encoders, "--device", options.device),
            *("--shorter", options.shorter, *(["--bf16"] if options.fast else [])),
        )
        return
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(WEIGHTS / part, encoders / part, dirs_exist_ok=True)


def make_features(plan: Plan, options: argparse.Namespace) -> None:
    """Make, filter and encode videos."""
    run_unless(
        RUN / "videos",
        *("flashi2v-data", "shapes", RUN / "videos", "--num", plan.videos),
        *("--captions", "motion", "--pairs", "seen", "--size", "64x64", "--frames", 17),
    )
    run_unless(RUN / "store", "flashi2v-data", "filter", "--filter_config", HERE / "filter_config.yaml")
    run(
        *("flashi2v-encode", "--mm-model", MODEL, "--mm-data", DATA, "--output", RUN / "features"),
        *("--device", options.device, "--nproc-per-node", options.processes),
    )


def training(steps: int, decay: int | None, ema: float) -> dict[str, object]:
    """Return the options of flashi2v-train that decide how the transformer learns.

    Args:
        steps: as of `Plan`.
        decay: as of `Plan`.
        ema: as of `Plan`.
    """
    return {
        "--start": "still",  # a video stays as its first frame is, so that motion is all there is to learn
        "--train-iters": steps,
        "--global-batch-size": 16,
        "--lr": 1.2e-3,
        "--lr-decay-style": "WSD",
        "--lr-wsd-decay-style": "linear",
        "--lr-wsd-decay-iters": decay,
        "--lr-warmup-iters": min(100, steps // 10),
        "--adam-beta2": 0.99,
        "--ema-decay": ema,
        "--no-use-distributed-optimizer": True,
        "--device": "cpu",
        "--nproc-per-node": 2,
        "--micro-batch-size": 8,
        "--save-interval": 500,
        "--keep-checkpoints": 2,
    }


def words_of(options: dict[str, object]) -> list[object]:
    """Return options as they are typed: True is a flag, and False and None leave one out."""
    given = {name: value for name, value in options.items() if value is not None and value is not False}
    return [word for name, value in given.items() for word in ([name] if value is True else [name, value])]


def train(plan: Plan, options: argparse.Namespace) -> None:
    """Train the transformer, and make a pipeline of it."""
    chosen = training(plan.steps, plan.decay, plan.ema) | {
        "--device": options.device,
        "--nproc-per-node": options.processes,
        "--micro-batch-size": 16 // options.processes,
        "--bf16" if options.fast else "--no-bf16": True,
    }
    run("flashi2v-train", "--mm-model", MODEL, "--mm-data", DATA, "--save", RUN / "training", *words_of(chosen))
    run_unless(
        RUN / "model",
        *("flashi2v-model", "convert", RUN / "training", RUN / "model", "--to", "diffusers"),
        *("--encoders", RUN / "encoders", "--dtype", "fp16"),
    )


def finish() -> None:
    """Give the model what previews and --speed need."""
    model, pictures = RUN / "model", RUN / "pictures"
    videos = sorted((RUN / "videos/videos").glob("0000*.mp4"))
    run_unless(model / "vae/preview.json", "python", "-m", "flashi2v_infer.preview", model / "vae", *videos)
    pictures.mkdir(exist_ok=True)
    for number in range(24):
        story = sample_story(77, number, 64, 64)
        Image.fromarray(Stage(story, 64, 64).frame(0)).save(pictures / f"{number:02d}.png")
        (pictures / f"{number:02d}.txt").write_text(story.caption)
    calibrated = model / "transformer/calibration.json"
    run_unless(calibrated, "flashi2v-model", "calibrate", model, "--pictures", pictures)


def claim_directory(options: argparse.Namespace) -> None:
    """Note in demo/ how it is made, and stop where it is being made in another way."""
    told, note = json.dumps(vars(options)), RUN / "recipe.json"
    if RUN.exists() and (not note.exists() or note.read_text() != told):
        sys.exit(f"{RUN}/ is there from something else: move it away or remove it, then run again")
    RUN.mkdir(exist_ok=True)
    note.write_text(told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="train the encoders, too, and the transformer for long")
    parser.add_argument("--device", default="cpu", help="to train on: cpu, cuda or npu (default: %(default)s)")
    parser.add_argument("--fast", action="store_true", help="compute in bf16: quick on GPUs, and on CPUs that have it")
    parser.add_argument("--processes", type=int, help="of encoding and training (default: 2 on a CPU, else 1)")
    parser.add_argument("--shorter", type=int, default=1, help="do 1/N of everything, to try it (default: %(default)s)")
    options = parser.parse_args()
    options.processes = options.processes or (2 if options.device == "cpu" else 1)
    claim_directory(options)
    whole = LONG if options.full else QUICK
    plan = replace(
        whole,
        videos=max(32, whole.videos // options.shorter),
        steps=max(2, whole.steps // options.shorter),
        decay=max(1, whole.decay // options.shorter),
        scenes=max(6, whole.scenes // options.shorter),
        seeds=whole.seeds if options.shorter == 1 else 1,
    )
    get_encoders(options)
    make_features(plan, options)
    train(plan, options)
    if options.full:
        finish()
    found = RUN / "evaluation"
    run_unless(
        found,
        *("python", HERE / "evaluate.py", "--model", RUN / "model", "--output", found),
        *("--scenes", plan.scenes, "--seeds", plan.seeds, "--device", options.device),
    )


if __name__ == "__main__":
    main()
