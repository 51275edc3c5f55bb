"""What a training run is made of: options of the command line, model file and data file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cyclopts import Parameter
from pydantic import BaseModel, ConfigDict, Field, model_validator

from flashi2v_data.atomic import check_directory
from flashi2v_data.config import DataConfig, load_config
from flashi2v_data.errors import InputError
from flashi2v_model.config import (
    AEConfig,
    DiffusionConfig,
    PredictorConfig,
    Settings,
    TextEncoderConfig,
    check_pretrained,
)


@Parameter(name="*")
class TrainOptions(BaseModel):
    """Options of `flashi2v-train`, under Megatron's names."""

    model_config = ConfigDict(extra="forbid")

    mm_model: Path = Field(description="model file (JSON with # comments): encoders, diffusion, transformer")
    mm_data: Path = Field(description="data file (JSON with # comments): dataset and loader")

    device: str = Field("auto", description="auto, npu, cuda or cpu")
    nproc_per_node: int = Field(1, ge=1, description="processes to start; weights and optimizer are sharded over them")
    bf16: bool | None = Field(
        None,
        description="compute in bf16 with fp32 master weights and fp32 gradient reduction; "
        "default: what predictor.dtype says",
    )
    seed: int = Field(1024, description="of everything random")

    train_iters: int = Field(1_000_000, ge=1, description="optimizer steps of the whole run, resumed ones included")
    micro_batch_size: int = Field(1, ge=1, description="samples of one forward and backward on one device")
    global_batch_size: int | None = Field(
        None, ge=1, description="samples of one optimizer step; default: micro batch size x processes"
    )

    lr: float = Field(2e-5, gt=0, description="peak learning rate")
    min_lr: float = Field(0.0, ge=0, description="learning rate at the end of a cosine or linear decay")
    lr_decay_style: Literal["constant", "cosine", "linear"] = "constant"
    lr_warmup_iters: int = Field(0, ge=0, description="steps of linear warm-up")
    lr_warmup_init: float = Field(0.0, ge=0, description="learning rate at which the warm-up starts")
    proj_lr_scale: float = Field(
        1.0, gt=0, description="factor on the learning rate of learnable_proj, which starts at zero and learns slowly"
    )
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_eps: float = Field(1e-15, gt=0)
    weight_decay: float = Field(1e-2, ge=0)
    clip_grad: float = Field(1.0, gt=0, description="largest norm of the whole gradient")
    clip_grad_ema_decay: float | None = Field(
        None, gt=0, lt=1, description="clip adaptively: the threshold follows the norms' moving mean with this decay"
    )
    use_ema: bool = Field(True, description="keep an exponential moving average of the weights")
    ema_decay: float = Field(0.9999, ge=0, lt=1)

    feature_cache_gib: float = Field(
        0.0,
        ge=0,
        description="memory for encoded clips and captions per process: each is encoded once, not once per epoch",
    )

    save: Path = Field(Path("save"), description="the run's directory: metrics, configuration, checkpoints")
    load: Path | None = Field(None, description="run to resume; default: the one in --save, if there is one")
    save_interval: int = Field(1000, ge=1, description="steps between checkpoints; the last step is always saved")
    log_interval: int = Field(1, ge=1, description="steps between lines of metrics")

    @model_validator(mode="after")
    def _check(self) -> "TrainOptions":
        if self.lr_decay_style == "constant" and self.min_lr:
            raise ValueError("--min-lr has no effect with --lr-decay-style constant: choose cosine or linear")
        if self.lr_warmup_init and not self.lr_warmup_iters:
            raise ValueError("--lr-warmup-init has no effect without --lr-warmup-iters")
        if self.min_lr > self.lr or self.lr_warmup_init > self.lr:
            raise ValueError(f"--min-lr and --lr-warmup-init must not exceed --lr {self.lr}")
        return self


class TrainPredictorConfig(PredictorConfig):
    """The transformer, with what only training asks of it."""

    dtype: Literal["fp32", "float32", "bf16"] = Field("bf16", description="training in fp16 would need loss scaling")
    low_freq_energy_ratio: tuple[float, float] = Field((0.05, 0.95), strict=False)
    pipeline_num_layers: list[int] | None = Field(None, description="layers per pipeline stage")
    attention_async_offload: Literal[False] = Field(False, description="offloading attention is not available yet")

    @model_validator(mode="after")
    def _check_stages(self) -> "TrainPredictorConfig":
        stages = self.pipeline_num_layers
        if stages is not None and sum(stages) != self.num_layers:
            raise ValueError(f"pipeline_num_layers {stages} sums to {sum(stages)}, num_layers is {self.num_layers}")
        return self


class PatchConfig(Settings):
    """Deviations from the parts' own dtypes."""

    ae_float32: Literal["ae_float32"] | None = Field(None, description="the VAE computes in fp32")


class TrainModelConfig(Settings):
    """The model file of a training run."""

    load_video_features: Literal[False] = Field(False, description="precomputed features are not available yet")
    load_text_features: Literal[False] = Field(False, description="precomputed features are not available yet")
    task: Literal["t2v", "i2v"] = "i2v"  # the reference's files say t2v, after the trunk, and mean the same
    patch: PatchConfig = PatchConfig()
    ae: AEConfig
    text_encoder: TextEncoderConfig
    diffusion: DiffusionConfig
    predictor: TrainPredictorConfig

    @model_validator(mode="after")
    def _check_patch(self) -> "TrainModelConfig":
        if self.patch.ae_float32 and self.ae.dtype not in ("fp32", "float32"):
            raise ValueError(f"patch.ae_float32 contradicts ae.dtype {self.ae.dtype!r}: remove one of them")
        return self


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run computes."""

    options: TrainOptions
    model: TrainModelConfig
    data: DataConfig

    @property
    def bf16(self) -> bool:
        """Whether the transformer computes in bf16."""
        return self.model.predictor.dtype == "bf16" if self.options.bf16 is None else self.options.bf16

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, F, H, W) of one sample's latent."""
        data = self.data.dataset_param
        frames = (data.sample_num_frames - 1) // 4 + 1
        return self.model.predictor.in_dim, frames, data.sample_height // 8, data.sample_width // 8

    def accumulation(self, world_size: int) -> int:
        """Micro batches per optimizer step.

        Raises:
            InputError: the global batch does not divide.
        """
        per_pass = self.options.micro_batch_size * world_size
        total = self.options.global_batch_size or per_pass
        if total % per_pass:
            raise InputError(
                f"--global-batch-size {total} must be a multiple of --micro-batch-size x processes = {per_pass}"
            )
        return total // per_pass

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as plain JSON values."""
        return {
            "options": self.options.model_dump(mode="json"),
            "model": self.model.model_dump(mode="json"),
            "data": self.data.model_dump(mode="json"),
        }

    def notes(self) -> list[str]:
        """Say which settings of the files have no effect here, and why."""
        notes = self.model.predictor.notes()
        inference = self.model.diffusion.model_fields_set & {"num_inference_steps", "shift", "guidance_scale"}
        notes += [f"diffusion.{key} has no effect in training: it belongs to sampling" for key in sorted(inference)]
        if self.model.predictor.pipeline_num_layers is not None:
            notes.append("predictor.pipeline_num_layers has no effect: this version trains in one pipeline stage")
        return notes


def read_run_config(options: TrainOptions) -> RunConfig:
    """Read and check all files of a run, before any device is touched.

    Raises:
        InputError: one line that names the file and key, and what to change.
    """
    model = load_config(options.mm_model, TrainModelConfig)
    data = load_config(options.mm_data, DataConfig)
    dataset = data.dataset_param
    if dataset.tokenizer_max_length != model.predictor.text_len:
        raise InputError(
            f"tokenizer_max_length {dataset.tokenizer_max_length} in {options.mm_data} differs from predictor.text_len "
            f"{model.predictor.text_len} in {options.mm_model}: set the same number"
        )
    if not dataset.return_prompt_mask:
        raise InputError(f"{options.mm_data}: return_prompt_mask must be true: padding is zeroed by the mask")
    for key in ("load_video_features", "load_text_features"):
        if getattr(dataset, key):
            raise InputError(
                f"{options.mm_data}: {key} cannot be honoured: this version encodes as it trains; set it false"
            )
    dataset.transform_pipeline.check_range()
    check_directory(options.save, "--save")
    check_pretrained(model.ae.from_pretrained, f"{options.mm_model}: ae.from_pretrained")
    check_pretrained(model.text_encoder.from_pretrained, f"{options.mm_model}: text_encoder.from_pretrained")
    weights = model.predictor.from_pretrained
    if weights is not None and not Path(weights).exists():
        raise InputError(f"{options.mm_model}: predictor.from_pretrained: {weights} does not exist")
    return RunConfig(options, model, data)
