"""Configuration files and their schemas."""

import difflib
import itertools
import json
import os
import re
import types
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import pydantic
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt
from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode

from flashi2v_data.errors import InputError
from flashi2v_data.textfile import read_text

T = TypeVar("T", bound=BaseModel)


# No configuration is larger. The parser takes a few seconds for so much, and nothing of the rest bounds it.
_MAX_BYTES = 64 << 10
_MAX_DEPTH = 100
_MAX_VALUES = 100_000
_MAX_DIGITS = 40


# ---- reading -------------------------------------------------------------------------------------------------------


def load_config(path: str | os.PathLike[str], schema: type[T]) -> T:
    """Read YAML 1.2, or JSON with `#` comments and trailing commas, into a pydantic schema.

    Raises:
        InputError: the file is missing or malformed, or a key is unknown, missing or of a wrong type or value; one
            line that names the file, the key and what to change.
    """
    values = read_values(path)
    if not isinstance(values, dict):
        raise InputError(f"{path}: must hold settings as `key: value`, got {type(values).__name__}")
    try:
        return schema.model_validate(values)
    except pydantic.ValidationError as error:
        raise InputError(f"{path}: {describe(error, schema)}") from None


def read_values(path: str | os.PathLike[str]) -> Any:
    """Read YAML 1.2, or JSON with `#` comments and trailing commas, in bounded time and memory.

    Raises:
        InputError: the file is missing, no regular file, malformed, or holds more than any configuration does.
    """
    text = read_text(path, _MAX_BYTES)
    # JSON is often indented by tabs, which YAML forbids.
    text = re.sub(r"(?m)^[ \t]+", lambda indent: indent[0].expandtabs(4), text)
    # The parser's work grows with the square of the depth. Brackets within texts count too: none has so many unclosed.
    depths = itertools.accumulate(1 if bracket in "[{" else -1 for bracket in re.findall(r"[\[\]{}]", text))
    if max(depths, default=0) > _MAX_DEPTH:
        raise InputError(f"{path}: is nested too deeply")
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Constructor
    try:
        return yaml.load(text)
    except MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        # A duplicate key's explanation runs over several lines; the first says it all.
        raise InputError(f"{path}: {where}{str(error.problem or error).splitlines()[0]}") from None
    except YAMLError as error:
        raise InputError(f"{path}: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise InputError(f"{path}: is nested too deeply") from None
    except ValueError as error:  # a date or a number that Python cannot hold
        raise InputError(f"{path}: holds what no setting can be: {error}") from None


class _Constructor(SafeConstructor):
    """Makes values of what was parsed, if they are few and small enough for a configuration."""

    def construct_document(self, node: Any) -> Any:
        self._check(node)
        return super().construct_document(node)

    def _check(self, root: Any) -> None:
        nodes, num_values = [root], 0
        while nodes:
            node = nodes.pop()
            num_values += 1
            # What is named by `&` counts wherever `*` stands for it, as whoever looks at the values meets it there.
            if num_values > _MAX_VALUES:
                raise ValueError(f"more than {_MAX_VALUES} values, or one within itself")
            if isinstance(node, ScalarNode):
                if "\0" in node.value:
                    raise ValueError(f"a zero byte, in line {node.start_mark.line + 1}")
                if str(node.tag).endswith(":int") and len(node.value) > _MAX_DIGITS:
                    raise ValueError(f"a number of {len(node.value)} digits, in line {node.start_mark.line + 1}")
            else:
                nodes += itertools.chain.from_iterable(node.value) if isinstance(node, MappingNode) else node.value


def describe(error: pydantic.ValidationError, schema: Any) -> str:
    """Put every fault of a validation into one line: dotted key, what is wrong, the nearest known key."""
    return "; ".join(f"{path}: {line}" if path else line for path, line in fault_lines(error, schema))


def fault_lines(error: pydantic.ValidationError, schema: Any) -> list[tuple[str, str]]:
    """Return (dotted key, what is wrong) for every fault; the key is "" where the whole is at fault."""
    lines = []
    for fault in error.errors(include_url=False):
        kind, location = fault["type"], fault["loc"]
        if kind == "extra_forbidden":
            keys, _, known = _walk(schema, location[:-1])
            line = _unknown(str(location[-1]), known)
            keys = [*keys, location[-1]]
        else:
            keys, description, _ = _walk(schema, location)
            line = _explain(kind, fault, description)
        lines.append((".".join(str(key) for key in keys), line))
    return lines


def _unknown(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f"unknown key, did you mean {near[0]!r}?" if near else f"unknown key, known are: {', '.join(known)}"


def _explain(kind: str, fault: Any, description: str | None) -> str:
    if kind == "missing":
        return "missing key"
    message = fault["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return message
    why = f"; {description}" if description and kind == "literal_error" else ""
    return f"{message[:1].lower()}{message[1:]}, got {_short(fault['input'])}{why}"


def _short(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False, skipkeys=True)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _walk(annotation: Any, location: tuple[int | str, ...]) -> tuple[list[int | str], str | None, list[str]]:
    """Follow a fault's location through a schema.

    Returns the keys as the user wrote them (without the tags that pydantic inserts for unions), the description of
    the last field, and the keys that are known there.
    """
    keys: list[int | str] = []
    description: str | None = None
    candidates = _models(annotation)
    for part in location:
        steps = [_step(candidate, part) for candidate in candidates]
        found = [step for step in steps if step is not None]
        if found:
            keys.append(part)
            description = found[0][1]
            candidates = [model for step in found for model in _models(step[0])]
            continue
        tagged = [model for model in candidates if part in _tags(model)]
        if tagged:
            candidates = tagged
        else:
            keys.append(part)
            candidates = []
    known = [key for model in candidates if _is_model(model) for key in model.model_fields]
    return keys, description, known


def _models(annotation: Any) -> list[Any]:
    """Take `Annotated`, `Optional` and unions apart."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _models(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [model for option in get_args(annotation) for model in _models(option)]
    return [annotation]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _step(annotation: Any, part: int | str) -> tuple[Any, str | None] | None:
    """Return the annotation and description behind a key or position, or None where there is no such thing."""
    if _is_model(annotation):
        field = annotation.model_fields.get(part)
        return None if field is None else (field.annotation, field.description)
    arguments = get_args(annotation)
    if isinstance(part, int) and get_origin(annotation) in (list, tuple) and arguments:
        return arguments[min(part, len(arguments) - 1)], None
    if isinstance(part, str) and get_origin(annotation) is dict:
        return arguments[1], None
    return None


def _tags(annotation: Any) -> set[Any]:
    """The names by which pydantic may refer to one option of a union."""
    if not _is_model(annotation):
        return {getattr(annotation, "__name__", str(annotation))}
    literals = [get_args(field.annotation) for field in annotation.model_fields.values()]
    return {annotation.__name__, *(value for values in literals for value in values if isinstance(value, str))}


# ---- schemas -------------------------------------------------------------------------------------------------------


class Settings(BaseModel):
    """A schema that accepts no unknown keys and converts no types (an int where a float is due is fine)."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class FilterConfig(Settings):
    """The filter's settings; the keys of the reference's `filter_config.yaml`."""

    ann_txt_path: str = Field(description="Annotation file: lines of `root of videos,meta JSON`.")
    save_path: str = Field(description="Directory for the LMDB and the report.")
    sample_height: PositiveInt
    sample_width: PositiveInt
    sample_num_frames: PositiveInt
    min_hxw: PositiveInt = Field(description="Least height * width that is left at the sample's aspect ratio.")
    train_fps: PositiveFloat | None = None
    sample_stride: PositiveInt | None = Field(None, description="Take every n-th frame, whatever the fps.")
    max_h_div_w_ratio: PositiveFloat
    min_h_div_w_ratio: PositiveFloat
    too_long_factor: PositiveFloat = 5.0
    max_motion_value: float = 1.0
    min_motion_value: float = 0.0
    clean_captions: bool | Literal["reference"] = Field(True, description="As training will clean them: see data.json.")
    drop_empty_captions: bool = Field(
        False, description="Drop clips whose captions are empty, or become so by cleaning."
    )
    text_tokenizer_path: str | None = Field(
        None, description="Count captions that this tokenizer cuts, or does not know."
    )
    tokenizer_max_length: PositiveInt | None = Field(None, description="Tokens that training reads of a caption.")
    compression: Literal["zstd"] | None = Field(None, description="Compress every value of the LMDB.")
    geometry: Literal["upright", "reference"] = Field(
        "upright",
        description="Whether pictures are upright and of square pixels, or as the reference's decoder gives them.",
    )
    tone_map: bool = Field(False, description="Keep HDR videos, which training then shows as on other screens.")
    probe_cache_path: str | None = Field(
        None, description="Directory that keeps what videos said, for further filters; default <save_path>/probe_cache."
    )

    @pydantic.model_validator(mode="after")
    def _check(self) -> "FilterConfig":
        _check_rate(self.train_fps, self.sample_stride)
        if self.min_h_div_w_ratio > self.max_h_div_w_ratio:
            raise ValueError("min_h_div_w_ratio exceeds max_h_div_w_ratio: swap them")
        if self.min_motion_value > self.max_motion_value:
            raise ValueError("min_motion_value exceeds max_motion_value: swap them")
        if (self.text_tokenizer_path is None) != (self.tokenizer_max_length is None):
            raise ValueError("text_tokenizer_path goes with tokenizer_max_length: set both or neither")
        return self


def _check_rate(train_fps: float | None, sample_stride: int | None) -> None:
    if (train_fps is None) == (sample_stride is None):
        raise ValueError("set one of train_fps and sample_stride and leave the other out")


class CropResizeParam(Settings):
    """Parameters of `CenterCropResizeVideo`."""

    transform_size: list[PositiveInt] = Field(min_length=2, max_length=2, description="Height and width.")
    align_corners: bool = False
    antialias: bool = True
    interpolation_mode: Literal["bilinear", "bicubic"] = "bilinear"

    @pydantic.field_validator("transform_size", mode="before")
    @classmethod
    def _from_names(cls, size: Any) -> Any:
        """MindSpeed-MM also writes {"max_height": ..., "max_width": ...}."""
        if isinstance(size, dict) and size.keys() == {"max_height", "max_width"}:
            return [size["max_height"], size["max_width"]]
        return size


class FlipParam(Settings):
    """Parameters of `RandomHorizontalFlipVideo`."""

    p: float = Field(0.5, ge=0, le=1, description="How often a clip is mirrored.")


class NormParam(Settings):
    """Parameters of `norm_fun`: one number, or one for each colour."""

    mean: float | list[float] = 0.5
    std: PositiveFloat | list[PositiveFloat] = 0.5

    @pydantic.model_validator(mode="after")
    def _check(self) -> "NormParam":
        for name in ("mean", "std"):
            value = getattr(self, name)
            if isinstance(value, list) and len(value) != 3:
                raise ValueError(f"{name} takes one number, or three for red, green and blue; got {len(value)}")
        return self


class CropResize(Settings):
    """Resize until the sample size is covered, then crop its middle."""

    trans_type: Literal["CenterCropResizeVideo"]
    param: CropResizeParam


class Flip(Settings):
    """Mirror some clips."""

    trans_type: Literal["RandomHorizontalFlipVideo"]
    param: FlipParam = Field(default_factory=FlipParam)


class ToTensor(Settings):
    """uint8 to float32 in [0, 1]."""

    trans_type: Literal["ToTensorVideo", "ToTensorAfterResize"]


class Norm(Settings):
    """Subtract the mean, divide by the standard deviation."""

    trans_type: Literal["norm_fun"]
    param: NormParam = Field(default_factory=NormParam)


class AeNorm(Settings):
    """From [0, 1] to [-1, 1]: norm_fun with mean and std 0.5."""

    trans_type: Literal["ae_norm"]

    @property
    def param(self) -> NormParam:
        """The same as a norm_fun."""
        return NormParam()


Transform = Annotated[CropResize | Flip | ToTensor | Norm | AeNorm, Field(discriminator="trans_type")]

_OTHER_SIZES = "gives clips of different sizes, which one batch cannot hold: use CenterCropResizeVideo"
# Transforms that configurations of the reference's relatives hold, and why they have no place here.
_REFUSED_TRANSFORMS = {
    "LongSideResizeVideo": _OTHER_SIZES,
    "MaxHWResizeVideo": _OTHER_SIZES,
    "SpatialStrideCropVideo": _OTHER_SIZES,
    "RandomSizedCrop": _OTHER_SIZES,
    "RandSizeCropArr": _OTHER_SIZES,
    "Resize": _OTHER_SIZES,
    "ResizeVideo": "distorts pictures of another shape, or leaves them in different sizes: use CenterCropResizeVideo",
    "ResizeToFill": "pads pictures, and the borders would be learnt: use CenterCropResizeVideo",
    "ResizeCrop": "is CenterCropResizeVideo without antialiasing: use that, with antialias false",
    "ResizeCropVideo": "is CenterCropResizeVideo without antialiasing: use that, with antialias false",
    "ResizeCropToFill": "is CenterCropResizeVideo without antialiasing: use that, with antialias false",
    "UCFCenterCropVideo": "is CenterCropResizeVideo for square samples: use that",
    "CenterCropArr": "is CenterCropResizeVideo for square samples: use that",
    "CenterCropVideo": "fails for pictures that are smaller than the sample: use CenterCropResizeVideo",
    "TemporalRandomCrop": "is always done by the dataset, for sample_num_frames: leave it out",
    "AffineVideo": "is a norm_fun with mean -beta / gamma and std 1 / gamma: use that",
}


class TransformPipeline(Settings):
    """The transforms of a video, in order."""

    video: list[Transform]

    @pydantic.field_validator("video", mode="before")
    @classmethod
    def _refuse(cls, video: Any) -> Any:
        for step in video if isinstance(video, list) else []:
            name = step.get("trans_type") if isinstance(step, dict) else None
            if isinstance(name, str) and name in _REFUSED_TRANSFORMS:
                raise ValueError(f"{name} {_REFUSED_TRANSFORMS[name]}")
        return video

    @pydantic.field_validator("video")
    @classmethod
    def _check(cls, video: list[Transform]) -> list[Transform]:
        order = [type(step) for step in video if not isinstance(step, Flip)]
        num_flips = len(video) - len(order)
        if order not in ([CropResize, ToTensor, Norm], [CropResize, ToTensor, AeNorm]) or num_flips > 1:
            raise ValueError(
                "list CenterCropResizeVideo, ToTensorVideo and norm_fun once each, in this order; "
                "RandomHorizontalFlipVideo may stand among them"
            )
        return video

    def check_range(self) -> None:
        """Refuse a range of values that Wan's VAE does not read.

        Raises:
            InputError: norm_fun leads to other values than [-1, 1].
        """
        mean, std = self.mean_and_std
        if {*mean, *std} != {0.5}:
            raise InputError(
                f"norm_fun with mean {_one_or_all(mean)} and std {_one_or_all(std)} cannot be honoured, as the VAE "
                "reads [-1, 1]: "
                "set both to 0.5"
            )

    @property
    def crop_resize(self) -> CropResizeParam:
        """How pictures become as large as the sample."""
        return next(step.param for step in self.video if isinstance(step, CropResize))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width after the transforms."""
        height, width = self.crop_resize.transform_size
        return height, width

    @property
    def flip_probability(self) -> float:
        """How often a clip is mirrored."""
        return next((step.param.p for step in self.video if isinstance(step, Flip)), 0.0)

    @property
    def mean_and_std(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of red, green and blue."""
        param = next(step.param for step in self.video if isinstance(step, Norm | AeNorm))
        mean, std = ([value] * 3 if isinstance(value, float) else value for value in (param.mean, param.std))
        return mean, std


def _one_or_all(values: list[float]) -> float | list[float]:
    return values[0] if len(set(values)) == 1 else values


class DatasetParam(Settings):
    """`dataset_param` of data.json."""

    dataset_type: Literal["flashi2v"]
    metafile_or_dir_path: str = Field(description="An LMDB of `flashi2v-data filter`, or a folder of them.")
    text_tokenizer_path: str
    sample_height: PositiveInt
    sample_width: PositiveInt
    sample_num_frames: PositiveInt
    train_fps: PositiveFloat | None = None
    sample_stride: PositiveInt | None = None
    text_drop_ratio: float = Field(ge=0, le=1)
    tokenizer_max_length: PositiveInt
    return_prompt_mask: bool
    transform_pipeline: TransformPipeline
    clean_captions: bool | Literal["reference"] = Field(
        True,
        description='Lower case, no web debris; "reference" deletes Chinese characters too, as it does.',
    )
    drop_empty_captions: bool = Field(False, description="Let other clips stand in for those whose caption is empty.")
    decoder: Literal["auto", "decord", "pyav", "torchcodec"] = "auto"
    geometry: Literal["upright", "reference"] = Field(
        "upright",
        description="Whether pictures are upright and of square pixels, or as the reference's decoder gives them.",
    )
    tone_map: bool = Field(False, description="Show HDR videos (PQ, HLG) as on other screens.")
    quarantine_path: str | None = Field(None, description="List of unreadable clips; the default lies beside the LMDB.")
    load_video_features: bool = False
    load_text_features: bool = False
    features_path: str | None = Field(None, description="Features encoded ahead: a store, or a folder of them.")

    @pydantic.model_validator(mode="after")
    def _check(self) -> "DatasetParam":
        _check_rate(self.train_fps, self.sample_stride)
        frames, height, width = self.sample_num_frames, self.sample_height, self.sample_width
        if frames % 4 != 1:
            raise ValueError(
                f"sample_num_frames must be 4k+1 for the VAE, got {frames}: use {frames // 4 * 4 + 1} "
                f"or {frames // 4 * 4 + 5}"
            )
        for name, value in (("sample_height", height), ("sample_width", width)):
            if value % 16:
                lower = value // 16 * 16
                nearest = f"{lower} or {lower + 16}" if lower else "16"
                raise ValueError(f"{name} must be divisible by 16, got {value}: use {nearest}")
        if self.transform_pipeline.size != (height, width):
            raise ValueError(
                f"transform_size {list(self.transform_pipeline.size)} of transform_pipeline differs from "
                f"sample_height and sample_width: set it to [{height}, {width}]"
            )
        if (self.load_video_features or self.load_text_features) != (self.features_path is not None):
            raise ValueError("features_path goes with load_video_features or load_text_features: set both or neither")
        return self


class CollateParam(Settings):
    """`collate_param` of data.json."""

    model_name: Literal["flashi2v"]


class DataloaderParam(Settings):
    """`dataloader_param` of data.json."""

    dataloader_mode: Literal["sampler"]
    sampler_type: Literal["StatefulDistributedSampler"]
    collate_param: CollateParam
    shuffle: bool
    drop_last: Literal[True] = Field(
        description="the order of samples has no end (an epoch flows into the next), so no batch is ever incomplete"
    )
    pin_memory: bool
    num_workers: int = Field(ge=0)
    decode_timeout_seconds: PositiveFloat | None = Field(
        None, description="After so long without an answer a worker is stopped; 120 where there are workers."
    )
    worker_memory_gib: PositiveFloat | None = Field(
        None, description="A worker that holds more after a sample is replaced; 4 where there are workers."
    )
    worker_max_samples: PositiveInt | None = Field(None, description="A worker is replaced after so many samples.")

    @pydantic.model_validator(mode="after")
    def _check(self) -> "DataloaderParam":
        for name in ("decode_timeout_seconds", "worker_memory_gib", "worker_max_samples"):
            if self.num_workers == 0 and getattr(self, name) is not None:
                raise ValueError(f"{name} needs a worker that can be stopped: set num_workers to 1 or more")
        return self


class DataConfig(Settings):
    """data.json."""

    dataset_param: DatasetParam
    dataloader_param: DataloaderParam
