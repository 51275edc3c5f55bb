"""Which of several shapes a clip is brought to. T frames, H W height and width, h w of the clip as it is stored.

A bucket is a shape (T, H, W) that clips are trained in. A clip of several frames goes to a bucket of several frames
that it is long enough for, an image to a bucket of one frame. Of those that may take it, it goes where most of it is
kept: the share of its picture that is left behind the crop, times the frames. Where two keep the same to within 2 %, it
goes to the larger one, but to none that would enlarge it by more than a tenth as long as there is another.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashi2v_data.errors import InputError, RecordError
from flashi2v_data.loading.config import Bucket, DatasetParam
from flashi2v_data.records import Record
from flashi2v_data.store.reader import LmdbStore, open_store
from flashi2v_data.video.frames import frame_indices, frame_interval

_ENLARGED = 1.1
_KEPT_ALIKE = 0.98
# Width over height of the buckets that "auto" chooses from: what films, telephones and cameras record.
_RATIOS = (21 / 9, 16 / 9, 3 / 2, 4 / 3, 1.0, 3 / 4, 2 / 3, 9 / 16, 9 / 21)
# Of all clips; a bucket of fewer is not worth its steps.
_LEAST_SHARE = 0.01
# A clip of more frames, at the training rate, is none: a day and a half at 60 frames a second.
MAX_FRAMES = 10_000_000


class Shape(NamedTuple):
    """What a clip offers: its frames at the training rate, and the pixels of its picture."""

    num_frames: int
    height: float
    width: float


def choose(shape: Shape, buckets: Sequence[Bucket]) -> int | None:
    """Return the number of the bucket where most of a clip is kept; None where it is too short for each."""
    may = [
        number
        for number, bucket in enumerate(buckets)
        if bucket.num_frames <= shape.num_frames and bucket.is_image == (shape.num_frames == 1)
    ]
    enlarged = [max(buckets[n].height / shape.height, buckets[n].width / shape.width) for n in may]
    fitting = [number for number, factor in zip(may, enlarged) if factor <= _ENLARGED] or may
    if not fitting:
        return None
    kept = {number: _kept(shape, buckets[number]) for number in fitting}
    most = max(kept.values())
    alike = [number for number in fitting if kept[number] >= _KEPT_ALIKE * most]
    return max(alike, key=lambda number: (math.prod(buckets[number]), kept[number], buckets[number]))


def _kept(shape: Shape, bucket: Bucket) -> float:
    """Return the frames that are kept, times the share of the picture that is left behind the crop."""
    ours, theirs = bucket.width / bucket.height, shape.width / shape.height
    return bucket.num_frames * min(ours / theirs, theirs / ours)


def shape_of(record: Record, config: DatasetParam) -> Shape | None:
    """Return what a record offers; None where it does not say so."""
    size, crop = record.get("resolution"), record.get("crop")
    sides = (size["height"], size["width"]) if size else (0, 0)
    if isinstance(crop, list) and all(type(side) is int for side in crop):
        left, right, top, bottom = crop
        sides = (bottom - top, right - left)
    interval = frame_interval(record["fps"], config.train_fps, config.sample_stride)
    if min(sides) <= 0 or record["num_frames"] / interval > MAX_FRAMES:
        return None
    return Shape(len(frame_indices(record["start_frame_idx"], record["num_frames"], interval)), *sides)


def read_shapes(store: LmdbStore, config: DatasetParam) -> list[Shape | None]:
    """Read what all clips of a store offer; None for a record that is at fault."""

    def shapes() -> Iterator[Shape | None]:
        for index in range(len(store)):
            try:
                yield shape_of(store[index], config)
            except RecordError:
                yield None

    return [*shapes()]


class BucketTable:
    """The buckets of a set of clips, and which clip goes where.

    Args:
        shapes: of all clips; None for a record that is at fault.
        buckets: to choose from.
        where: the clips are, for messages.

    Attributes:
        buckets: as given.
        number_of: (clips,) the number of every clip's bucket, -1 where it fits none.
        counts: clips in every bucket.
    """

    def __init__(self, shapes: Sequence[Shape | None], buckets: Sequence[Bucket], where: str) -> None:
        self.buckets = tuple(buckets)
        chosen = {shape: choose(shape, self.buckets) for shape in set(shapes) if shape is not None}
        numbers = [None if shape is None else chosen[shape] for shape in shapes]
        self.number_of: NDArray[np.int64] = np.array([-1 if n is None else n for n in numbers], np.int64)
        self.counts = np.bincount(self.number_of + 1, minlength=len(buckets) + 1)[1:].tolist()
        self._where = where

    def check_filled(self) -> None:
        """Refuse buckets that nothing is learnt from.

        Raises:
            InputError: no clip goes to one of them.
        """
        empty = " or ".join(str(bucket) for bucket, count in zip(self.buckets, self.counts) if not count)
        if empty:
            raise InputError(
                f"buckets: no clip of {self._where} goes to {empty}: take it out, or filter for clips that do"
            )

    @property
    def num_left_out(self) -> int:
        """Clips that fit no bucket."""
        return int((self.number_of < 0).sum())

    def members(self, bucket: Bucket) -> list[int]:
        """Return the clips of a bucket, ascending."""
        found: list[int] = np.flatnonzero(self.number_of == self.buckets.index(bucket)).tolist()
        return found


def build_table(store: LmdbStore, config: DatasetParam) -> BucketTable:
    """Put the clips of a store into the buckets of a data file."""
    shapes = read_shapes(store, config)
    largest = Bucket(config.sample_num_frames, config.sample_height, config.sample_width)
    buckets = config.buckets if isinstance(config.buckets, list) else propose_buckets(shapes, largest)
    return BucketTable(shapes, buckets, str(store.paths[0]))


def resolve(config: DatasetParam) -> DatasetParam:
    """Replace "auto" by the buckets that suit the store.

    Raises:
        InputError: there is no store, or a bucket that no clip of it goes to.
    """
    table = build_table(open_store(config.metafile_or_dir_path), config)
    table.check_filled()
    return config.model_copy(update={"buckets": [*table.buckets]})


def propose_buckets(shapes: Sequence[Shape | None], largest: Bucket) -> list[Bucket]:
    """Return buckets that suit some clips ("auto"), none of more pixels or frames than the largest.

    Sizes are those of the usual ratios that come nearest to the largest one's area, divisible by 16. Lengths are that
    of the largest, then about half and a quarter for shorter clips, and one frame for images. Buckets that few clips
    would go to are left out, but for the fullest of each length, so that no clip is left without. The fullest comes
    first, images last.
    """
    sizes = [_size_within(largest.height * largest.width, ratio) for ratio in _RATIOS]
    sizes.append((largest.height, largest.width))
    quarters = (largest.num_frames - 1) // 4
    lengths = {largest.num_frames, *(4 * (quarters // part) + 1 for part in (2, 4) if quarters >= part), 1}
    all_buckets = sorted({Bucket(length, *size) for length in lengths for size in sizes})
    known = Counter(shape for shape in shapes if shape is not None)
    counts = _count(known, all_buckets)
    fullest = {bucket.num_frames: bucket for bucket, _ in reversed(counts.most_common())}
    least = _LEAST_SHARE * known.total()
    buckets = [bucket for bucket in counts if counts[bucket] >= least or fullest[bucket.num_frames] == bucket]
    while len(counts := _count(known, buckets)) < len(buckets):  # without the others a clip may go elsewhere
        buckets = [*counts]
    return sorted(buckets, key=lambda bucket: (bucket.is_image, -counts[bucket], bucket))


def _count(shapes: Counter[Shape], buckets: Sequence[Bucket]) -> Counter[Bucket]:
    """Count the clips of the buckets that any go to."""
    counts: Counter[Bucket] = Counter()
    for shape, number in shapes.items():
        if (bucket := choose(shape, buckets)) is not None:
            counts[buckets[bucket]] += number
    return counts


def _size_within(area: int, ratio: float) -> tuple[int, int]:
    """Return height and width, divisible by 16, of an area at most and a ratio as near as that allows."""
    height = max(16, round(math.sqrt(area / ratio) / 16) * 16)
    width = max(16, round(height * ratio / 16) * 16)
    while height * width > area and max(height, width) > 16:
        height, width = (height - 16, width) if height > width else (height, width - 16)
    return height, width
