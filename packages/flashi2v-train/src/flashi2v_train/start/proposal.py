"""Size, frames and rate that fit the videos and the model, and the clips that this keeps."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from flashi2v_data.curation.config import FilterConfig
from flashi2v_data.curation.judge import Judge
from flashi2v_data.curation.rules import REASONS, Rejection, area_at_ratio
from flashi2v_data.errors import InputError
from flashi2v_data.loading.buckets import BucketTable, Shape, propose_buckets
from flashi2v_data.loading.config import Bucket
from flashi2v_data.records import Size
from flashi2v_train.start.base import Base
from flashi2v_train.start.options import SIZE_STEP, InitOptions
from flashi2v_train.start.videos import Clip

_MAX_FPS = 16.0  # what Wan2.1's VAE and FlashI2V were trained at
# A setting is chosen so that so many clips can keep it; the rest may be odd ones.
_MOST = 0.1
_WIDEST = 4.0  # side to side: what is wider is no picture but a banner


@dataclass(frozen=True)
class Proposal:
    """What samples will look like.

    Attributes:
        settings: of the filter.
        kept: of the clips that were opened, those that it keeps.
        dropped: how many it drops, by reason.
        size: of samples; with buckets, of the largest.
        buckets: clips that go to each; none where all samples are of one size.
        main: of the clips that it keeps, those of which some may be held out.
    """

    settings: FilterConfig
    kept: list[Clip]
    dropped: dict[str, int]
    size: Bucket
    buckets: dict[Bucket, int]
    main: list[Clip]


def propose(clips: Sequence[Clip], base: Base, options: InitOptions, run: Path, *, has_images: bool) -> Proposal:
    """Choose what is not given.

    Args:
        clips: that were opened.
        base: what to start from.
        options: of the user.
        run: directory of the run.
        has_images: there are clips of one frame, too, which buckets may be for.

    Raises:
        InputError: frames are not 4k + 1, or no clip fits.
    """
    sizes = [Size(*clip.info.size("upright")) for clip in clips]
    height, width = options.pixels() or _size(sizes, base.pixels)
    fps = min(_MAX_FPS, float(np.quantile([clip.info.fps for clip in clips], _MOST, method="lower")))
    lengths = [math.floor(clip.num_frames * fps / clip.info.fps + 1e-6) for clip in clips]
    sample = Bucket(_num_frames(options, base, lengths, fps), height, width)
    limits = FilterConfig(
        ann_txt_path=str(run / "videos.txt"),
        save_path=str(run / "store"),
        sample_height=height,
        sample_width=width,
        sample_num_frames=sample.num_frames,
        min_hxw=1,
        train_fps=fps,
        max_h_div_w_ratio=round(2 * height / width, 2),
        min_h_div_w_ratio=round(height / width / 2, 2),
        too_long_factor=float(max(5, math.ceil(max(lengths) / sample.num_frames) + 1)),
    )
    if options.buckets:
        shapes = [Shape(length, size.height, size.width) for length, size in zip(lengths, sizes)]
        table = BucketTable(shapes, propose_buckets(shapes, sample), limits.ann_txt_path)
        shortest = 1 if has_images else min(bucket.num_frames for bucket in table.buckets)
        wider: dict[str, Any] = {"max_h_div_w_ratio": _WIDEST, "min_h_div_w_ratio": 1 / _WIDEST}
        wider |= {"sample_num_frames": shortest, "too_long_factor": float(math.ceil(max(lengths) / shortest) + 1)}
        found = _judged(clips, limits.model_copy(update=wider), sample)
        main = sample if sample in table.buckets else table.buckets[0]
        members = {id(clips[index]) for index in table.members(main)}
        counts = dict(zip(table.buckets, table.counts))
        return replace(found, buckets=counts, main=[clip for clip in found.kept if id(clip) in members])
    areas = [area_at_ratio(size, limits) for size in sizes]
    least = min(height * width, int(np.quantile(areas, _MOST, method="lower")))
    return _judged(clips, limits.model_copy(update={"min_hxw": least}), sample)


def _num_frames(options: InitOptions, base: Base, lengths: Sequence[int], fps: float) -> int:
    """Return the frames of a sample; `lengths` are those that clips have at `fps`."""
    frames = options.frames
    if frames is None:
        # With buckets half of the clips may be shorter.
        usual = int(np.quantile(lengths, 0.5 if options.buckets else _MOST, method="lower"))
        frames = min(base.frames, (usual - 1) // 4 * 4 + 1)
        if frames < 5:
            raise InputError(
                f"one clip in ten is shorter than 5 frames at {fps:g} frames a second, too short to show motion: "
                "leave such clips out, or set --frames"
            )
    elif frames < 1 or frames % 4 != 1:
        lower = max(1, frames // 4 * 4 + 1)
        raise InputError(f"--frames {frames}: must be 4k + 1 for the VAE: use {lower} or {lower + 4}")
    return frames


def _size(sizes: Sequence[Size], pixels: int) -> tuple[int, int]:
    """Return height and width with the clips' usual shape, and no more pixels than most of them, or the model, have."""
    shape = float(np.median([math.log(size.height / size.width) for size in sizes]))
    area = min(pixels, int(np.quantile([size.height * size.width for size in sizes], _MOST, method="lower")))
    if area < SIZE_STEP**2:
        raise InputError(
            f"the videos have {area} pixels, fewer than {SIZE_STEP}x{SIZE_STEP}, the smallest size there is"
        )
    candidates = [
        (height, width)
        for height in range(SIZE_STEP, area // SIZE_STEP + 1, SIZE_STEP)
        for width in range(SIZE_STEP, area // height + 1, SIZE_STEP)
    ]

    def misfit(size: tuple[int, int]) -> float:
        height, width = size
        return 2 * abs(math.log(height / width) - shape) + math.log(area / (height * width))

    return min(candidates, key=misfit)


def _judged(clips: Sequence[Clip], settings: FilterConfig, sample: Bucket) -> Proposal:
    judge, kept, dropped = Judge(settings), [], Counter[str]()
    for clip in clips:
        verdict = judge(clip.entry, clip.info)
        if isinstance(verdict, Rejection):
            dropped[verdict.reason] += 1
        else:
            kept.append(clip)
    if not kept:
        reason, number = dropped.most_common(1)[0]
        raise InputError(
            f"no clip fits {settings.sample_num_frames} frames of {settings.sample_height}x{settings.sample_width} at "
            f"{settings.train_fps:g} frames a second: {number} of {len(clips)}: {REASONS[reason]}"
        )
    return Proposal(settings, kept, dict(dropped), sample, {}, kept)
