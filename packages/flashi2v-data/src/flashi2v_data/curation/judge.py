"""Judging entries of meta JSON: their form, what their videos must say, and the limits."""

import functools
import os
from collections.abc import Iterator
from typing import Any, cast

from msgspec import UNSET, UnsetType

from flashi2v_data.curation.caption_audit import CaptionAudit
from flashi2v_data.curation.config import FilterConfig
from flashi2v_data.curation.meta import PlainEntry
from flashi2v_data.curation.rules import (
    LENGTH_RULES,
    MOTION_RULES,
    ORDER,
    REASONS,
    SIZE_RULES,
    Drop,
    Length,
    Limits,
    Motion,
    Part,
    Reason,
    Rule,
    Size,
    first_drop,
    is_number,
    is_positive,
    judge_length,
    judge_motion,
    judge_size,
)
from flashi2v_data.records import Record
from flashi2v_data.video.probe import VideoInfo

# Distinct sizes and lengths whose verdict is remembered: most clips of a set share theirs with others.
_REMEMBERED = 1 << 15

FORMS: tuple[Reason, ...] = ("invalid_entry", "no_cap", "invalid_cut", "invalid_crop")


def form_fault(entry: Any) -> Reason | None:
    """Return what is wrong with an entry before its numbers are looked at; the reasons in the order of FORMS."""
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str) or not entry["path"]:
        return "invalid_entry"
    caption = entry.get("cap")
    is_list = isinstance(caption, list) and caption and all(isinstance(text, str) for text in caption)
    if not isinstance(caption, str) and not is_list:
        return "no_cap"
    if "cut" in entry:
        cut = entry["cut"]
        if not isinstance(cut, list) or not cut or not all(map(_is_index, cut)) or _is_empty(cut):
            return "invalid_cut"
    if "crop" in entry:
        crop = entry["crop"]
        if not isinstance(crop, list) or len(crop) != 4 or not all(map(_is_index, crop)):
            return "invalid_crop"
        left, right, top, bottom = crop
        if left >= right or top >= bottom or ("resolution" in entry and _is_crop_too_large(entry)):
            return "invalid_crop"
    return None


def _is_empty(cut: list[Any]) -> bool:
    return len(cut) > 1 and bool(cut[1] <= cut[0])


def _is_crop_too_large(entry: dict[str, Any]) -> bool:
    """Tell whether a well-formed crop exceeds the picture; where that has no usable size, another rule says so."""
    height, width = size_of(entry)
    _, right, _, bottom = entry["crop"]
    return (is_positive(height) and bottom > height) or (is_positive(width) and right > width)


def _is_index(value: Any) -> bool:
    return is_number(value) and value >= 0 and value == int(value)


def is_complete(entry: dict[str, Any]) -> bool:
    """Tell whether an entry needs no look into the video."""
    return "resolution" in entry and "fps" in entry and "num_frames" in entry


def complete(entry: dict[str, Any], info: VideoInfo, config: FilterConfig) -> Drop | None:
    """Fill in what an entry leaves out."""
    if info.is_hdr and not config.tone_map:
        return Drop("hdr")
    if "resolution" not in entry:
        height, width = info.size(config.geometry)
        entry["resolution"] = {"height": height, "width": width}
        if "crop" in entry and _is_crop_too_large(entry):
            return Drop("invalid_crop")
    entry.setdefault("fps", info.fps)
    if "num_frames" not in entry:
        # Without a number of its own the clip is as long as its cut, within the video.
        start, *end = entry.get("cut", [0])
        num_frames = int(min([*end[:1], info.num_frames]) - start)
        if num_frames <= 0:
            return Drop("invalid_cut")
        entry["num_frames"] = num_frames
    return None


class Judge:
    """Judges entries of meta JSON by the limits of a config."""

    def __init__(self, config: FilterConfig) -> None:
        self._config = config
        self._drops_empty = config.drop_empty_captions
        self.audit = CaptionAudit(config)
        self.limits = Limits(*(getattr(config, name) for name in Limits._fields))
        remember = functools.lru_cache(_REMEMBERED)
        self._size = remember(functools.partial(judge_size, self.limits))
        self._length = remember(functools.partial(judge_length, self.limits))
        self._motion = remember(functools.partial(judge_motion, self.limits))

    def __reduce__(self) -> tuple[type["Judge"], tuple[FilterConfig]]:
        """Travel to another process without what is remembered."""
        return Judge, (self._config,)

    def __call__(self, entry: Any, info: VideoInfo | None = None) -> Record | Drop | None:
        """Return the complete record of a clip (its entry, completed), or why it is dropped.

        What an entry leaves out is taken from `info`; None is returned where it leaves out something and there is no
        info. A value that is there and unusable (null, say) drops the clip.
        """
        if (reason := form_fault(entry)) is not None:
            return Drop(reason)
        if self._drops_empty and self.audit.nothing_left(entry["cap"]):
            return Drop("empty_cap")
        if info is not None:
            if (drop := complete(entry, info, self._config)) is not None:
                return drop
        elif not is_complete(entry):
            return None
        size, length, motion = self._parts(entry)
        if size is not None or length is not None or motion is not None:
            return first_drop(size, length, motion)
        entry["num_frames"] = int(entry["num_frames"])
        cut = entry.get("cut")
        entry["start_frame_idx"] = int(cut[0]) if cut else 0
        if "crop" in entry:
            entry["crop"] = [int(side) for side in entry["crop"]]
        return cast(Record, entry)

    def plain(self, entries: list[PlainEntry], root: str) -> tuple[list[PlainEntry], list[Drop]]:
        """Judge plain entries by the same rules; return those that fit, completed, and why the others are dropped."""
        judge_size, judge_length, judge_motion = self._size, self._length, self._motion
        prefix, kept, drops = os.path.join(root, ""), [], []
        for entry in entries:
            resolution, motion, cut = entry.resolution, entry.motion, entry.cut
            if cut is not UNSET and len(cut) > 1 and cut[1] <= cut[0]:  # `_is_empty`, without a call for every entry
                drops.append(Drop("invalid_cut"))
                continue
            if self._drops_empty and self.audit.nothing_left(entry.cap):
                drops.append(Drop("empty_cap"))
                continue
            size = judge_size(resolution.height, resolution.width)
            length = judge_length(entry.fps, entry.num_frames)
            moved = None if motion is UNSET else judge_motion(motion)
            if size is None and length is None and moved is None:
                if not entry.path.startswith("/"):
                    entry.path = prefix + entry.path
                entry.start_frame_idx = 0 if cut is UNSET else cut[0]
                kept.append(entry)
            else:
                drops.append(first_drop(size, length, moved))
        return kept, drops

    def _parts(self, entry: dict[str, Any]) -> Iterator[Drop | None]:
        for judge, judge_anything, numbers in (
            (self._size, judge_size, size_of(entry)),
            (self._length, judge_length, (entry["fps"], entry["num_frames"])),
            (self._motion, judge_motion, (entry.get("motion", UNSET),)),
        ):
            # Lists and objects cannot be remembered, and True would be taken for 1.
            if all(type(number) in (int, float, UnsetType) for number in numbers):
                yield judge(*numbers)
            else:
                yield judge_anything(self.limits, *numbers)

    def explain(self, entry: Any, info: VideoInfo | None, fault: str | None) -> list[str]:
        """Return one line for every rule that was reached: passed or failed, with the value and the limit.

        Args:
            entry: of meta JSON.
            info: from the video, where the entry leaves something out.
            fault: why the video could not be read.
        """
        wrong = form_fault(entry)
        reached = FORMS if wrong is None else FORMS[: FORMS.index(wrong) + 1]
        lines = [_line(reason != wrong, reason) for reason in reached]
        if wrong is not None:
            return lines
        if self._drops_empty:
            is_empty = self.audit.nothing_left(entry["cap"])
            lines.append(_line(not is_empty, "empty_cap"))
            if is_empty:
                return lines
        if not is_complete(entry):
            if info is None:
                return [*lines, _line(False, "unreadable", str(fault))]
            lines.append(_line(True, "unreadable", f"the video says {info}"))
            if (drop := complete(entry, info, self._config)) is not None:
                return [*lines, _line(False, drop.reason)]
        limits, size, length = self.limits, Size(*size_of(entry)), Length(entry["fps"], entry["num_frames"])
        motion = Motion(entry.get("motion", UNSET))
        malformed = {drop.reason for drop in self._parts(entry) if drop is not None and drop.reason in _MALFORMED}
        lines += [_line(False, reason) for reason in sorted(malformed, key=ORDER.__getitem__)]
        if not malformed:
            lines += [_measured(rule, size, limits) for rule in SIZE_RULES]
            lines += [_measured(rule, length, limits) for rule in LENGTH_RULES if getattr(limits, rule.setting)]
            lines += [_measured(rule, motion, limits) for rule in MOTION_RULES if motion.score is not UNSET]
        return lines


_MALFORMED = ("no_resolution", "no_fps", "no_num_frames", "invalid_motion")


def size_of(entry: dict[str, Any]) -> tuple[Any, Any]:
    """Return height and width, whatever they are, of a complete entry."""
    resolution = entry["resolution"]
    return (resolution.get("height"), resolution.get("width")) if isinstance(resolution, dict) else (None, None)


def _measured(rule: Rule[Part], part: Part, limits: Limits) -> str:
    limit = f"{rule.setting} {getattr(limits, rule.setting):.10g}"
    return _line(rule.passes(part, limits), rule.reason, f"{limit}, the clip has {rule.measure(part, limits):.10g}")


def _line(passed: bool, reason: Reason, measured: str = "") -> str:
    text = measured or ("" if passed else REASONS[reason])
    return f"{'passes' if passed else 'FAILS':8}{reason:17}{text}".rstrip()
