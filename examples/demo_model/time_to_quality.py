"""How many minutes of training it takes until things move as they are told, and which levers change that.

    python examples/demo_model/run.py                                                # once, for videos and features
    python examples/demo_model/time_to_quality.py                                    # every lever, one seed
    python examples/demo_model/time_to_quality.py --levers base "random start" --seeds 3

Every run trains for the same time, at a rate that stays. Its averaged weights are looked at again and again: the share
of held-out stories whose thing goes where the caption says, and how well the first frame is kept; and long before
things go anywhere, the loss of clips that were not trained on, at a sigma of 0.9, where it is decided what moves.
demo/quality/ gets all numbers, and a table of the first minutes at which 50, 80 and 90 % were right.
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import evaluate
import numpy as np
import torch
from run import DATA, MODEL, ONE_THREAD, QUICK, RUN, arithmetic, run, training, words_of

from flashi2v_data.settings import read_values
from flashi2v_infer import FlashI2VPipeline

QUALITY = RUN / "quality"
GOALS = (0.5, 0.8, 0.9)
SEED = 1024  # with which `run.py` encodes and trains
# What each changes of how `run.QUICK` is trained; "model" are pieces of text in the model file, and what replaces them.
LEVERS: dict[str, dict] = {
    "base": {},
    "random start": {"--start": "random", "--proj-lr-scale": 5},
    "what moves counts as all else": {"--recipe": None},
    "batch 16": {"--global-batch-size": 16, "--micro-batch-size": 16},
    "batch 4": {"--global-batch-size": 4, "--micro-batch-size": 4},
    "two processes": {"--nproc-per-node": 2, "--micro-batch-size": 4},
    "half the rate": {"--lr": 7e-4},
    "twice the rate": {"--lr": 3e-3},
    "sigmas as for large pictures": {"model": {'"training_shift": 3': '"use_dynamic_shifting": true'}},
    "sigmas with a shift of 8": {"model": {'"training_shift": 3': '"training_shift": 8'}},
    "uniform sigmas": {"model": {'"use_logitnorm_time_sampling": true': '"use_logitnorm_time_sampling": false'}},
    "features as released": {
        "model": {'"fft_return_abs": false': '"fft_return_abs": true', "[0.05, 0.2]": "[0.05, 0.95]"}
    },
    "a token for each latent": {"model": {"[1, 2, 2]": "[1, 1, 1]"}},
    "half as wide": {"model": {'"hidden_size": 128': '"hidden_size": 64', '"ffn_dim": 512': '"ffn_dim": 256'}},
    "half as deep": {"model": {'"num_layers": 6': '"num_layers": 3'}},
    "shift not trained": {"--freeze": "learnable_proj.*"},
    "not compiled": {"--compile": False},
}


def data_file(seed: int) -> Path:
    """Return the data file of a seed, whose clips are encoded first: a store of features belongs to one."""
    if seed == SEED:
        return DATA
    QUALITY.mkdir(parents=True, exist_ok=True)
    features, made = f"{QUALITY}/features_{seed}", QUALITY / f"data_{seed}.json"
    made.write_text(DATA.read_text().replace(f'"{RUN}/features"', f'"{features}"'))
    run(
        *("flashi2v-encode", "--mm-model", MODEL, "--mm-data", made, "--output", features),
        *("--seed", seed, "--device", "cpu", "--nproc-per-node", 2),
        **ONE_THREAD,
    )
    return made


def command(lever: str, seed: int, save: Path) -> list[str]:
    """Return the command that trains with a lever."""
    changes = dict(LEVERS[lever])
    model = save.with_suffix(".json")
    text = MODEL.read_text()
    for old, new in changes.pop("model", {}).items():
        assert text.count(old) == 1, f"{MODEL} no longer says {old}"
        text = text.replace(old, new)
    model.write_text(text)
    options = training(replace(QUICK, steps=10**6)) | arithmetic("cpu", fast=True)
    options |= {
        "--mm-model": model,
        "--mm-data": data_file(seed),
        "--save": save,
        "--seed": seed,
        "--lr-decay-style": "constant",
        "--lr-wsd-decay-style": None,
        "--lr-wsd-decay-iters": None,
        "--keep-checkpoints": None,
        "--save-interval": 250,
        "--no-save-optim": True,
        "--eval-interval": 50,
        "--eval-videos": 0,
        "--eval-ema": True,
        **changes,
    }
    held_out = read_values(DATA)["dataset_param"]["held_out_clips"]
    options["--eval-iters"] = held_out // options["--micro-batch-size"]  # every lever's loss is of all of them
    return ["flashi2v-train", *map(str, words_of(options))]


def train(lever: str, seed: int, minutes: float) -> Path:
    """Train with a lever for some minutes; return the run's directory."""
    save = QUALITY / f"{lever.replace(' ', '_')}_{seed}"
    if (save / "done").exists():
        return save
    shutil.rmtree(save, ignore_errors=True)
    QUALITY.mkdir(parents=True, exist_ok=True)
    words = command(lever, seed, save)
    with save.with_suffix(".log").open("w") as log:
        process = subprocess.Popen([Path(sys.executable).with_name(words[0]), *words[1:]], stdout=log, stderr=log)
    metrics = save / "metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or seconds(save).sum() < 60 * minutes):
        time.sleep(1)
    process.send_signal(signal.SIGTERM)
    if process.wait():  # a run that is asked to stop saves, and ends well
        sys.exit(save.with_suffix(".log").read_text())
    (save / "done").touch()
    return save


def seconds(save: Path) -> np.ndarray:
    """Return the seconds of every step, but for the first, which waits for the data's first batch."""
    lines = (save / "metrics.jsonl").read_text().splitlines()
    return np.array([0.0] + [json.loads(line)["seconds"] for line in lines[1:] if line.endswith("}")])


def look(save: Path, scenes: int) -> list[dict[str, float]]:
    """Return what the averaged weights of each checkpoint do."""
    spent = seconds(save).cumsum() / 60
    lines = map(json.loads, (save / "validation.jsonl").read_text().splitlines())
    losses = {line["step"]: line["validation_loss/sigma_0.9"] for line in lines}
    stories = [
        pair for pair in evaluate.make_stories(10 * scenes, QUICK.size) if pair[1].motion and pair[1].motion.direction
    ]
    found = []
    for checkpoint in sorted(save.glob("iter_*")):
        model = checkpoint.with_name(f"model_{checkpoint.name}")
        if not model.exists():
            words = ("convert", checkpoint, model, "--to", "diffusers", "--encoders", RUN / "encoders")
            subprocess.run([Path(sys.executable).with_name("flashi2v-model"), *words], check=True, capture_output=True)
        pipeline = FlashI2VPipeline.from_pretrained(model)
        pipeline.set_progress_bar_config(disable=True)
        videos = evaluate.make_sampler(pipeline).from_stories(stories[:scenes], 0)
        watched = list(map(evaluate.watched, stories[:scenes], videos))
        step = int(checkpoint.name[5:])
        found.append(
            {
                "step": step,
                "minutes": float(spent[step - 1]),
                "loss": losses[max(known for known in losses if known <= step)],
                "direction": float(np.mean([video.verdict.direction == video.story.direction for video in watched])),
                "first_frame_db": float(np.median([video.psnr for video in watched])),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levers", nargs="+", choices=LEVERS, default=[*LEVERS], help="default: all")
    parser.add_argument("--seeds", type=int, default=1, help="runs with each lever (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=8, help="of training in each run (default: %(default)s)")
    parser.add_argument("--scenes", type=int, default=40, help="to look at each time (default: %(default)s)")
    options = parser.parse_args()
    print(f"torch {torch.__version__}; {options.minutes:g} minutes of each run, {options.scenes} scenes\n")
    told, every = {}, {}
    for lever in options.levers:
        for seed in range(SEED, SEED + options.seeds):
            save = train(lever, seed, options.minutes)
            every[f"{lever}, seed {seed}"] = found = look(save, options.scenes)
            firsts = [next((at["minutes"] for at in found if at["direction"] >= goal), None) for goal in GOALS]
            best = max(found, key=lambda at: at["direction"])
            told[f"{lever}, seed {seed}"] = [
                str(found[-1]["step"]),
                f"{found[-1]['loss']:.3f}",
                *("never" if first is None else f"{first:.1f}" for first in firsts),
                f"{best['direction']:.0%}",
                f"{found[-1]['first_frame_db']:.1f}",
            ]
            print(f"{lever}, seed {seed}: {', '.join(told[f'{lever}, seed {seed}'])}", flush=True)
            (QUALITY / "quality.json").write_text(json.dumps(every, indent=1) + "\n")
    head = ("lever", "steps", "loss at 0.9", *(f"minutes to {goal:.0%}" for goal in GOALS), "best", "first frame, dB")
    text = evaluate.table(told, head)
    (QUALITY / "quality.md").write_text(f"{text}\n")
    print(f"\n{text}")


if __name__ == "__main__":
    main()
