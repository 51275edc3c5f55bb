"""The schema of `inference_model.json`; nothing heavy is imported, so that a wrong setting is reported at once."""

from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from flashi2v_data.loading.config import TransformPipeline
from flashi2v_data.settings import Settings
from flashi2v_infer.execution import DTypes, Execution
from flashi2v_infer.settings import SamplingSettings, check_negative_prompt
from flashi2v_model.adapter_choice import read_choices
from flashi2v_model.config import AEConfig, DiffusionConfig, DType, PredictorConfig, SchedulerName, TextEncoderConfig
from flashi2v_model.speed.plan import Speed, read_speed


class TokenizerConfig(Settings):
    """The `tokenizer` part."""

    autotokenizer_name: Literal["AutoTokenizer"] = "AutoTokenizer"
    hub_backend: Literal["hf"] = Field("hf", description="other hubs are not read: name a local directory instead")
    from_pretrained: str


class PipelineConfig(Settings):
    """The `pipeline_config` part."""

    input_size: list[PositiveInt] = Field(min_length=3, max_length=3, description="Frames, height and width.")

    @field_validator("input_size")
    @classmethod
    def _check(cls, input_size: list[int]) -> list[int]:
        num_frames, height, width = input_size
        SamplingSettings(num_frames, height, width)  # raises what is wrong with them
        return input_size


class SamplingConfig(DiffusionConfig):
    """The `diffusion` part."""

    scheduler: SchedulerName = Field("euler", description="The sampler; all but euler are of second order.")
    speed: str | float = Field("exact", description="exact, balanced, fast, or so many times fewer calls.")

    @field_validator("speed")
    @classmethod
    def _check_speed(cls, speed: str | float) -> Speed:
        return read_speed(speed)


class InferenceConfig(Settings):
    """inference_model.json: a batch of videos."""

    pipeline_class: Literal["FlashI2VPipeline"]
    prompt: str = Field(description="Text file, one prompt a line.")
    image: str = Field(description="Text file, one image file a line.")
    save_path: str
    use_prompt_preprocess: bool = Field(False, description="Clean prompts as training captions are.")
    dtype: DType = Field("bf16", description="Of the text encoder and the predictor where they name none.")
    device: str = "auto"
    frame_interval: PositiveInt = Field(1, description="The videos play at fps / frame_interval.")
    fps: PositiveFloat = 16
    pipeline_config: PipelineConfig
    data_transform: TransformPipeline
    ae: AEConfig
    tokenizer: TokenizerConfig
    text_encoder: TextEncoderConfig
    predictor: PredictorConfig
    diffusion: SamplingConfig
    seed: int = 0
    negative_prompt: str = ""
    conditioning: dict[str, float | list[float]] = Field({}, description="what a variant of the network asks for")
    lora: list[str] = Field([], description="LoRA adapters, FILE or FILE:SCALE")

    @field_validator("lora")
    @classmethod
    def _check_lora(cls, lora: list[str]) -> list[str]:
        read_choices(lora)  # raises what is wrong with them
        return lora

    @model_validator(mode="after")
    def _fill_in_dtypes(self) -> "InferenceConfig":
        for part in (self.text_encoder, self.predictor):
            if "dtype" not in part.model_fields_set:
                part.dtype = self.dtype
        return self

    @model_validator(mode="after")
    def _check(self) -> "InferenceConfig":
        check_negative_prompt(self.negative_prompt, self.sampling)
        size = self.pipeline_config.input_size[1:]
        if list(self.data_transform.size) != size:
            raise ValueError(
                f"data_transform: transform_size {list(self.data_transform.size)} differs from height and width of "
                f"pipeline_config.input_size: set it to {size}"
            )
        self.data_transform.check_range()
        if self.data_transform.flip_probability:
            raise ValueError("data_transform: RandomHorizontalFlipVideo belongs to training: leave it out")
        if self.ae.do_sample and "do_sample" in self.ae.model_fields_set:
            raise ValueError("ae.do_sample: sampling takes the mode of the first frame's posterior: set it to false")
        if self.predictor.from_pretrained is None:
            raise ValueError("predictor.from_pretrained: missing key: name the weights to sample with")
        for key in ("use_dynamic_shifting", "use_logitnorm_time_sampling", "training_shift"):
            if getattr(self.diffusion, key):
                raise ValueError(f"diffusion.{key} belongs to training: leave it out; sampling follows diffusion.shift")
        self._check_tokens()
        return self

    def _check_tokens(self) -> None:
        latent = self.sampling.latent_grid
        patch, longest = self.predictor.patch_size, self.predictor.max_seq_len
        if any(size % step for size, step in zip(latent, patch)):
            raise ValueError(
                f"predictor.patch_size: {list(patch)} does not divide the latent grid {list(latent)} of "
                "pipeline_config.input_size: [1, 2, 2] is that of every release"
            )
        tokens = [size // step for size, step in zip(latent, patch)]
        if max(tokens) > longest:
            raise ValueError(
                f"predictor.max_seq_len: {longest} is less than the longest side of the token grid {tokens}: "
                f"set it to {max(tokens)} or more, or make pipeline_config.input_size smaller"
            )

    @property
    def dtypes(self) -> DTypes:
        """Those of all parts."""
        return DTypes(self.predictor.dtype, self.text_encoder.dtype, self.ae.dtype)

    def computed_by(self, execution: Execution) -> "InferenceConfig":
        """Return the configuration with the dtypes that an execution asks for instead of the file's."""
        dtypes = zip(("predictor", "text_encoder", "ae"), execution.dtypes(self.dtypes))
        parts = {part: getattr(self, part).model_copy(update={"dtype": dtype}) for part, dtype in dtypes}
        return self.model_copy(update=parts)

    @property
    def model_settings(self) -> dict[str, Any]:
        """What the videos depend on besides `sampling`, the weights and the single request."""
        # Without what has no effect on the numbers, or stands in `sampling`.
        apart = {"model_id", "from_pretrained", "img_dim", "use_fused_rmsnorm", "max_seq_len", "low_freq_energy_ratio"}
        tiling = {"enable_tiling", "tiling_param"} if self.ae.enable_tiling else {"enable_tiling"}
        return {
            "data_transform": self.data_transform.crop_resize.model_dump(exclude={"transform_size"}),
            "ae": self.ae.model_dump(include={"dtype", *tiling}),
            "text_encoder": self.text_encoder.model_dump(include={"dtype", "use_attention_mask"}),
            "predictor": self.predictor.model_dump(exclude=apart),
            "diffusion": self.diffusion.model_dump(include={"shift", "scheduler"}),
        }

    @property
    def save_fps(self) -> float:
        """Frames per second of the videos: the model saw every frame_interval-th frame at `fps`."""
        return self.fps / self.frame_interval

    @property
    def sampling(self) -> SamplingSettings:
        """The numbers of the sampling run."""
        ratio = self.predictor.low_freq_energy_ratio
        if isinstance(ratio, tuple):
            raise ValueError(
                f"predictor.low_freq_energy_ratio: {list(ratio)} is a range to draw from in training: give one number"
            )
        num_frames, height, width = self.pipeline_config.input_size
        return SamplingSettings(
            num_frames,
            height,
            width,
            num_inference_steps=self.diffusion.num_inference_steps,
            guidance_scale=self.diffusion.guidance_scale,
            low_freq_energy_ratio=SamplingSettings.low_freq_energy_ratio if ratio is None else ratio,
            conditioning=self.conditioning,
            speed=read_speed(self.diffusion.speed),
        )
