"""What the loader is told: the keys of `data.json`."""

from typing import Annotated, Any, Literal, NamedTuple

import pydantic
from pydantic import Field, PositiveFloat, PositiveInt

from flashi2v_data.errors import InputError
from flashi2v_data.settings import Settings
from flashi2v_data.video.frames import check_rate


class Bucket(NamedTuple):
    """A shape that clips are brought to; an image is a clip of one frame."""

    num_frames: PositiveInt
    height: PositiveInt
    width: PositiveInt

    def __str__(self) -> str:
        return f"{self.num_frames}x{self.height}x{self.width}"

    @property
    def is_image(self) -> bool:
        """Whether it holds images rather than videos."""
        return self.num_frames == 1


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
    buckets: list[Bucket] | Literal["auto"] | None = Field(
        None,
        description="Train on clips of several shapes, a list of [frames, height, width]; "
        '"auto" finds those that suit the set, none larger or longer than the sample.',
    )
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
    held_out_clips: int = Field(
        0, ge=0, description="Clips, spread over the store, that training never sees and validation looks at."
    )
    columns: dict[str, PositiveInt | None] = Field(
        {},
        description="Further keys of records: a list of those that hold a number, or lengths (null: a number) by key.",
    )

    @pydantic.field_validator("buckets", mode="before")
    @classmethod
    def _check_buckets(cls, buckets: Any) -> Any:
        given = buckets if isinstance(buckets, list) else []
        if buckets not in (None, "auto") and (
            not given or not all(isinstance(one, list | tuple) and len(one) == 3 for one in given)
        ):
            raise ValueError('must be "auto", or a list of [frames, height, width]')
        return buckets

    @pydantic.field_validator("columns", mode="before")
    @classmethod
    def _name_columns(cls, columns: Any) -> Any:
        names = isinstance(columns, list) and all(isinstance(name, str) for name in columns)
        return dict.fromkeys(columns) if names else columns

    @property
    def main_bucket(self) -> Bucket:
        """The sample's shape; the first bucket where that is none. Validation looks at clips of this one."""
        sample = Bucket(self.sample_num_frames, self.sample_height, self.sample_width)
        named = isinstance(self.buckets, list) and sample not in self.buckets
        return self.buckets[0] if named else sample  # type: ignore[index,return-value]

    @property
    def column_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of one sample's columns: () for a number, (n,) for a list of n."""
        return {name: () if length is None else (length,) for name, length in self.columns.items()}

    @pydantic.model_validator(mode="after")
    def _check(self) -> "DatasetParam":
        check_rate(self.train_fps, self.sample_stride)
        sample = Bucket(self.sample_num_frames, self.sample_height, self.sample_width)
        _check_shape(sample, ["sample_num_frames", "sample_height", "sample_width"])
        _, height, width = sample
        buckets = self.buckets if isinstance(self.buckets, list) else [sample]
        for bucket in buckets:
            _check_shape(bucket, [f"buckets: {side} of {bucket}" for side in ("frames", "height", "width")])
        if len(set(buckets)) < len(buckets):
            raise ValueError("buckets: one is named twice")
        if sample not in buckets:
            raise ValueError(f"buckets must name the sample's own shape, {[*sample]}, too: validation looks at it")
        if self.transform_pipeline.size != (height, width):
            raise ValueError(
                f"transform_size {list(self.transform_pipeline.size)} of transform_pipeline differs from "
                f"sample_height and sample_width: set it to [{height}, {width}]"
            )
        if (self.load_video_features or self.load_text_features) != (self.features_path is not None):
            raise ValueError("features_path goes with load_video_features or load_text_features: set both or neither")
        return self


def _check_shape(shape: Bucket, names: list[str]) -> None:
    frames, *sides = shape
    if frames % 4 != 1:
        lower = frames // 4 * 4 + 1
        raise ValueError(f"{names[0]} must be 4k+1 for the VAE, got {frames}: use {lower} or {lower + 4}")
    for name, value in zip(names[1:], sides):
        if value % 16:
            lower = value // 16 * 16
            nearest = f"{lower} or {lower + 16}" if lower else "16"
            raise ValueError(f"{name} must be divisible by 16, got {value}: use {nearest}")


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
