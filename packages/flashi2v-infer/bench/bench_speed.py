"""What leaving calls of the network out costs and spares: quality, motion, and whether errors are as predicted.

    python bench/bench_speed.py [--model DIR] [--scenes 200] [--calibrate 24] [--output FOLDER]

Scenes of moving shapes that no training and no calibration saw are sampled with guidance, once whole and once with
each way to make fewer calls, from the same noise. `--calibrate N` first calibrates the model on N other scenes, and
writes that into its directory. The output gets a strip of pictures and a JSON of every number.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from flashi2v_data.randomness import generator
from flashi2v_data.shapes.pictures import Sprite
from flashi2v_data.shapes.stories import Stage, name_direction, sample_story
from flashi2v_data.shapes.watching import fit_way, follow
from flashi2v_data.video.measures import psnr
from flashi2v_infer import FlashI2VPipeline
from flashi2v_infer.arguments import prepare_image
from flashi2v_infer.defaults import directory_of, settings_of
from flashi2v_model.encoders import encode_video
from flashi2v_model.scheduler import make_scheduler
from flashi2v_model.speed.choice import choose_calls
from flashi2v_model.speed.directory import calibrate_directory
from flashi2v_model.speed.measuring import Start, compare
from flashi2v_model.speed.plan import PRESETS, SamplingPlan
from flashi2v_npu_ops.device import resolve_device

CALIBRATION_SEED, SEED = 77, 4242
NUM_STEPS = 50
STILL = "still"


@dataclass(frozen=True)
class Task:
    """A scene to be sampled: its first frame, its caption, the direction it should take, and how a way is measured.

    Ways are (right, down), in shares of the frame's shorter side.
    """

    image: NDArray[np.uint8]
    caption: str
    direction: str
    way: Callable[[NDArray[np.uint8]], NDArray[np.float64]]


def task(seed: int, index: int, num_frames: int, height: int, width: int) -> Task:
    """Return story number `index`."""
    story = sample_story(seed, index, height, width)
    stage, side, mover = Stage(story, height, width), min(height, width), story.movers[0]
    others = np.stack([stage.without({mover}, moment) for moment in np.linspace(0, 1, num_frames)])
    sprite: Sprite = stage.sprites[mover]
    return Task(
        stage.frame(0.0),
        story.caption,
        story.direction,
        lambda film: fit_way(follow(film, others, sprite)) / side,
    )


@dataclass(frozen=True)
class Way:
    """One way to sample: with which plan, or with which scheduler and how many steps."""

    name: str
    plan: SamplingPlan | str | float | None = None
    scheduler: str | None = None
    steps: int = NUM_STEPS


WAYS = (
    Way("exact, 50 steps"),
    Way("balanced", "balanced"),
    Way("fast", "fast"),
    Way("2.5 times fewer", 2.5),
    Way("euler, 20 steps", steps=20),
    Way("unipc, 20 steps", scheduler="unipc", steps=20),
)


class Sampler:
    """Samples tasks, some at a time; noise depends on the number of the task alone."""

    def __init__(self, pipe: FlashI2VPipeline, guidance_scale: float, batch: int) -> None:
        self.pipe, self.guidance_scale, self.batch = pipe, guidance_scale, batch
        self.scheduler = pipe.scheduler

    def __call__(self, way: Way, tasks: Sequence[Task]) -> tuple[list[NDArray[np.uint8]], int]:
        """Return the videos, and how many calls of the network each took."""
        films: list[NDArray[np.uint8]] = []
        num_calls = 2 * way.steps
        shift = float(self.scheduler.config.get("shift", 1.0))
        for first in range(0, len(tasks), self.batch):
            some = tasks[first : first + self.batch]
            self.pipe.scheduler = self.scheduler if way.scheduler is None else make_scheduler(way.scheduler, shift)  # type: ignore[arg-type]
            output = self.pipe(
                image=[one.image for one in some],
                prompt=[one.caption for one in some],
                num_inference_steps=way.steps,
                guidance_scale=self.guidance_scale,
                generator=[generator(SEED, "noise", 0, first + i) for i in range(len(some))],
                output_type="np",
                plan=way.plan,
            )
            films += list((np.asarray(output.frames) * 255).round().astype(np.uint8))
            num_calls = num_calls if output.calls is None else output.calls["num_calls"]
        self.pipe.scheduler = self.scheduler
        return films, num_calls


def figures(tasks: Sequence[Task], films: list[NDArray[np.uint8]], exact: list[NDArray[np.uint8]]) -> dict[str, float]:
    """Compare videos with those of the exact run, and with what the captions say."""
    ways = [np.asarray(one.way(film)) for one, film in zip(tasks, films)]
    names = [name_direction((float(way[0]), float(way[1]))) for way in ways]
    asked = [np.asarray(one.way(film)) for one, film in zip(tasks, exact)]
    # Along the exact video's own way: what moves elsewhere, or trembles, does not count.
    along = sum(float(way @ own) / max(float(np.linalg.norm(own)), 1e-9) for way, own in zip(ways, asked))
    noise = [psnr(film, own) for film, own in zip(films, exact)]
    return {
        "psnr": statistics.mean(min(value, 100.0) for value in noise),
        "psnr_lowest": min(noise),
        "direction": statistics.mean(name == one.direction for name, one in zip(names, tasks)),
        "speed": along / sum(float(np.linalg.norm(own)) for own in asked),
        "still": statistics.mean(name == STILL for name in names),
    }


def predicted(
    pipe: FlashI2VPipeline, guidance_scale: float, tasks: Sequence[Task], batch: int
) -> Iterator[dict[str, Any]]:
    """Compute the truth beside every stand-in of the presets."""
    from flashi2v_model.sampling import set_timesteps

    calibration, settings = pipe.calibration(), settings_of(pipe.defaults)
    set_timesteps(pipe.scheduler, NUM_STEPS, pipe.device)
    sigmas = pipe.scheduler.sigmas.tolist()
    for name in ("balanced", "fast"):
        calls, found = choose_calls(PRESETS[name], calibration, sigmas, guidance_scale), []  # type: ignore[index]
        for first in range(0, len(tasks), batch):
            some = tasks[first : first + batch]
            text, negative = pipe.encode_prompt([one.caption for one in some])
            pictures = torch.stack([prepare_image(one.image, settings.height, settings.width) for one in some])
            shape = (pipe.transformer.config.in_channels, *settings.latent_grid)
            noise = [torch.randn(shape, generator=generator(SEED, "noise", 1, first + i)) for i in range(len(some))]
            with torch.no_grad():
                condition = encode_video(pipe.vae, pictures.to(pipe.device))
            start = Start(torch.stack(noise).to(pipe.device), condition, text, negative, settings.low_freq_energy_ratio)
            found += compare(pipe.transformer, pipe.scheduler, start, guidance_scale, calibration, calls)
        ratios = sorted(one.true / one.predicted for one in found)
        yield {
            "plan": name,
            "stand_ins": len(found),
            "median_ratio": statistics.median(ratios),
            "covered_by": calibration.covered,
            "covered": statistics.mean(ratio <= calibration.covered for ratio in ratios),
            "predicted_error": calls.error,
        }


def strip(films: dict[str, NDArray[np.uint8]], image: NDArray[np.uint8], caption: str) -> Image.Image:
    """Draw frames of several videos of one scene below each other, with their names."""
    side, count, margin = 96, 6, 130
    picture = Image.new("RGB", (margin + count * side, 18 + len(films) * side), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((4, 3), caption, fill="black")
    for row, (name, film) in enumerate(films.items()):
        draw.text((4, 18 + row * side + side // 2 - 6), name, fill="black")
        for column, frame in enumerate(np.linspace(0, len(film) - 1, count).round().astype(int)):
            shown = Image.fromarray(film[frame]).resize((side - 2, side - 2), Image.Resampling.NEAREST)
            picture.paste(shown, (margin + column * side, 18 + row * side))
    return picture


def calibrated(directory: Path, tasks: Sequence[Task], guidance_scale: float, device: torch.device, batch: int) -> None:
    """Calibrate a model on the first frames of tasks."""
    with tempfile.TemporaryDirectory() as folder:
        pairs = []
        for i, one in enumerate(tasks):
            file = Path(folder, f"{i:03d}.png")
            Image.fromarray(one.image).save(file)
            pairs.append((file, one.caption))
        calibrate_directory(
            directory,
            pairs,
            num_steps=NUM_STEPS,
            guidance_scale=guidance_scale,
            device=device,
            dtype="fp32",
            batch=batch,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--compared", type=int, default=32, help="scenes whose stand-ins are compared with the truth")
    parser.add_argument("--guidance-scale", type=float, default=5.0)
    parser.add_argument("--calibrate", type=int, default=0, metavar="N", help="on N scenes first")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("speed"))
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)

    directory = directory_of(arguments.model)
    pipe = FlashI2VPipeline.from_pretrained(arguments.model).to(device)
    pipe.set_progress_bar_config(disable=True)
    settings = settings_of(pipe.defaults)
    size = (settings.num_frames, settings.height, settings.width)

    def tasks(seed: int, count: int) -> list[Task]:
        return [task(seed, i, *size) for i in range(count)]

    if arguments.calibrate:
        calibrated(
            directory, tasks(CALIBRATION_SEED, arguments.calibrate), arguments.guidance_scale, device, arguments.batch
        )
    arguments.output.mkdir(parents=True, exist_ok=True)
    chosen = tasks(SEED, arguments.scenes)
    sampler = Sampler(pipe, arguments.guidance_scale, arguments.batch)
    results: dict[str, Any] = {"ways": {}, "scenes": arguments.scenes, "guidance_scale": arguments.guidance_scale}
    films: dict[str, list[NDArray[np.uint8]]] = {}
    names = ", ".join(f"{name} {version(name)}" for name in ("flashi2v-infer", "torch", "diffusers"))
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {device}; {names}")
    print(f"{arguments.model}, {arguments.scenes} stories, guidance {arguments.guidance_scale:g}\n")
    print(
        "| way | calls | fewer | PSNR | lowest | direction right | net speed | still | seconds |\n" + "|---" * 9 + "|"
    )
    for way in WAYS:
        begun = time.perf_counter()
        films[way.name], num_calls = sampler(way, chosen)
        seconds = (time.perf_counter() - begun) / len(chosen)
        found = figures(chosen, films[way.name], films[WAYS[0].name])
        results["ways"][way.name] = {**found, "calls": num_calls, "seconds": seconds}
        quality = "" if way is WAYS[0] else f"{found['psnr']:.1f} dB"
        lowest = "" if way is WAYS[0] else f"{found['psnr_lowest']:.1f} dB"
        print(
            f"| {way.name} | {num_calls} | {2 * NUM_STEPS / num_calls:.2f}x | {quality} | {lowest} "
            f"| {found['direction']:.1%} | {found['speed']:.3f} | {found['still']:.1%} | {seconds:.2f} |",
            flush=True,
        )
    shown = ("exact, 50 steps", "balanced", "fast")
    for i in range(min(3, len(chosen))):
        picture = strip({name: films[name][i] for name in shown}, chosen[i].image, chosen[i].caption)
        picture.quantize(64).save(arguments.output / f"speed_{i}.png", optimize=True)
    print("\n| plan | stand-ins | true by predicted, median | within | share within |\n" + "|---" * 5 + "|")
    results["predictions"] = list(
        predicted(pipe, arguments.guidance_scale, chosen[: arguments.compared], arguments.batch)
    )
    for one in results["predictions"]:
        print(
            f"| {one['plan']} | {one['stand_ins']} | {one['median_ratio']:.2f} | {one['covered_by']:.2f} times "
            f"| {one['covered']:.1%} |"
        )
    (arguments.output / "speed.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
