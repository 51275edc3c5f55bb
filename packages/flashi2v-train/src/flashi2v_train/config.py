"""What a training run is made of: options of the command line, model file and data file; checked together."""

import importlib.util
import inspect
import math
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from flashi2v_data.atomic import check_directory
from flashi2v_data.errors import InputError
from flashi2v_data.loading.buckets import resolve
from flashi2v_data.loading.config import DataConfig
from flashi2v_data.settings import load_config
from flashi2v_model.config import (
    AEConfig,
    DiffusionConfig,
    PredictorConfig,
    Settings,
    TextEncoderConfig,
)
from flashi2v_model.variants import load_class
from flashi2v_train.downloads import find_missing
from flashi2v_train.options import TrainOptions
from flashi2v_train.parallel_dims import ParallelDims, plan_parallel_dims

if TYPE_CHECKING:
    from flashi2v_train.buckets import Cost
    from flashi2v_train.recipe import Recipe, RecipeClass


class TrainPredictorConfig(PredictorConfig):
    """The transformer, with what only training asks of it."""

    dtype: Literal["fp32", "float32", "bf16"] = Field("bf16", description="training in fp16 would need loss scaling")
    low_freq_energy_ratio: tuple[float, float] = Field((0.05, 0.95), strict=False)
    pipeline_num_layers: list[PositiveInt] | list[list[PositiveInt]] | None = Field(
        None, description="layers per pipeline stage; a list of lists for virtual stages"
    )
    attention_async_offload: bool = Field(
        False, description="move what attention saves for the backward pass to the CPU's memory and back"
    )

    @model_validator(mode="after")
    def _check_stages(self) -> "TrainPredictorConfig":
        numbers = [n for part in self.pipeline_num_layers or [] for n in ([part] if isinstance(part, int) else part)]
        if numbers and sum(numbers) != self.num_layers:
            raise ValueError(
                f"pipeline_num_layers {self.pipeline_num_layers} sums to {sum(numbers)}, num_layers is "
                f"{self.num_layers}"
            )
        return self


class PatchConfig(Settings):
    """Deviations from the parts' own dtypes."""

    ae_float32: Literal["ae_float32"] | None = Field(None, description="the VAE computes in fp32")


class TrainModelConfig(Settings):
    """The model file of a training run."""

    load_video_features: bool = Field(False, description="train on what flashi2v-encode wrote; see the data file")
    load_text_features: bool = Field(False, description="the same for captions")
    task: Literal["t2v", "i2v"] = "i2v"  # the reference's files say t2v, after the trunk, and mean the same
    patch: PatchConfig = PatchConfig()
    ae: AEConfig
    text_encoder: TextEncoderConfig
    diffusion: DiffusionConfig
    predictor: TrainPredictorConfig
    recipe: dict[str, Any] = Field({}, description="settings of the recipe that --recipe names")

    @model_validator(mode="after")
    def _check_patch(self) -> "TrainModelConfig":
        if self.patch.ae_float32 and self.ae.dtype not in ("fp32", "float32"):
            raise ValueError(f"patch.ae_float32 contradicts ae.dtype {self.ae.dtype!r}: remove one of them")
        return self


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run computes.

    Attributes:
        options: of the command line.
        model: the model file.
        data: the data file.
        recipe_class: of what is learnt, or of the network alone; None means FlashI2V's own, which takes seconds to
            import.
    """

    options: TrainOptions
    model: TrainModelConfig
    data: DataConfig
    recipe_class: "RecipeClass | None" = None

    @cached_property
    def recipe(self) -> "Recipe":
        """What is learnt, with its settings.

        Raises:
            InputError: the settings are not those of the recipe.
        """
        from flashi2v_train.recipe import build_recipe

        return build_recipe(self.recipe_class, self.model.recipe, f"{self.options.mm_model}: recipe")

    @property
    def bf16(self) -> bool:
        """Whether the transformer computes in bf16."""
        return self.model.predictor.dtype == "bf16" if self.options.bf16 is None else self.options.bf16

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, F, H, W) of one sample's latent; with buckets, of the main one."""
        frames, height, width = self.data.dataset_param.main_bucket
        return self.model.predictor.in_dim, (frames - 1) // 4 + 1, height // 8, width // 8

    @cached_property
    def kinds(self) -> "tuple[RunConfig, ...]":
        """The run as one of clips of a single shape, for every bucket."""
        param = self.data.dataset_param
        if not isinstance(param.buckets, list):
            return (self,)
        names = ("sample_num_frames", "sample_height", "sample_width")
        params = [param.model_copy(update={"buckets": None, **dict(zip(names, one))}) for one in param.buckets]
        return tuple(replace(self, data=self.data.model_copy(update={"dataset_param": one})) for one in params)

    @cached_property
    def costs(self) -> "list[Cost]":
        """What clips of every kind cost, which takes seconds to count."""
        from flashi2v_train.buckets import costs_of

        return costs_of(self)

    @property
    def main_kind(self) -> "RunConfig":
        """The run as one of clips of the main shape alone, at which validation looks."""
        return next(kind for kind in self.kinds if kind.latent_shape == self.latent_shape)

    def parallel_dims(self, world_size: int) -> ParallelDims:
        """Return how this run is spread over a number of processes.

        Raises:
            InputError: it cannot be.
        """
        predictor = self.model.predictor
        return plan_parallel_dims(
            self.options,
            world_size,
            num_layers=predictor.num_layers,
            num_heads=predictor.num_heads,
            split=predictor.pipeline_num_layers,
        )

    def micro_batches(self, dims: ParallelDims) -> int:
        """Return the micro batches per optimizer step of one data parallel rank.

        Raises:
            InputError: the global batch does not divide, or does not fill the pipeline.
        """
        per_pass = self.options.micro_batch_size * dims.data
        total = self.options.global_batch_size or per_pass
        if total % per_pass:
            raise InputError(
                f"--global-batch-size {total} must be a multiple of --micro-batch-size x data parallel processes = "
                f"{per_pass}"
            )
        number = total // per_pass
        if number < dims.pipeline:
            raise InputError(
                f"micro batches per step: {number}, too few to fill a pipeline of {dims.pipeline} processes: set "
                f"--global-batch-size to at least {dims.pipeline * per_pass}"
            )
        rounds = max(1, number // dims.pipeline)
        in_rounds = dims.num_stages > dims.pipeline or self.options.pipeline_schedule == "zero-bubble"
        if in_rounds and number % rounds:
            raise InputError(
                f"micro batches per step: {number}, which cannot be split into {rounds} equal rounds: set "
                f"--global-batch-size to a multiple of {dims.pipeline * per_pass}"
            )
        return number

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as plain JSON values."""
        options = self.options.model_dump(mode="json", exclude=self.options.unanswered())
        if self.recipe_class is not None:
            module = self.recipe_class.__module__
            if module in ("__main__", "__mp_main__"):
                module = Path(inspect.getfile(self.recipe_class)).stem
            options["recipe"] = f"{module}:{self.recipe_class.__qualname__}"
        return {
            "options": options,
            "model": self.model.model_dump(mode="json"),
            "data": self.data.model_dump(mode="json"),
        }

    def notes(self) -> list[str]:
        """Say which settings of the files have no effect here, and why."""
        notes = self.model.predictor.notes()
        sampling = {"num_inference_steps"}  # --eval-steps says it
        if not (self.options.eval_interval and self.options.eval_videos):
            sampling |= {"shift", "guidance_scale"}
        inference = self.model.diffusion.model_fields_set & sampling
        notes += [f"diffusion.{key} has no effect in training: it belongs to sampling" for key in sorted(inference)]
        if self.data.dataset_param.columns and self.recipe_class is None:
            notes.append("dataset_param.columns has no effect without --recipe: nothing reads them")
        if self.model.predictor.pipeline_num_layers is not None and self.options.pipeline_model_parallel_size == 1:
            notes.append("predictor.pipeline_num_layers has no effect without --pipeline-model-parallel-size")
        return notes


def read_run_config(options: TrainOptions, *, recipe: "RecipeClass | None" = None, encodes: bool = False) -> RunConfig:
    """Read and check all files of a run, before any device is touched.

    Args:
        options: of the command line.
        recipe: what is learnt, where `options.recipe` does not name it.
        encodes: read them for encoding ahead: features are then to be made, whatever the files say of loading them.

    Raises:
        InputError: one line that names the file and key, and what to change.
    """
    _check_wandb(options)
    model = load_config(options.mm_model, TrainModelConfig)
    data = load_config(options.mm_data, DataConfig)
    if encodes:
        without = {"load_video_features": False, "load_text_features": False}
        model = model.model_copy(update=without)
        # What is encoded does not depend on columns, and a record that lacks one has latents all the same.
        dataset = data.dataset_param.model_copy(update={**without, "features_path": None, "columns": {}})
        data = data.model_copy(update={"dataset_param": dataset})
    dataset = data.dataset_param
    if dataset.tokenizer_max_length != model.predictor.text_len:
        raise InputError(
            f"tokenizer_max_length {dataset.tokenizer_max_length} in {options.mm_data} differs from predictor.text_len "
            f"{model.predictor.text_len} in {options.mm_model}: set the same number"
        )
    if not dataset.return_prompt_mask:
        raise InputError(f"{options.mm_data}: return_prompt_mask must be true: padding is zeroed by the mask")
    for key in ("load_video_features", "load_text_features"):
        if getattr(dataset, key) != getattr(model, key):
            raise InputError(
                f"{key} is {_json(getattr(model, key))} in {options.mm_model} and {_json(getattr(dataset, key))} in "
                f"{options.mm_data} (dataset_param): set the same"
            )
    if options.feature_cache_gib and dataset.load_video_features and dataset.load_text_features:
        raise InputError("--feature-cache-gib has no effect where all features are loaded: leave it out")
    if options.trains_adapters and model.predictor.from_pretrained is None:
        raise InputError(f"{options.mm_model}: LoRA changes a trained model: set predictor.from_pretrained")
    if options.start == "still":
        _check_still_start(model.predictor, options.mm_model)
    dataset.transform_pipeline.check_range()
    check_directory(options.save, "--save")
    read_eval_data(options, data)
    config = RunConfig(options, model, data, _find_recipe(options, recipe))
    # A question about the run is answered without its files.
    if not (options.dry_run or options.suggest_split) and (missing := find_missing(config, encodes=encodes)):
        names = ", ".join(f"{item.key} = {item.path}" for item in missing)
        one = len(missing) == 1
        raise InputError(str(missing[0]) if one else f"--dry-run says where what is missing comes from: {names}")
    if dataset.buckets is not None and os.path.exists(dataset.metafile_or_dir_path):
        config = replace(config, data=data.model_copy(update={"dataset_param": resolve(dataset)}))
    if encodes:
        return config
    if config.recipe_class is not None:
        from flashi2v_train.recipe import example

        example(config)  # refuses what does not fit together
    elif model.recipe:
        raise InputError(f"{options.mm_model}: recipe has settings, but no --recipe names what they are for")
    return config


def _check_still_start(predictor: PredictorConfig, path: Path) -> None:
    entries = predictor.in_dim * math.prod(predictor.patch_size)
    if predictor.from_pretrained is not None:
        raise InputError(f"--start still has no effect on weights: leave it out, or {path}'s predictor.from_pretrained")
    if predictor.hidden_size < entries:
        raise InputError(f"--start still: {path}'s predictor.hidden_size must be at least {entries}, a patch's numbers")


def _find_recipe(options: TrainOptions, given: "RecipeClass | None") -> "RecipeClass | None":
    if options.recipe is None:
        return given
    if given is not None:
        raise InputError(f"--recipe {options.recipe}: this program trains {given.__name__}: leave the option out")
    found: RecipeClass = load_class(options.recipe, "--recipe")
    return found


def _check_wandb(options: TrainOptions) -> None:
    """Refuse `--wandb-project` where wandb is not installed.

    Raises:
        InputError: with what to install.
    """
    given = options.wandb_exp_name or options.wandb_save_dir
    if given and not options.wandb_project:
        raise InputError("--wandb-exp-name and --wandb-save-dir have no effect without --wandb-project")
    if options.wandb_project and importlib.util.find_spec("wandb") is None:
        raise InputError("--wandb-project: wandb is not installed: pip install 'flashi2v-train[wandb]'")


def read_eval_data(options: TrainOptions, trained_on: DataConfig) -> DataConfig:
    """Read the data file of the validation, which is that of the training where there is no other.

    Raises:
        InputError: its samples are not of the shape that the run trains on.
    """
    if options.eval_data is None:
        return trained_on
    data = load_config(options.eval_data, DataConfig)
    fixed = ("sample_height", "sample_width", "sample_num_frames", "tokenizer_max_length", "return_prompt_mask")
    for key in (*fixed, "columns"):
        ours, theirs = getattr(trained_on.dataset_param, key), getattr(data.dataset_param, key)
        if ours != theirs:
            raise InputError(
                f"--eval-data {options.eval_data}: {key} is {theirs}, in {options.mm_data} it is {ours}: set the same"
            )
    ours, theirs = trained_on.dataset_param.buckets, data.dataset_param.buckets
    if theirs not in (ours, "auto") or (theirs and not ours):
        raise InputError(f"--eval-data {options.eval_data}: buckets are not those of {options.mm_data}: set the same")
    data.dataset_param.transform_pipeline.check_range()
    return data.model_copy(update={"dataset_param": data.dataset_param.model_copy(update={"buckets": ours})})


def _json(value: bool) -> str:
    return "true" if value else "false"
