"""From nothing to a model whose picture decides how it looks, and whose words decide how it moves.

    python examples/demo_model/run.py                                  # hours on a CPU, minutes on a GPU
    python examples/demo_model/run.py --shorter 500                    # minutes: does everything, learns nothing

Run from the repository's root. Every step is a command that a user would type; what they leave is in run/. Stopped
anywhere, it goes on where it was when it is started again.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

HERE = Path("examples/demo_model")
RUN = Path("run")
MODEL, DATA = HERE / "model.json", HERE / "data.json"
VIDEOS, SITTINGS = 20_000, (6000, 10_000)


def run(*command: object) -> None:
    """Run a console script of this environment, shown as one would type it; where it fails, so does this one."""
    words = [str(word) for word in command]
    print(f"\n$ {shlex.join(words)}", flush=True)
    if code := subprocess.run([Path(sys.executable).with_name(words[0]), *words[1:]]).returncode:
        sys.exit(code)


def run_unless(made: Path, *command: object) -> None:
    """Run a command whose output, which appears whole or not at all, is not there yet."""
    if not made.exists():
        run(*command)


def make_data(options: argparse.Namespace) -> None:
    """Train the encoders; make, filter and encode videos."""
    run(
        *("python", HERE / "encoders.py", "--output", RUN / "encoders", "--device", options.device),
        *("--workers", options.workers, "--shorter", options.shorter, *(["--bf16"] if options.fast else [])),
    )
    run_unless(
        RUN / "videos",
        *("flashi2v-data", "shapes", RUN / "videos", "--num", max(32, VIDEOS // options.shorter)),
        *("--captions", "motion", "--pairs", "seen", "--size", "96x96", "--frames", 17),
    )
    run_unless(RUN / "store", "flashi2v-data", "filter", "--filter_config", HERE / "filter.yaml")
    processes = max(1, options.workers) if options.device == "cpu" else 1  # one clip is too small for many threads
    run(
        *("flashi2v-encode", "--mm-model", MODEL, "--mm-data", DATA, "--output", RUN / "features"),
        *("--device", options.device, "--nproc-per-node", processes),
    )


def train(options: argparse.Namespace) -> None:
    """Train the transformer in two sittings; the second starts from the averaged weights of the first."""
    fast = ["--bf16", "--compile"] if options.fast else ["--no-bf16"]
    start = None
    for number, steps in enumerate(SITTINGS, 1):
        steps = max(2, steps // options.shorter)
        save = RUN / f"training_{number}"
        if start is None:
            rate = ("--lr", 1.5e-3, "--lr-decay-style", "WSD", "--lr-wsd-decay-style", "linear")
            rate += ("--lr-wsd-decay-iters", max(1, steps // 4))
        else:
            rate = ("--lr", 1e-3, "--lr-decay-style", "linear")
        run(
            *("flashi2v-train", "--mm-model", going_on_from(start), "--mm-data", DATA, "--save", save),
            *("--train-iters", steps, "--device", options.device, "--micro-batch-size", 32),
            *(*rate, "--lr-warmup-iters", min(100, steps // 2), "--proj-lr-scale", 5, "--adam-beta2", 0.99),
            *("--ema-decay", 0.998, "--save-interval", 500, "--keep-checkpoints", 2, *fast),
        )
        model = RUN / ("model" if number == len(SITTINGS) else f"model_{number}")
        run_unless(
            model,
            *("flashi2v-model", "convert", save, model, "--to", "diffusers", "--encoders", RUN / "encoders"),
            *("--dtype", "fp16", "--shift", 3),
        )
        start = model / "transformer"


def going_on_from(weights: Path | None) -> Path:
    """Return the model's config, as it is or with weights to start from."""
    if weights is None:
        return MODEL
    name = '"model_id": "flashi2vdit",'
    text = MODEL.read_text()
    assert text.count(name) == 1
    made = RUN / "model_going_on.json"
    made.write_text(text.replace(name, f'{name}\n        "from_pretrained": "{weights}",'))
    return made


def claim_directory(options: argparse.Namespace) -> None:
    """Note in run/ how it is made, and stop where it is being made in another way."""
    told, note = json.dumps(vars(options)), RUN / "recipe.json"
    if RUN.exists() and (not note.exists() or note.read_text() != told):
        sys.exit(f"{RUN}/ is there from something else: move it away or remove it, then run again")
    RUN.mkdir(exist_ok=True)
    note.write_text(told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="to train on: cpu, cuda or npu (default: %(default)s)")
    parser.add_argument(
        "--fast", action="store_true", help="bf16 and compiled: for CPUs with AMX or GPUs, and a C++ compiler"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes beside (default: %(default)s)")
    parser.add_argument("--shorter", type=int, default=1, help="do 1/N of everything, to try it (default: %(default)s)")
    options = parser.parse_args()
    claim_directory(options)

    make_data(options)
    train(options)
    found = RUN / "evaluation"
    scenes = max(6, 200 // options.shorter)
    run_unless(
        found,
        "python",
        HERE / "evaluate.py",
        "--model",
        RUN / "model",
        "--output",
        found,
        "--scenes",
        scenes,
        *("--device", options.device, "--seeds", 3 if options.shorter == 1 else 1),
    )


if __name__ == "__main__":
    main()
