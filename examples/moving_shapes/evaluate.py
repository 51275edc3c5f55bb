"""How good is a model of moving shapes?

    python examples/moving_shapes/evaluate.py --model demo --output evaluation

Samples from the first frames and captions of scenes that no training saw, half of them with pairs of shape and colour
that training left out, and measures what happens in the videos. The output holds report.md (the figures),
evaluation.json (every video's), distributions.png, film_strips.png (best, median and worst) and directions.gif (one
image, nine prompts).
"""

import argparse
import collections
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import torch
from matplotlib import pyplot
from numpy.typing import NDArray
from tqdm import tqdm

from flashi2v_data.randomness import generator
from flashi2v_data.shapes.scenes import BACKGROUNDS, Scene, centres, render, sample_scene
from flashi2v_data.shapes.tracking import look, surroundings, track
from flashi2v_data.video.measures import psnr
from flashi2v_data.video.strips import film_strip, stack
from flashi2v_infer import FlashI2VPipeline, demo, save_video, video_grid
from flashi2v_infer.defaults import settings_of
from flashi2v_model.encoders import decode_video, encode_video

SEED = 2  # of the scenes; training's are 0 and 2026
SIZE, FRAMES, FPS = 64, 17, 16
IN_PLACE = 3.0  # pixels
STILL_LEVELS = 8.0  # of 255


@dataclass(frozen=True)
class Verdict:
    """What was measured in one video.

    Attributes:
        direction: of the shape, as `tracking.track` names it.
        pace: likewise.
        path_error: mean distance between the shape's centre and where it should be, in pixels.
        first_frame_psnr: against the condition, in dB.
        start_error: distance between the shape's first centre and that of the condition, in pixels.
        colour_kept: the shape's colour is the right one in the last frame.
        shape_kept: the same of its form.
        background_change: the largest of all frames' mean distance from the background's colour, in levels of 255,
            away from where shape and condition's shape are.
    """

    direction: str
    pace: str
    path_error: float
    first_frame_psnr: float
    start_error: float
    colour_kept: bool
    shape_kept: bool
    background_change: float


def draw(scene: Scene) -> NDArray[np.uint8]:
    """Return how the scene really goes on: (T, H, W, 3)."""
    return render(scene, FRAMES, SIZE, SIZE, FPS)


def judge(frames: NDArray[np.uint8], scene: Scene) -> Verdict:
    """Measure a video (T, H, W, 3) that should show the scene."""
    path = centres(scene, FRAMES, SIZE, SIZE, FPS)
    motion = track(frames, scene)
    shape, colour = look(frames[-1], scene, motion.path[-1])
    distance = np.abs(frames - np.asarray(BACKGROUNDS[scene.background], dtype=np.float64)).mean(-1)  # (T, H, W)
    changes = [
        distance[i][~(surroundings(scene, motion.path[i], SIZE, SIZE) | surroundings(scene, path[i], SIZE, SIZE))]
        for i in range(FRAMES)
    ]
    return Verdict(
        motion.direction,
        motion.pace,
        float(np.linalg.norm(motion.path - path, axis=1).mean()),
        psnr(frames[0], draw(scene)[0]),
        float(np.linalg.norm(motion.path[0] - path[0])),
        colour == scene.colour,
        shape == scene.shape,
        float(max(change.mean() for change in changes)),
    )


@dataclass(frozen=True)
class Sampler:
    """Samples videos from first frames and captions, some at a time."""

    pipeline: FlashI2VPipeline
    num_inference_steps: int
    guidance_scale: float
    batch: int = 20

    def __call__(
        self, images: Sequence[NDArray[np.uint8]], prompts: Sequence[str], seed: int
    ) -> Iterator[NDArray[np.uint8]]:
        """Yield a video (T, H, W, 3) for every image (H, W, 3); its noise depends on seed and place alone."""
        for start in tqdm(range(0, len(images), self.batch), desc=f"seed {seed}", unit="batch", disable=None):
            numbers = range(start, min(start + self.batch, len(images)))
            (videos,) = self.pipeline(
                image=[images[i] for i in numbers],
                prompt=[prompts[i] for i in numbers],
                num_frames=FRAMES,
                height=SIZE,
                width=SIZE,
                num_inference_steps=self.num_inference_steps,
                guidance_scale=self.guidance_scale,
                generator=[generator(seed, "noise", 0, i) for i in numbers],
                output_type="np",
                return_dict=False,
            )
            yield from (videos * 255).round().astype(np.uint8)


@torch.no_grad()
def reconstruct(pipeline: FlashI2VPipeline, scene: Scene) -> NDArray[np.uint8]:
    """Pass the real video through the VAE, which no sampled one can surpass."""
    video = torch.from_numpy(draw(scene)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    decoded = decode_video(pipeline.vae, encode_video(pipeline.vae, video))[0].permute(1, 2, 3, 0)
    return ((decoded + 1) * 127.5).round().to(torch.uint8).numpy()


PACE = "pace right (of moving)"
# What is counted, by name: whether a video passes.
CHECKS: dict[str, Callable[[Verdict, Scene], bool]] = {
    "direction right": lambda verdict, scene: verdict.direction == scene.direction,
    PACE: lambda verdict, scene: verdict.pace == scene.pace,
    "first frame at least 22 dB": lambda verdict, scene: verdict.first_frame_psnr >= 22,
    f"shape starts within {IN_PLACE:g} pixels": lambda verdict, scene: verdict.start_error <= IN_PLACE,
    "colour kept to the end": lambda verdict, scene: verdict.colour_kept,
    "shape kept to the end": lambda verdict, scene: verdict.shape_kept,
    f"background still (within {STILL_LEVELS:g} levels)": lambda verdict, scene: (
        verdict.background_change <= STILL_LEVELS
    ),
}
MEASURES = {
    "first_frame_psnr": "first frame PSNR [dB]",
    "start_error": "error of the first place [pixels]",
    "path_error": "mean error of the path [pixels]",
    "background_change": "background change [levels of 255]",
}
Judged = Sequence[tuple[Scene, Verdict]]


def shares(judged: Judged) -> dict[str, float]:
    """Return the share of videos that pass each check."""
    moving = [pair for pair in judged if pair[0].direction != "still"]
    found = {}
    for name, passes in CHECKS.items():
        pairs = moving if name == PACE else judged
        found[name] = sum(passes(verdict, scene) for scene, verdict in pairs) / max(1, len(pairs))
    return found


def table(rows: dict[str, dict[str, str]], head: str) -> str:
    """Return a Markdown table: {row: {column: cell}}."""
    columns = list(next(iter(rows.values())))
    lines = [f"| {head} | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    lines += [f"| {name} | {' | '.join(cells[column] for column in columns)} |" for name, cells in rows.items()]
    return "\n".join(lines)


def report(groups: dict[str, Judged]) -> str:
    """Return the figures of some groups of videos, as Markdown."""
    found = {name: shares(judged) for name, judged in groups.items()}
    passed = {check: {name: f"{share[check]:.1%}" for name, share in found.items()} for check in CHECKS}
    spread = {}
    for name, judged in groups.items():
        for measure, label in MEASURES.items():
            values = [getattr(verdict, measure) for _, verdict in judged]
            marks = np.percentile(values, (0, 5, 25, 50, 75, 95, 100))
            spread[f"{label}, {name}"] = dict(
                zip(("least", "5 %", "25 %", "median", "75 %", "95 %", "most"), (f"{mark:.1f}" for mark in marks))
            )
    wrong = collections.Counter(
        (scene.direction, verdict.direction) for scene, verdict in groups["all"] if scene.direction != verdict.direction
    )
    confusions = "; ".join(f"{told} became {seen} {times}x" for (told, seen), times in wrong.most_common())
    return "\n\n".join(
        (table(passed, "share of videos"), table(spread, "distribution"), f"Wrong directions: {confusions or 'none'}.")
    )


def draw_distributions(judged: Judged, ceiling: Judged, path: Path) -> None:
    """Plot every measure's cumulative distribution, beside what the VAE alone reaches."""
    figure, axes = pyplot.subplots(1, len(MEASURES), figsize=(15, 3.6), layout="constrained", sharey=True)
    for axis, (measure, label) in zip(axes, MEASURES.items()):
        for name, pairs in (("sampled", judged), ("real video through the VAE", ceiling)):
            values = np.sort([getattr(verdict, measure) for _, verdict in pairs])
            axis.plot(values, np.arange(1, len(values) + 1) / len(values), label=name)
        axis.set(xlabel=label)
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="share of videos")
    axes[0].legend()
    figure.savefig(path, dpi=110)


def draw_strips(judged: Judged, videos: Sequence[NDArray[np.uint8]], path: Path, each: int = 3) -> None:
    """Draw the videos whose paths are best, median and worst, with how the real video went on below each."""
    order = np.argsort([verdict.path_error for _, verdict in judged])
    middle = (len(order) - each) // 2
    chosen = {"best": order[:each], "median": order[middle : middle + each], "worst": order[-each:]}
    strips = [
        film_strip(draw(scene)[0], videos[i], draw(scene), caption=f"{rank}: {scene.caption}", tile_height=96)
        for rank, indices in chosen.items()
        for i in indices
        for scene in [judged[i][0]]
    ]
    stack(strips).save(path)


def draw_directions(sampler: Sampler, path: Path) -> None:
    """Animate one image as nine prompts say: eight directions, and standing still in the middle."""
    order = ("upper left", "up", "upper right", "left", "still", "right", "lower left", "down", "lower right")
    scene = Scene("star", "pink", "medium", "dark blue", "still", "slowly", 0.0, (0.5, 0.5))
    prompts = [dataclasses.replace(scene, direction=direction).caption for direction in order]
    grid = video_grid(sampler([draw(scene)[0]] * len(prompts), prompts, seed=0), len(prompts))
    save_video(path, grid.repeat(2, axis=1).repeat(2, axis=2), FPS, {"prompts": prompts})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=demo.NAME, help="a pipeline directory, or demo (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="a new directory")
    parser.add_argument("--scenes", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="videos of each scene (default: %(default)s)")
    parser.add_argument("--num-inference-steps", type=int, help="default: the model's own")
    parser.add_argument("--guidance-scale", type=float, help="default: the model's own")
    options = parser.parse_args()
    try:
        options.output.mkdir(parents=True)
    except FileExistsError:
        sys.exit(f"{options.output} exists: name a new directory")

    pipeline = FlashI2VPipeline.from_pretrained(options.model)
    pipeline.set_progress_bar_config(disable=True)
    half = options.scenes // 2
    scenes = [
        sample_scene(SEED, i, seconds=FRAMES / FPS, pairs="seen" if i < half else "unseen")
        for i in range(options.scenes)
    ]
    prompts = [scene.caption for scene in scenes]
    given = {"num_inference_steps": options.num_inference_steps, "guidance_scale": options.guidance_scale}
    settings = settings_of(pipeline.defaults, **given)
    sampler = Sampler(pipeline, settings.num_inference_steps, settings.guidance_scale)
    truth = [(scene, judge(draw(scene), scene)) for scene in scenes]
    ceiling = [(scene, judge(reconstruct(pipeline, scene), scene)) for scene in scenes]
    judged, videos, rows = [], [], []
    for seed in range(options.seeds):
        for i, frames in enumerate(sampler([draw(scene)[0] for scene in scenes], prompts, seed)):
            verdict = judge(frames, scenes[i])
            judged.append((scenes[i], verdict))
            videos.append(frames)
            rows.append({"scene": i, "seed": seed, "prompt": prompts[i], **dataclasses.asdict(verdict)})
    seen = [pair for pair, row in zip(judged, rows) if row["scene"] < half]
    unseen = [pair for pair, row in zip(judged, rows) if row["scene"] >= half]
    text = report({"all": judged, "seen pairs": seen, "unseen pairs": unseen, "VAE alone": ceiling, "truth": truth})
    settings: dict[str, Any] = {
        "model": str(options.model),
        "num_inference_steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale,
        "scenes": options.scenes,
        "seeds": options.seeds,
    }
    (options.output / "evaluation.json").write_text(
        json.dumps({"settings": settings, "shares": shares(judged), "videos": rows}, indent=1) + "\n"
    )
    told = ", ".join(f"{name} {value}" for name, value in settings.items())
    (options.output / "report.md").write_text(f"{told}\n\n{text}\n")
    draw_distributions(judged, ceiling, options.output / "distributions.png")
    draw_strips(judged, videos, options.output / "film_strips.png")
    draw_directions(sampler, options.output / "directions.gif")
    print(text)


if __name__ == "__main__":
    main()
