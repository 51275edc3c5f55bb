"""The limits that clips must keep, each defined once: for judging, counting, explaining and near misses."""

import math
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from msgspec import UNSET

from flashi2v_data.curation.config import FilterConfig
from flashi2v_data.records import Entry, Size
from flashi2v_data.video.frames import frame_interval

# In the order in which the rules apply: a clip is counted under the first that rejects it. The limits are in the order
# of the reference.
REASONS = {
    "invalid_entry": "is not a JSON object with a path, or holds values that cannot be stored",
    "no_cap": "has no caption",
    "no_resolution": "height or width is not a positive number",
    "no_fps": "fps is not a positive number",
    "no_num_frames": "num_frames is not a positive whole number",
    "invalid_motion": "motion is not a number",
    "invalid_cut": "cut is not [first frame, end], or leaves nothing of the video",
    "invalid_crop": "crop is not [left, right, top, bottom] in pixels of the picture",
    "invalid_signal": "a column of a signal is not of its kind",
    "empty_cap": "caption is empty, or becomes so when cleaned (drop_empty_captions)",
    "unreadable": "leaves out resolution, fps or num_frames, and the video cannot be read",
    "hdr": "is HDR (PQ or HLG), whose colours look pale without tone_map",
    "aspect_mismatch": "height / width is outside min_h_div_w_ratio ... max_h_div_w_ratio",
    "res_too_small": "fewer than min_hxw pixels at the sample's aspect ratio",
    "too_long": "longer than too_long_factor samples",
    "fps_too_low": "fps below train_fps",
    "too_fast": "motion below min_motion_value",
    "too_slow": "motion above max_motion_value",
    "too_short": "fewer than sample_num_frames frames at the training rate",
    "not_scored": "lacks a column that a limit is set for: run `flashi2v-data score` with its signal",
    "duplicate": "shows what an earlier clip shows (drop_duplicates)",
    "things_too_slow": "object_motion below min_object_motion",
    "things_too_fast": "object_motion above max_object_motion",
    "camera_too_fast": "camera_motion above max_camera_motion",
    "too_still": "stillness above max_stillness",
    "too_black": "black_share above max_black_share",
    "too_barred": "bar_share above max_bar_share",
    "looping": "num_loops above max_num_loops",
    "too_much_text": "text_area above max_text_area",
    "too_many_cuts": "more than max_scene_cuts cuts within the clip",
}
# Reports leave these out where no clip fell to them.
OF_SIGNALS = ("invalid_signal", *[*REASONS][[*REASONS].index("not_scored") :])
ORDER = {reason: number for number, reason in enumerate(REASONS)}


class NearMiss(NamedTuple):
    """A clip that one changed setting would keep."""

    setting: str
    value: float  # that would keep it
    clips: str  # which clips these are: "1280x720", or ""


class Rejection(NamedTuple):
    """Why a clip is not kept; `near_miss` where a single setting is the only cause."""

    reason: str  # one of REASONS
    near_miss: NearMiss | None = None


REJECTIONS = {reason: Rejection(reason) for reason in REASONS}


class Length(NamedTuple):
    """Of the clip."""

    fps: float
    num_frames: float


class Motion(NamedTuple):
    """A score that falls as the motion grows."""

    score: float


# Height and width, fps and number of frames, motion, what signals measured: no rule looks at two of these, so each can
# be judged by itself.
Part = TypeVar("Part", Size, Length, Motion, Entry)


class Rule(NamedTuple, Generic[Part]):
    """A limit, named by its setting."""

    reason: str
    setting: str
    passes: Callable[[Part, FilterConfig], bool]
    measure: Callable[[Part, FilterConfig], float]  # in units of the setting
    # The value nearest to the measure that may be set and lets the clip pass.
    settable: Callable[[float], float]


def area_at_ratio(size: Size, limits: FilterConfig) -> float:
    """Return the pixels of the largest part of the picture that has the sample's aspect ratio."""
    height, width = size.height, size.width
    sample_height, sample_width = limits.sample_height, limits.sample_width
    # Products before the division keep whole numbers exact.
    if height * sample_width > width * sample_height:
        return width * width * sample_height / sample_width
    return height * height * sample_width / sample_height


def num_samples_long(length: Length, limits: FilterConfig) -> float:
    """Return the clip's length in samples, by the exact ratio of rates as in the reference."""
    return length.num_frames / _sample_span(length, limits)


def _sample_span(length: Length, limits: FilterConfig) -> float:
    if limits.train_fps is None:
        return float(limits.sample_num_frames * (limits.sample_stride or 1))
    return limits.sample_num_frames * length.fps / limits.train_fps


def interval(length: Length, limits: FilterConfig) -> float:
    """Return how many frames of the video pass for one of the sample."""
    return frame_interval(length.fps, limits.train_fps, limits.sample_stride)


def num_frames_available(length: Length, limits: FilterConfig) -> int:
    """Return how many frames there are at the training rate: the length of `frames.frame_indices`."""
    step = interval(length, limits)
    available = math.ceil(length.num_frames / step)
    # Rounding may have counted a frame that would lie at the end.
    return available - 1 if (available - 1) * step >= length.num_frames else available


def _down(digits: int) -> Callable[[float], float]:
    return lambda value: math.floor(value * 10**digits) / 10**digits


def _up(digits: int) -> Callable[[float], float]:
    return lambda value: math.ceil(value * 10**digits) / 10**digits


def _ratio(size: Size, limits: FilterConfig) -> float:
    return size.height / size.width


def _fps(length: Length, limits: FilterConfig) -> float:
    return length.fps


def _score(motion: Motion, limits: FilterConfig) -> float:
    return motion.score


SIZE_RULES: tuple[Rule[Size], ...] = (
    Rule(
        "aspect_mismatch",
        "min_h_div_w_ratio",
        lambda size, limits: _ratio(size, limits) >= limits.min_h_div_w_ratio,
        _ratio,
        _down(4),
    ),
    Rule(
        "aspect_mismatch",
        "max_h_div_w_ratio",
        lambda size, limits: _ratio(size, limits) <= limits.max_h_div_w_ratio,
        _ratio,
        _up(4),
    ),
    Rule(
        "res_too_small",
        "min_hxw",
        lambda size, limits: area_at_ratio(size, limits) >= limits.min_hxw,
        area_at_ratio,
        math.floor,
    ),
)
LENGTH_RULES: tuple[Rule[Length], ...] = (
    Rule(
        "too_long",
        "too_long_factor",
        # As in the reference, a product: the quotient may round to the other side of the limit.
        lambda length, limits: length.num_frames <= limits.too_long_factor * _sample_span(length, limits),
        num_samples_long,
        _up(1),
    ),
    Rule("fps_too_low", "train_fps", lambda length, limits: interval(length, limits) >= 1, _fps, _down(2)),
    Rule(
        "too_short",
        "sample_num_frames",
        lambda length, limits: num_frames_available(length, limits) >= limits.sample_num_frames,
        num_frames_available,
        lambda value: (value - 1) // 4 * 4 + 1,  # the VAE takes 4k+1 frames
    ),
)
MOTION_RULES: tuple[Rule[Motion], ...] = (
    Rule(
        "too_fast",
        "min_motion_value",
        lambda motion, limits: _score(motion, limits) >= limits.min_motion_value,
        _score,
        _down(3),
    ),
    Rule(
        "too_slow",
        "max_motion_value",
        lambda motion, limits: _score(motion, limits) <= limits.max_motion_value,
        _score,
        _up(3),
    ),
)


def _measured(clip: Entry, column: str) -> float:
    value = getattr(clip, column)
    return len(value) if isinstance(value, list) else value


def _signal_rule(reason: str, setting: str, digits: int = 4) -> Rule[Entry]:
    """Return the rule of a setting called max_ or min_ and the column's name."""
    bound, _, column = setting.partition("_")

    def passes(clip: Entry, limits: FilterConfig) -> bool:
        limit, value = getattr(limits, setting), _measured(clip, column)
        return value <= limit if bound == "max" else value >= limit

    settable = _up(digits) if bound == "max" else _down(digits)
    return Rule(reason, setting, passes, lambda clip, limits: _measured(clip, column), settable)


SIGNAL_RULES: tuple[Rule[Entry], ...] = (
    _signal_rule("things_too_slow", "min_object_motion"),
    _signal_rule("things_too_fast", "max_object_motion"),
    _signal_rule("camera_too_fast", "max_camera_motion"),
    _signal_rule("too_still", "max_stillness"),
    _signal_rule("too_black", "max_black_share"),
    _signal_rule("too_barred", "max_bar_share"),
    _signal_rule("looping", "max_num_loops"),
    _signal_rule("too_much_text", "max_text_area"),
    _signal_rule("too_many_cuts", "max_scene_cuts", digits=0),
)


def signal_rules(limits: FilterConfig) -> tuple[Rule[Entry], ...]:
    """Return the rules of the limits that are set."""
    return tuple(rule for rule in SIGNAL_RULES if getattr(limits, rule.setting) is not None)


def judge_signals(limits: FilterConfig, rules: tuple[Rule[Entry], ...], clip: Entry) -> Rejection | None:
    """Return why a clip is rejected for what signals say of it, or None; `rules` are those of the limits."""
    asked = [rule.setting.partition("_")[2] for rule in rules]
    if any(getattr(clip, column) is UNSET for column in asked):
        return REJECTIONS["not_scored"]
    if limits.drop_duplicates and clip.is_duplicate is not False:
        return REJECTIONS["not_scored" if clip.is_duplicate is UNSET else "duplicate"]
    return _apply(rules, clip, limits, "")


def judge_size(limits: FilterConfig, height: float, width: float) -> Rejection | None:
    """Return why a picture of this size is rejected, or None."""
    return _apply(SIZE_RULES, Size(height, width), limits, f"{width:g}x{height:g}")


def judge_length(limits: FilterConfig, fps: float, num_frames: int) -> Rejection | None:
    """Return why a clip of this length is rejected, or None."""
    return _apply(LENGTH_RULES, Length(fps, num_frames), limits, "")


def judge_motion(limits: FilterConfig, score: float) -> Rejection | None:
    """Return why a clip of this motion is rejected, or None."""
    return _apply(MOTION_RULES, Motion(score), limits, "")


def _apply(rules: tuple[Rule[Part], ...], part: Part, limits: FilterConfig, clips: str) -> Rejection | None:
    for rule in rules:
        if not rule.passes(part, limits):
            value = rule.settable(rule.measure(part, limits))
            changed = limits.model_copy(update={rule.setting: value})
            has_room = value > 0 or rules not in (SIZE_RULES, LENGTH_RULES)
            if has_room and all(other.passes(part, changed) for other in rules):
                return Rejection(rule.reason, NearMiss(rule.setting, value, clips))
            return Rejection(rule.reason)
    return None


def first_rejection(*found: Rejection | None) -> Rejection:
    """Return the one of the first rule; where there is another, no single setting is the cause."""
    rejections = [*filter(None, found)]
    if len(rejections) == 1:
        return rejections[0]
    return REJECTIONS[min([rejection.reason for rejection in rejections], key=ORDER.__getitem__)]
