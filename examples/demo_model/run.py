"""A model whose picture decides how it looks, and whose words decide how it moves.

    python examples/demo_model/run.py            # minutes on two CPU cores, behind the encoders of the demo model
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

import torch
from PIL import Image

from flashi2v_data.settings import read_values
from flashi2v_data.shapes.stories import Stage, sample_story
from flashi2v_infer import demo

HERE = Path("examples/demo_model")
RUN = Path("demo")
MODEL, DATA, FILTER = HERE / "pretrain_model.json", HERE / "data.json", HERE / "filter_config.yaml"


@dataclass(frozen=True)
class Sitting:
    """A training of the transformer.

    Attributes:
        size: of the frames, which are square, in pixels.
        videos: to train on.
        steps: of training.
        decay: of them, with a rate that falls to zero.
        ema: share of the averaged weights that stays at each step.
        batch: clips of a step.
        patch: latents of a side of what one token stands for.
        recipe: as of `flashi2v-train --recipe`.
    """

    size: int
    videos: int
    steps: int
    decay: int
    ema: float
    batch: int
    patch: int
    recipe: str | None

    def shortened(self, shorter: int) -> "Sitting":
        """Return 1/N of it."""
        return replace(
            self,
            videos=max(32, self.videos // shorter),
            steps=max(2, self.steps // shorter),
            decay=max(1, self.decay // shorter),
        )


# Few tokens, and a loss that looks at what moves: so things soon go where they are told.
QUICK = Sitting(64, 2400, 2400, 1100, 0.99, batch=8, patch=2, recipe="flashi2v_train:MotionWeighted")
# A token for each latent, so that things keep their shapes: to move one is to attend to where it was.
LONG = Sitting(96, 24_000, 9600, 4800, 0.998, batch=8, patch=1, recipe=None)
# Of commands with one process for each core.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def run(*command: object, **environment: str) -> None:
    """Run a console script of this environment, shown as one would type it; where it fails, so does this one."""
    words = [str(word) for word in command]
    print(f"\n$ {shlex.join(words)}", flush=True)
    program = Path(sys.executable).with_name(words[0])
    if code := subprocess.run([program, *words[1:]], env=os.environ | environment).returncode:
        sys.exit(code)


def run_unless(made: Path, *command: object) -> None:
    """Run a command whose output, which appears whole or not at all, is not there yet."""
    if not made.exists():
        run(*command, **ONE_THREAD)


def get_encoders(options: argparse.Namespace) -> None:
    """Train VAE, tokenizer and text encoder, or take those that are here."""
    encoders = RUN / "encoders"
    if options.full:
        run(
            *("python", HERE / "encoders.py", "--output", encoders, "--device", options.device),
            *("--shorter", options.shorter, *words_of({"--bf16": options.fast and has_bf16(options.device)})),
            **ONE_THREAD,
        )
        return
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(demo.DIRECTORY / part, encoders / part, dirs_exist_ok=True)


def write_files(sitting: Sitting) -> tuple[Path, Path, Path]:
    """Return the files of model, data and filter: those beside this one, or some like them for another size."""
    size = sitting.size
    if size == QUICK.size:
        return MODEL, DATA, FILTER
    model, data, filtering = map(read_values, (MODEL, DATA, FILTER))
    model["predictor"]["patch_size"] = [1, sitting.patch, sitting.patch]
    data["dataset_param"] |= {"sample_height": size, "sample_width": size}
    data["dataset_param"]["transform_pipeline"]["video"][0]["param"]["transform_size"] = [size, size]
    filtering |= {"sample_height": size, "sample_width": size, "min_hxw": size**2}
    made = []
    for file, values in ((MODEL, model), (DATA, data), (FILTER, filtering)):
        made.append(RUN / file.name)
        made[-1].write_text(json.dumps(values, indent=4) + "\n")
    return made[0], made[1], made[2]


def training(sitting: Sitting) -> dict[str, object]:
    """Return the options of flashi2v-train that decide how the transformer learns."""
    return {
        "--start": "still",  # a video stays as its first frame is, so that motion is all there is to learn
        "--recipe": sitting.recipe,
        "--train-iters": sitting.steps,
        "--global-batch-size": sitting.batch,
        "--lr": 1.5e-3,
        "--lr-decay-style": "WSD",
        "--lr-wsd-decay-style": "linear",
        "--lr-wsd-decay-iters": sitting.decay,
        "--lr-warmup-iters": min(100, sitting.steps // 10),
        "--adam-beta2": 0.99,
        "--ema-decay": sitting.ema,
        "--no-use-distributed-optimizer": True,
        "--device": "cpu",
        "--nproc-per-node": 1,  # of a thread for each core: two processes of so small a model wait for each other
        "--micro-batch-size": sitting.batch,
        "--save-interval": 500,
        "--keep-checkpoints": 2,
    }


def has_bf16(device: str) -> bool:
    """Whether a device computes in bf16 quickly: many CPUs only imitate it."""
    return device != "cpu" or torch.cpu.get_capabilities().get("avx512_bf16", False)


def arithmetic(device: str, fast: bool) -> dict[str, object]:
    """Return the options of flashi2v-train that decide how a device computes: fast, or alike everywhere."""
    bf16 = fast and has_bf16(device)
    return {"--compile": fast, "--bf16": bf16, "--no-bf16": not bf16}


def words_of(options: dict[str, object]) -> list[object]:
    """Return options as they are typed: True is a flag, and False and None leave one out."""
    given = {name: value for name, value in options.items() if value is not None and value is not False}
    return [word for name, value in given.items() for word in ([name] if value is True else [name, value])]


def train(sitting: Sitting, options: argparse.Namespace) -> None:
    """Make, filter and encode videos, train the transformer on them, and make a pipeline of it."""
    model, data, filtering = write_files(sitting)
    run_unless(
        RUN / "videos",
        *("flashi2v-data", "shapes", RUN / "videos", "--num", sitting.videos, "--frames", 17),
        *("--captions", "motion", "--pairs", "seen", "--size", f"{sitting.size}x{sitting.size}"),
    )
    run_unless(RUN / "store", "flashi2v-data", "filter", "--filter_config", filtering)
    run(
        *("flashi2v-encode", "--mm-model", model, "--mm-data", data, "--output", RUN / "features"),
        *("--device", options.device, "--nproc-per-node", options.processes or (2 if options.device == "cpu" else 1)),
        **ONE_THREAD,
    )
    processes = options.processes or 1
    chosen = training(sitting) | {
        "--device": options.device,
        "--nproc-per-node": processes,
        "--micro-batch-size": sitting.batch // processes,
        **arithmetic(options.device, options.fast),
    }
    run("flashi2v-train", "--mm-model", model, "--mm-data", data, "--save", RUN / "training", *words_of(chosen))
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
        story = sample_story(77, number, LONG.size, LONG.size)
        Image.fromarray(Stage(story, LONG.size, LONG.size).frame(0)).save(pictures / f"{number:02d}.png")
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
    parser.add_argument("--fast", action="store_true", help="compiled, and in bf16 where the device has it")
    parser.add_argument("--processes", type=int, help="of encoding and training (default: 1; 2 to encode on a CPU)")
    parser.add_argument("--shorter", type=int, default=1, help="do 1/N of everything, to try it (default: %(default)s)")
    options = parser.parse_args()
    claim_directory(options)
    get_encoders(options)
    train((LONG if options.full else QUICK).shortened(options.shorter), options)
    if options.full:
        finish()
    found = RUN / "evaluation"
    run_unless(
        found,
        *("python", HERE / "evaluate.py", "--model", RUN / "model", "--output", found),
        *("--scenes", max(6, (200 if options.full else 60) // options.shorter), "--device", options.device),
        *("--seeds", 3 if options.full and options.shorter == 1 else 1),
    )


if __name__ == "__main__":
    main()
