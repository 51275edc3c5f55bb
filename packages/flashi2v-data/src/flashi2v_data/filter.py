"""Which clips are fit for training, with a count for every reason why others are not."""

import collections
import functools
import itertools
import math
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard, cast, get_args

from flashi2v_data.config import FilterConfig
from flashi2v_data.errors import DecodeError
from flashi2v_data.frames import frame_indices, frame_interval
from flashi2v_data.probe import VideoInfo, probe
from flashi2v_data.records import Record
from flashi2v_data.store import is_storable

# In the order in which the rules apply: a clip is counted under the first that drops it.
Reason = Literal[
    "invalid_entry",
    "no_cap",
    "unreadable",
    "no_resolution",
    "aspect_mismatch",
    "res_too_small",
    "no_fps",
    "no_num_frames",
    "invalid_cut",
    "too_long",
    "fps_too_low",
    "too_short",
    "invalid_motion",
    "too_fast",
    "too_slow",
]
REASONS: dict[Reason, str] = {
    "invalid_entry": "is no JSON object with a path, or holds values that cannot be stored",
    "no_cap": "has no caption",
    "unreadable": "leaves out resolution, fps or num_frames, and the video cannot be read",
    "no_resolution": "height or width is not a positive number",
    "aspect_mismatch": "height / width is outside min_h_div_w_ratio ... max_h_div_w_ratio",
    "res_too_small": "fewer than min_hxw pixels at the sample's aspect ratio",
    "no_fps": "fps is not a positive number",
    "no_num_frames": "num_frames is not a positive whole number",
    "invalid_cut": "cut is not [first frame, end]",
    "too_long": "longer than too_long_factor samples",
    "fps_too_low": "fps below train_fps",
    "too_short": "fewer than sample_num_frames frames at train_fps",
    "invalid_motion": "motion is not a number",
    "too_fast": "motion below min_motion_value",
    "too_slow": "motion above max_motion_value",
}
assert tuple(REASONS) == get_args(Reason)

# Entries that one task of a worker process holds: enough to make the hand-over cheap.
CHUNK = 64


@dataclass
class FilterReport:
    """How many clips came in, were kept, and were dropped for which reason."""

    total: int = 0
    kept: int = 0
    dropped: dict[Reason, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))

    def __str__(self) -> str:
        """Lay the counts out as a table."""
        rows = [("total", self.total, ""), ("kept", self.kept, "")]
        rows += [(reason, self.dropped[reason], text) for reason, text in REASONS.items()]
        return "\n".join(f"{name:16}{count:>12,}  {text}".rstrip() for name, count, text in rows)


def filter_records(
    entries: Iterable[Any], config: FilterConfig, report: FilterReport | None = None, *, jobs: int = 1
) -> Iterator[Record]:
    """Yield the clips that fit, in order, complete with what their entries left out.

    Args:
        entries: of meta JSON, as `records.read_entries` yields them.
        config: the limits.
        report: counts every entry as it passes.
        jobs: processes; they pay where entries leave out what must then be read from the video.
    """
    report = FilterReport() if report is None else report
    judge = functools.partial(_judge_chunk, config=config)
    for outcomes in _map_in_order(judge, _chunks(entries), jobs):
        for outcome in outcomes:
            report.total += 1
            if isinstance(outcome, str):
                report.dropped[outcome] += 1
            else:
                report.kept += 1
                yield outcome


def judge_entry(entry: Any, config: FilterConfig, read: Callable[[str], VideoInfo] = probe) -> Record | Reason:
    """Return the complete record of a clip, or why it is dropped.

    What an entry leaves out is read from the video; a value that is there and unusable (null, say) drops the clip.
    """
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        return "invalid_entry"
    caption = entry.get("cap")
    is_list = isinstance(caption, list) and caption and all(isinstance(text, str) for text in caption)
    if not isinstance(caption, str) and not is_list:
        return "no_cap"
    if {"resolution", "fps", "num_frames"} <= entry.keys():
        info = None
    else:
        try:
            info = read(entry["path"])
        except DecodeError:
            return "unreadable"
    record = dict(entry)
    for rule in (_judge_size, _judge_length, _judge_motion):
        reason = rule(record, config, info)
        if reason is not None:
            return reason
    # Whole numbers beyond 64 bits and broken Unicode have no place in the store.
    return cast(Record, record) if is_storable(record) else "invalid_entry"


def _judge_size(record: dict[str, Any], config: FilterConfig, info: VideoInfo | None) -> Reason | None:
    if "resolution" not in record:
        assert info is not None
        record["resolution"] = {"height": info.height, "width": info.width}
    resolution = record["resolution"]
    if not isinstance(resolution, dict):
        return "no_resolution"
    height, width = resolution.get("height"), resolution.get("width")
    if not _is_positive(height) or not _is_positive(width):
        return "no_resolution"
    if not config.min_h_div_w_ratio <= height / width <= config.max_h_div_w_ratio:
        return "aspect_mismatch"
    # The area of the largest part of the picture that has the sample's aspect ratio; products before the division
    # keep whole numbers exact.
    sample_height, sample_width = config.sample_height, config.sample_width
    if height * sample_width > width * sample_height:
        area = width * width * sample_height / sample_width
    else:
        area = height * height * sample_width / sample_height
    return "res_too_small" if area < config.min_hxw else None


def _judge_length(record: dict[str, Any], config: FilterConfig, info: VideoInfo | None) -> Reason | None:
    if "fps" not in record:
        assert info is not None
        record["fps"] = info.fps
    if not _is_positive(record["fps"]):
        return "no_fps"
    cut = record.get("cut", [0])
    if "num_frames" in record:
        num_frames = record["num_frames"]
        if not _is_positive(num_frames) or num_frames != int(num_frames):
            return "no_num_frames"
    if not isinstance(cut, list) or not cut or not all(_is_index(position) for position in cut):
        return "invalid_cut"
    start = int(cut[0])
    if "num_frames" not in record:
        assert info is not None
        # Without a number of its own the clip is as long as its cut, within the video.
        end = min(int(cut[1]), info.num_frames) if len(cut) > 1 else info.num_frames
        num_frames = end - start
        if num_frames <= 0:
            return "invalid_cut"
    record["num_frames"], record["start_frame_idx"] = int(num_frames), start

    fps, sample_num_frames = record["fps"], config.sample_num_frames
    interval = frame_interval(fps, config.train_fps, config.sample_stride)
    # The limit uses the exact ratio of rates, as in the reference, not the tolerant interval.
    span = sample_num_frames * fps / config.train_fps if config.train_fps else sample_num_frames * interval
    if num_frames > config.too_long_factor * span:
        return "too_long"
    if interval < 1:
        return "fps_too_low"
    if len(frame_indices(start, record["num_frames"], interval)) < sample_num_frames:
        return "too_short"
    return None


def _judge_motion(record: dict[str, Any], config: FilterConfig, info: VideoInfo | None) -> Reason | None:
    if "motion" not in record:
        return None
    motion = record["motion"]
    if not _is_number(motion):
        return "invalid_motion"
    # The motion score falls as the motion grows.
    if motion < config.min_motion_value:
        return "too_fast"
    return "too_slow" if motion > config.max_motion_value else None


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_positive(value: Any) -> TypeGuard[float]:
    return _is_number(value) and value > 0


def _is_index(value: Any) -> bool:
    return _is_number(value) and value >= 0 and value == int(value)


def _judge_chunk(chunk: list[Any], config: FilterConfig) -> list[Record | Reason]:
    return [judge_entry(entry, config) for entry in chunk]


def _chunks(entries: Iterable[Any]) -> Iterator[list[Any]]:
    entries = iter(entries)
    while chunk := list(itertools.islice(entries, CHUNK)):
        yield chunk


def _map_in_order(
    judge: Callable[[list[Any]], list[Record | Reason]], chunks: Iterator[list[Any]], jobs: int
) -> Iterator[list[Record | Reason]]:
    """Map over chunks in `jobs` processes, holding no more than a few chunks for each in memory."""
    if jobs == 1:
        yield from map(judge, chunks)
        return
    # Fresh processes: forking one that has decoder threads may deadlock. An interrupt is the parent's to handle.
    context, ignore_interrupt = multiprocessing.get_context("spawn"), (signal.SIGINT, signal.SIG_IGN)
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=signal.signal, initargs=ignore_interrupt)
    try:
        pending: collections.deque[Future[list[Record | Reason]]] = collections.deque()
        for chunk in chunks:
            pending.append(pool.submit(judge, chunk))
            if len(pending) >= 4 * jobs:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
