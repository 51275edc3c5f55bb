"""Judging entries of meta JSON: by their schema, by what their videos say, and by the limits."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import msgspec
from msgspec import UNSET

from flashi2v_data.curation.caption_audit import CaptionAudit
from flashi2v_data.curation.config import FilterConfig
from flashi2v_data.curation.rules import (
    LENGTH_RULES,
    MOTION_RULES,
    REASONS,
    REJECTIONS,
    SIZE_RULES,
    Length,
    Motion,
    Part,
    Rejection,
    Rule,
    first_rejection,
    judge_length,
    judge_motion,
    judge_signals,
    judge_size,
    signal_rules,
)
from flashi2v_data.errors import DecodeError
from flashi2v_data.records import SIGNAL_COLUMNS, Entry, PlainEntry, Size, with_whole_numbers
from flashi2v_data.video.probe import VideoInfo

# Distinct sizes and lengths whose verdict is remembered: most clips of a set share theirs with others.
_REMEMBERED = 1 << 15
# What a key that does not fit the schema is counted as.
FAULTS = {
    "path": "invalid_entry",
    "cap": "no_cap",
    "resolution": "no_resolution",
    "fps": "no_fps",
    "num_frames": "no_num_frames",
    "motion": "invalid_motion",
    "cut": "invalid_cut",
    "crop": "invalid_crop",
    **dict.fromkeys(SIGNAL_COLUMNS, "invalid_signal"),
}

# A clip is kept, or leaves out something that its video must say, or is rejected.
Verdict = Rejection | Literal["kept", "incomplete"]


def read_entry(entry: Any) -> Entry | Rejection:
    """Return what a meta JSON holds as the schema has it, or why it does not fit."""
    try:
        return msgspec.convert(entry, Entry)
    except (msgspec.ValidationError, UnicodeEncodeError):
        fixed = with_whole_numbers(entry)
        if fixed is not entry:
            return read_entry(fixed)
    # The message names the fault that comes first in the entry; the rules have an order of their own.
    for field in msgspec.structs.fields(Entry) if isinstance(entry, dict) else ():
        if field.required or field.name in entry:
            try:
                msgspec.convert(entry.get(field.name), field.type)
            except (msgspec.ValidationError, UnicodeEncodeError):
                return Rejection(FAULTS[field.name])
    return Rejection("invalid_entry")


def record_of(clip: Entry, entry: dict[str, Any] | None) -> Any:
    """Return the record of a clip that is kept, as it is stored.

    Args:
        clip: complete.
        entry: what it was read from, with further keys; None where it has none.
    """
    start = clip.cut[0] if clip.cut is not UNSET else 0
    if entry is None:
        assert isinstance(clip, PlainEntry)
        clip.start_frame_idx = start
        return clip
    known = msgspec.to_builtins(clip)
    whole = {key: known[key] for key in ("num_frames", "crop") if key in known}
    return {**known, **entry, **whole, "start_frame_idx": start}


def complete(clip: Entry, info: VideoInfo, config: FilterConfig) -> Rejection | None:
    """Fill in what an entry leaves out."""
    if info.is_hdr and not config.tone_map:
        return Rejection("hdr")
    if clip.resolution is UNSET:
        clip.resolution = Size(*info.size(config.geometry))
    if clip.fps is UNSET:
        clip.fps = info.fps
    if clip.num_frames is UNSET:
        # Without a number of its own the clip is as long as its cut, within the video.
        start, *end = [0] if clip.cut is UNSET else clip.cut
        clip.num_frames = min([*end[:1], info.num_frames]) - start
        if clip.num_frames <= 0:
            return Rejection("invalid_cut")
    wrong = _misplaced(clip)
    return None if wrong is None else Rejection(wrong)


def _misplaced(clip: Entry) -> str | None:
    """Return the reason where a cut or a crop is empty, or exceeds the picture."""
    cut, crop = clip.cut, clip.crop
    if cut is not UNSET and len(cut) > 1 and cut[1] <= cut[0]:
        return "invalid_cut"
    if crop is not UNSET:
        left, right, top, bottom = crop
        size = clip.resolution
        if left >= right or top >= bottom or (size is not UNSET and (bottom > size.height or right > size.width)):
            return "invalid_crop"
    return None


class Judge:
    """Judges entries of meta JSON by the limits of a config."""

    def __init__(self, config: FilterConfig) -> None:
        self._config = config
        self._drops_empty = config.drop_empty_captions
        self.audit = CaptionAudit(config)
        remember = functools.lru_cache(_REMEMBERED)
        self._size = remember(functools.partial(judge_size, self._config))
        self._length = remember(functools.partial(judge_length, self._config))
        self._motion = remember(functools.partial(judge_motion, self._config))
        self._signal_rules = signal_rules(config)
        self._asks_signals = bool(self._signal_rules) or config.drop_duplicates

    def __reduce__(self) -> tuple[type["Judge"], tuple[FilterConfig]]:
        """Travel to another process without what is remembered."""
        return Judge, (self._config,)

    def __call__(self, clip: Entry, info: VideoInfo | None = None) -> Verdict:
        """Judge a clip; what its entry leaves out is filled in from `info`."""
        if info is not None and (rejection := complete(clip, info, self._config)) is not None:
            return rejection
        return next(self.verdicts([clip]))

    def verdicts(self, clips: Iterable[Entry]) -> Iterator[Verdict]:
        """Judge clips one by one, without the cost of a call for each."""
        judge_size, judge_length, asks_signals = self._size, self._length, self._asks_signals
        for clip in clips:
            cut = clip.cut
            is_ordered = cut is UNSET or len(cut) == 1 or cut[0] < cut[1]
            resolution, fps, num_frames, score = clip.resolution, clip.fps, clip.num_frames, clip.motion
            if not (is_ordered and clip.crop is UNSET) and (reason := _misplaced(clip)) is not None:
                yield REJECTIONS[reason]
            elif self._drops_empty and self.audit.nothing_left(clip.cap):
                yield REJECTIONS["empty_cap"]
            elif resolution is UNSET or fps is UNSET or num_frames is UNSET:
                yield "incomplete"
            else:
                size = judge_size(resolution.height, resolution.width)
                length = judge_length(fps, num_frames)
                motion = None if score is UNSET else self._motion(score)
                signals = judge_signals(self._config, self._signal_rules, clip) if asks_signals else None
                if motion is None and signals is None and (size is None or length is None):  # as for most
                    yield size or length or "kept"
                else:
                    yield first_rejection(size, length, motion, signals)

    def explain(self, entry: Any, probe: Callable[[str], VideoInfo]) -> Iterator[str]:
        """Yield one line for every rule that was reached: passed or failed, with the value and the limit.

        Args:
            entry: of meta JSON.
            probe: is asked about the video where the entry leaves something out; it may raise DecodeError.
        """
        clip, forms = read_entry(entry), [*dict.fromkeys(FAULTS.values())]
        wrong = clip.reason if isinstance(clip, Rejection) else _misplaced(clip)
        yield from (_line(reason != wrong, reason) for reason in forms[: forms.index(wrong) + 1 if wrong else None])
        if wrong is not None:
            return
        assert isinstance(clip, Entry)
        if self._drops_empty:
            is_empty = self.audit.nothing_left(clip.cap)
            yield _line(not is_empty, "empty_cap")
            if is_empty:
                return
        if self(clip) == "incomplete":
            try:
                info = probe(clip.path)
            except DecodeError as error:
                yield _line(False, "unreadable", error.reason)
                return
            yield _line(True, "unreadable", f"the video says {info}")
            if (rejection := complete(clip, info, self._config)) is not None:
                yield _line(False, rejection.reason)
                return
        yield from self._measures(clip)

    def _measures(self, clip: Entry) -> Iterator[str]:
        """Yield a line for every limit of a complete clip."""
        assert clip.resolution is not UNSET
        assert clip.fps is not UNSET
        assert clip.num_frames is not UNSET
        limits, length = self._config, Length(clip.fps, clip.num_frames)
        yield from (_measured(rule, clip.resolution, limits) for rule in SIZE_RULES)
        yield from (_measured(rule, length, limits) for rule in LENGTH_RULES if getattr(limits, rule.setting))
        if clip.motion is not UNSET:
            yield from (_measured(rule, Motion(clip.motion), limits) for rule in MOTION_RULES)
        if self._asks_signals:
            found = judge_signals(limits, self._signal_rules, clip)
            if found is not None and found.reason in ("not_scored", "duplicate"):
                yield _line(False, found.reason)
            else:
                yield from (_measured(rule, clip, limits) for rule in self._signal_rules)


def _measured(rule: Rule[Part], part: Part, limits: FilterConfig) -> str:
    limit = f"{rule.setting} {getattr(limits, rule.setting):.10g}"
    return _line(rule.passes(part, limits), rule.reason, f"{limit}, the clip has {rule.measure(part, limits):.10g}")


def _line(passed: bool, reason: str, measured: str = "") -> str:
    text = measured or ("" if passed else REASONS[reason])
    return f"{'passes' if passed else 'FAILS':8}{reason:17}{text}".rstrip()
