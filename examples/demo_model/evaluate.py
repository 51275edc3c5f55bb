"""How good is a model that takes the look from a picture and the motion from words?

    python examples/demo_model/evaluate.py --model demo/model --output evaluation

Samples from first frames and captions of stories that no training saw, in four groups: looks and words as in training;
looks that it left out; words and orders of words that it left out; and pictures far from it, landscapes behind things.
`shapes.watching` says what happens in each video. The output holds report.md (figures and goals), evaluation.json
(every video's), distributions.png, a strip of best, median and worst videos of each group, and two grids: one picture
with nine sentences, one sentence with nine pictures.
"""

import argparse
import dataclasses
import itertools
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
from PIL import Image
from tqdm import tqdm

from flashi2v_data.randomness import generator
from flashi2v_data.shapes.sentences import Words
from flashi2v_data.shapes.stories import Looks, Stage, Story, sample_story
from flashi2v_data.shapes.watching import Verdict, watch
from flashi2v_data.video.strips import film_strip, stack
from flashi2v_infer import FlashI2VPipeline, demo, save_video, video_grid
from flashi2v_infer.commands.sampler import psnr
from flashi2v_infer.defaults import settings_of
from flashi2v_model.encoders import decode_video, encode_video

SEED = 2  # of the stories; training's are 0 and 2026
FRAMES, FPS = 17, 16
GROUPS = ("as in training", "unseen looks", "unseen words", "far pictures")
SENTENCES = (
    *("it drifts to the upper left", "moves up", "it flies to the upper right"),
    *("slides left", "stays where it is", "goes to the right"),
    *("it goes to the lower left", "moves slowly downwards", "it races to the lower right"),
)


@dataclass(frozen=True)
class Watched:
    """A video that was sampled from a story's first frame: the story's group, what was seen, and the first frame's PSNR
    against the condition in dB."""

    story: Story
    group: str
    verdict: Verdict
    psnr: float


def make_stories(num: int, size: int) -> list[tuple[str, Story]]:
    """Return the stories of all groups for square frames of this size, half of them as in training."""
    stories = []
    for number in range(num):
        group = GROUPS[0] if number % 2 else GROUPS[1 + number // 2 % 3]
        looks: Looks = "unseen" if group == "unseen looks" else "seen"
        words: Words = "unseen" if group == "unseen words" else "seen"
        story = sample_story(SEED, number, size, size, looks=looks, words=words)
        if group == "far pictures":
            # The colours of these two are far enough apart for hills and sky.
            candidates = (sample_story(SEED, number + i * num, size, size, looks="seen") for i in itertools.count())
            story = next(story for story in candidates if story.background.kind in ("graded", "textured"))
            story = dataclasses.replace(story, background=dataclasses.replace(story.background, kind="landscape"))
        stories.append((group, story))
    return stories


def film(story: Story, size: int) -> NDArray[np.uint8]:
    """Return how the story really goes on: (T, H, W, 3)."""
    return Stage(story, size, size).film(FRAMES)


def first_frame(story: Story, size: int) -> NDArray[np.uint8]:
    """Return what a video of a story is sampled from: (H, W, 3)."""
    return Stage(story, size, size).frame(0)


@dataclass(frozen=True)
class Sampler:
    """Samples videos from first frames and captions, square ones of the model's size, some at a time."""

    pipeline: FlashI2VPipeline
    size: int
    num_inference_steps: int
    guidance_scale: float
    batch: int = 20

    def __call__(
        self, images: Sequence[NDArray[np.uint8]], prompts: Sequence[str], seed: int
    ) -> Iterator[NDArray[np.uint8]]:
        """Yield a video (T, H, W, 3) for every image (H, W, 3); its noise depends on seed and place alone."""
        for start in tqdm(range(0, len(images), self.batch), f"seed {seed}", unit="batch", disable=None):
            numbers = range(start, min(start + self.batch, len(images)))
            (videos,) = self.pipeline(
                image=[images[i] for i in numbers],
                prompt=[prompts[i] for i in numbers],
                num_frames=FRAMES,
                height=self.size,
                width=self.size,
                num_inference_steps=self.num_inference_steps,
                guidance_scale=self.guidance_scale,
                generator=[generator(seed, "noise", 0, i) for i in numbers],
                output_type="np",
                return_dict=False,
            )
            yield from (videos * 255).round().astype(np.uint8)

    def from_stories(self, stories: Sequence[tuple[str, Story]], seed: int) -> Iterator[NDArray[np.uint8]]:
        """Yield a video of every story, from its first frame and its caption."""
        return self(
            [first_frame(story, self.size) for _, story in stories], [story.caption for _, story in stories], seed
        )


def make_sampler(pipeline: FlashI2VPipeline, steps: int | None = None, guidance: float | None = None) -> Sampler:
    """Return a sampler with these settings, or with the model's where they are not given."""
    chosen = settings_of(pipeline.defaults, num_inference_steps=steps, guidance_scale=guidance)
    if chosen.height != chosen.width:
        sys.exit(f"stories are judged in square frames, the model makes {chosen.height}x{chosen.width}: name another")
    return Sampler(pipeline, chosen.height, chosen.num_inference_steps, chosen.guidance_scale)


@torch.no_grad()
def reconstruct(pipeline: FlashI2VPipeline, video: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pass a real video through the VAE, which no sampled one can surpass."""
    pixels = torch.from_numpy(video).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    latents = encode_video(pipeline.vae, pixels.to(pipeline.vae.device))
    decoded = decode_video(pipeline.vae, latents)[0].permute(1, 2, 3, 0).cpu()
    return ((decoded + 1) * 127.5).round().to(torch.uint8).numpy()


def watched(pair: tuple[str, Story], frames: NDArray[np.uint8]) -> Watched:
    """Say what happens in a video of a story, which is given with its group."""
    group, story = pair
    return Watched(story, group, watch(frames, story), psnr(frames[0], first_frame(story, frames.shape[1])))


@dataclass(frozen=True)
class Check:
    """A question to a video: of which ones it is asked, whether one passes, and the share that should."""

    asked: Callable[[Watched], bool]
    passes: Callable[[Watched], bool]
    goal: float


def _always(_: Watched) -> bool:
    return True


CHECKS = {
    "direction right": Check(
        lambda video: video.story.motion is not None and video.story.motion.direction is not None,
        lambda video: video.verdict.direction == video.story.direction,
        0.95,
    ),
    "pace right, where it is said": Check(
        lambda video: video.story.motion is not None and video.story.motion.pace is not None,
        lambda video: video.verdict.pace == video.story.motion.pace,
        0.8,
    ),
    "still or gentle, where no motion is said": Check(
        lambda video: video.story.motion is None,
        lambda video: video.verdict.direction == "still" and video.verdict.background_change <= 10,
        0.9,
    ),
    "first frame at least 24 dB": Check(_always, lambda video: video.psnr >= 24, 0.98),
    "background of frame 1 within 6 levels of frame 0": Check(
        _always, lambda video: video.verdict.background_jump <= 6, 0.99
    ),
    "colour kept to the end": Check(_always, lambda video: video.verdict.colour_kept, 0.99),
    "shape kept to the end": Check(_always, lambda video: video.verdict.shape_kept, 0.93),
    "what should stay does": Check(
        lambda video: len(video.story.things) > len(video.story.movers), lambda video: video.verdict.stay, 0.95
    ),
    "far: background within 10 levels, thing recognisable": Check(
        lambda video: video.group == "far pictures",
        lambda video: video.verdict.background_change <= 10 and video.verdict.colour_kept and video.verdict.shape_kept,
        0.8,
    ),
}
MEASURES: dict[str, Callable[[Watched], float]] = {
    "first frame PSNR [dB]": lambda video: video.psnr,
    "error of the way [pixels]": lambda video: video.verdict.way_error,
    "change of the background from frame 0 to 1 [levels of 255]": lambda video: video.verdict.background_jump,
    "change of the background [levels of 255]": lambda video: video.verdict.background_change,
}


def share(videos: Sequence[Watched], check: Check) -> float | None:
    """Return the share of the videos asked that pass; None where none is asked."""
    asked = [video for video in videos if check.asked(video)]
    return sum(map(check.passes, asked)) / len(asked) if asked else None


def table(rows: dict[str, list[str]], head: Sequence[str]) -> str:
    """Return a Markdown table: the cells of each row by its name."""
    lines = [f"| {' | '.join(head)} |", f"|---|{'---|' * (len(head) - 1)}"]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    return "\n".join(lines)


def report(columns: dict[str, Sequence[Watched]]) -> str:
    """Return the figures of some lists of videos, as Markdown."""
    passed = {}
    for name, check in CHECKS.items():
        shares = [share(videos, check) for videos in columns.values()]
        passed[name] = [f"{check.goal:.0%}", *("" if found is None else f"{found:.1%}" for found in shares)]
    marks = (0, 5, 25, 50, 75, 95, 100)
    spread = {
        f"{measure}, {name}": [f"{mark:.1f}" for mark in np.percentile([value(video) for video in videos], marks)]
        for measure, value in MEASURES.items()
        for name, videos in columns.items()
    }
    quantiles = ("least", "5 %", "25 %", "median", "75 %", "95 %", "most")
    return "\n\n".join(
        (table(passed, ("share of videos", "goal", *columns)), table(spread, ("distribution", *quantiles)))
    )


def draw_distributions(columns: dict[str, Sequence[Watched]], path: Path) -> None:
    """Plot every measure's cumulative distribution in each list of videos."""
    figure, axes = pyplot.subplots(1, len(MEASURES), figsize=(16, 4), layout="constrained", sharey=True)
    for axis, (measure, value) in zip(axes, MEASURES.items()):
        for name, videos in columns.items():
            values = np.sort([value(video) for video in videos])
            axis.plot(values, np.arange(1, len(values) + 1) / len(values), label=name)
        axis.set_xlabel(measure, fontsize=8)
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="share of videos")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def draw_strips(watched: Sequence[Watched], videos: Sequence[NDArray[np.uint8]], directory: Path) -> None:
    """Draw, for each group, the videos whose ways are best, median and worst, above how the real ones went on."""
    for group in GROUPS:
        numbers = [i for i, video in enumerate(watched) if video.group == group]
        order = sorted(numbers, key=lambda i: watched[i].verdict.way_error)
        each = min(3, len(order) // 3)
        middle = (len(order) - each) // 2
        chosen = {"best": order[:each], "median": order[middle : middle + each], "worst": order[len(order) - each :]}
        strips = []
        for rank, indices in chosen.items():
            for i in indices:
                story = watched[i].story
                truth = film(story, videos[i].shape[1])
                strips.append(film_strip(truth[0], videos[i], truth, caption=f"{rank}: {story.caption}"))
        if strips:
            stack(strips).save(directory / f"strips_{group.replace(' ', '_')}.png")


def draw_grids(sampler: Sampler, directory: Path) -> None:
    """Animate the demo's picture as nine sentences say, and nine pictures as one sentence says."""
    alone = [
        story
        for i in range(400)
        if len((story := sample_story(SEED + 1, i, sampler.size, sampler.size, looks="seen")).things) == 1
        and all(0.35 < place < 0.65 for place in story.starts[0])
    ]
    pictures = [first_frame(story, sampler.size) for story in alone[:9]]
    drawing = np.asarray(Image.open(demo.IMAGE).resize((sampler.size, sampler.size), Image.Resampling.BOX))
    grids = {
        "nine_sentences.webp": ([drawing] * len(SENTENCES), SENTENCES),
        "nine_pictures.webp": (pictures, ["it goes to the right"] * len(pictures)),
    }
    for name, (images, prompts) in grids.items():
        grid = video_grid(sampler(images, prompts, seed=0), len(prompts))
        save_video(directory / name, grid.repeat(2, axis=1).repeat(2, axis=2), FPS, {"prompts": list(prompts)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a pipeline's directory")
    parser.add_argument("--output", type=Path, required=True, help="a new directory")
    parser.add_argument("--scenes", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="videos of each scene (default: %(default)s)")
    parser.add_argument("--num-inference-steps", type=int, help="default: the model's")
    parser.add_argument("--guidance-scale", type=float, help="default: the model's")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    try:
        options.output.mkdir(parents=True)
    except FileExistsError:
        sys.exit(f"{options.output} exists: name a new directory")

    pipeline = FlashI2VPipeline.from_pretrained(options.model).to(options.device)
    pipeline.set_progress_bar_config(disable=True)
    sampler = make_sampler(pipeline, options.num_inference_steps, options.guidance_scale)
    stories = make_stories(options.scenes, sampler.size)
    alone = [watched(pair, reconstruct(pipeline, film(pair[1], sampler.size))) for pair in tqdm(stories, "VAE alone")]
    found, videos, rows = [], [], []
    for seed in range(options.seeds):
        for i, (pair, frames) in enumerate(zip(stories, sampler.from_stories(stories, seed))):
            found.append(watched(pair, frames))
            videos.append(frames)
            values = {**dataclasses.asdict(found[-1].verdict), "psnr": found[-1].psnr}
            rows.append({"scene": i, "seed": seed, "group": pair[0], "prompt": pair[1].caption, **values})
    columns: dict[str, Sequence[Watched]] = {"all": found}
    columns |= {group: [video for video in found if video.group == group] for group in GROUPS}
    columns |= {"VAE alone": alone, "truth": [watched(pair, film(pair[1], sampler.size)) for pair in stories]}
    columns = {name: listed for name, listed in columns.items() if listed}
    settings: dict[str, Any] = {name: getattr(options, name) for name in ("model", "scenes", "seeds")}
    settings |= {name: getattr(sampler, name) for name in ("num_inference_steps", "guidance_scale")}
    text = report(columns)
    (options.output / "evaluation.json").write_text(json.dumps({"settings": settings, "videos": rows}, indent=1) + "\n")
    told = ", ".join(f"{name} {value}" for name, value in settings.items())
    (options.output / "report.md").write_text(f"{told}\n\n{text}\n")
    draw_distributions(columns, options.output / "distributions.png")
    draw_strips(found, videos, options.output)
    draw_grids(sampler, options.output)
    print(text)


if __name__ == "__main__":
    main()
