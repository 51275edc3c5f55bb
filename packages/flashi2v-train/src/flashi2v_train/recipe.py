"""What a run learns. FlashI2V's own recipe is the default; another is a subclass, named by `--recipe module:Class`.

B samples, C latent channels, F latent frames, H W latent grid, L text tokens. Names in a batch:

    latents (B, C, F, H, W)     z, of the whole clip                       from the encoders, or from a store
    condition (B, C, 1, H, W)   of the first frame alone
    text (B, L, text_dim)       states of the caption, padding zeroed
    (B,) or (B, n) in fp32      the columns of `dataset_param.columns`     from the record
    noise, sigma, ...           what `draw` returns
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from flashi2v_data.errors import InputError
from flashi2v_data.loading.sampler import SampleKey
from flashi2v_data.randomness import generator
from flashi2v_data.settings import validate
from flashi2v_model import FlashI2VTransformer3DModel
from flashi2v_model.config import PredictorConfig
from flashi2v_model.config import Settings as StrictSettings
from flashi2v_model.encoders import DTYPES
from flashi2v_model.scheduler import NUM_TIMESTEPS, draw_sigmas, dynamic_shift, interpolate, target
from flashi2v_model.transformer import EMBED_INPUTS
from flashi2v_train.batch import Batch, Series, to

if TYPE_CHECKING:
    from flashi2v_train.config import RunConfig

Generators = Callable[[str], list[torch.Generator]]
"""From what is to be drawn ("noise") to a generator for each sample, seeded by run, purpose, epoch and sample alone."""


class Recipe:
    """What is random about samples, what the network is given, and what its velocity is compared with.

    Every method is called in the process that needs it, and depends on its arguments alone, so that losses are the
    same on any number of processes, and a resumed run equals an uninterrupted one.

    Args:
        settings: of the section `recipe` in the model file.

    Attributes:
        transformer: class of the network.
    """

    transformer: type[FlashI2VTransformer3DModel] = FlashI2VTransformer3DModel

    class Settings(StrictSettings):
        """The keys of the section `recipe` in the model file, with their types; none are needed here."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def build(self, predictor: PredictorConfig) -> FlashI2VTransformer3DModel:
        """Build the network, with start values."""
        return self.transformer(**predictor.transformer_arguments())

    def draw(self, config: "RunConfig", generators: Generators) -> Batch:
        """Draw what is random about some samples, on the CPU.

        Returns:
            noise (B, C, F, H, W), sigma (B,) in [0, 1], low_freq_energy_ratio (B,). Validation sets `sigma` itself.
        """
        diffusion = config.model.diffusion
        low, high = config.model.predictor.low_freq_energy_ratio
        *_, height, width = config.latent_shape
        shift = dynamic_shift(height, width) if diffusion.use_dynamic_shifting else diffusion.training_shift
        return {
            "noise": torch.stack([torch.randn(config.latent_shape, generator=g) for g in generators("noise")]),
            "sigma": draw_sigmas(
                generators("sigma"),
                logit_normal=diffusion.use_logitnorm_time_sampling,
                shift=shift,
            ),
            "low_freq_energy_ratio": torch.cat(
                [low + (high - low) * torch.rand(1, generator=g) for g in generators("ratio")]
            ),
        }

    def inputs(self, batch: Batch) -> Batch:
        """Return what the network's `embed` is given, by name, (B, ...) each; the same names for every batch.

        Where it asks for a name beyond the usual ones, it gets the column of that name.
        """
        return {
            "hidden_states": interpolate(batch["latents"], batch["noise"], batch["sigma"]),
            "timestep": NUM_TIMESTEPS * batch["sigma"],
            "encoder_hidden_states": batch["text"],
            "condition": batch["condition"],
            "low_freq_energy_ratio": batch["low_freq_energy_ratio"],
            **{name: batch[name] for name in self.transformer.conditioning_names},
        }

    def target(self, batch: Batch) -> Batch:
        """Return what `loss` is given beside the prediction, by name, (B, ...) each; it is sent to the last stage."""
        return {"velocity": target(batch["latents"], batch["noise"])}

    def loss(self, velocity: Tensor, target: Batch) -> Tensor:
        """Return the loss of every sample, (B,) in fp32: here the mean squared error.

        Args:
            velocity: (B, C, F, H, W), as predicted.
            target: of `target`.
        """
        return (velocity.float() - target["velocity"]).square().mean(dim=(1, 2, 3, 4))


class MotionWeighted(Recipe):
    """FlashI2V whose loss looks mostly at what moves: most of a clip is often as its first frame, and says little.

    The squared error at a place of the latent grid counts (1 + w m) / (1 + w), w being `motion_weight` and
    m = d / (d + 0.2) in [0, 1) how much the clip has changed there: d is the mean square over channels of its latent
    less that of its first frame, whose variance is 1. The first latent, which is given, counts 1, to be as it is. What
    the words leave open is learnt with a leaning to motion.
    """

    class Settings(Recipe.Settings):
        motion_weight: float = Field(10.0, ge=0)

    settings: Settings

    def target(self, batch: Batch) -> Batch:
        """Return velocity (B, C, F, H, W) and weight (B, 1, F, H, W)."""
        change = (batch["latents"] - batch["condition"]).float().square().mean(dim=1, keepdim=True)
        most = self.settings.motion_weight
        weight = (1 + most * change / (change + 0.2)) / (1 + most)
        weight[:, :, 0] = 1
        return super().target(batch) | {"weight": weight}

    def loss(self, velocity: Tensor, target: Batch) -> Tensor:
        """Return the weighted mean squared error of every sample, (B,) in fp32."""
        errors = (velocity.float() - target["velocity"]).square() * target["weight"]
        return errors.mean(dim=(1, 2, 3, 4))


# What `--recipe` may name: a recipe, or a network that is to be trained by FlashI2V's own.
RecipeClass: TypeAlias = type[Recipe] | type[FlashI2VTransformer3DModel]


def build_recipe(chosen: RecipeClass | None, settings: dict[str, Any], where: str) -> Recipe:
    """Return a recipe with its settings.

    Args:
        chosen: its class, or that of the network alone; None means FlashI2V's own.
        settings: as given.
        where: they stand.

    Raises:
        InputError: the class is neither, or the settings are not its own.
    """
    recipe: type[Any] = chosen or Recipe
    if issubclass(recipe, FlashI2VTransformer3DModel):
        plain = Recipe(validate(settings, Recipe.Settings, where))
        plain.transformer = recipe
        return plain
    if not issubclass(recipe, Recipe):
        raise InputError(f"--recipe: {recipe.__name__} is no flashi2v_train.Recipe, nor a FlashI2VTransformer3DModel")
    return recipe(validate(settings, recipe.Settings, where))


def draw_series(config: "RunConfig", series: Series, keys: Iterable[SampleKey], device: torch.device) -> Series:
    """Add to micro batches what is drawn for their samples.

    Args:
        config: of the run.
        series: what was encoded.
        keys: of all its samples, in order.
        device: where to.
    """
    rest, batches = iter(keys), []
    for bucket, batch in zip(series.buckets, series.batches):
        own = [*islice(rest, len(batch["latents"]))]

        def generators(purpose: str, own: list[SampleKey] = own) -> list[torch.Generator]:
            return [generator(config.options.seed, purpose, *key) for key in own]

        batches.append(batch | to(config.recipe.draw(config.kinds[bucket], generators), device))
    return replace(series, batches=batches)


def example(config: "RunConfig") -> tuple[Batch, Batch]:
    """Return inputs and target of one sample, of a run's names, shapes and dtypes; data are zeros.

    Raises:
        InputError: a name in a batch is given twice, or the loss is not one number for every sample.
    """
    channels, _, height, width = config.latent_shape
    predictor, data, recipe = config.model.predictor, config.data.dataset_param, config.recipe
    features = {
        "latents": torch.zeros(1, *config.latent_shape),
        "condition": torch.zeros(1, channels, 1, height, width),
        "text": torch.zeros(1, predictor.text_len, predictor.text_dim, dtype=DTYPES[config.model.text_encoder.dtype]),
    }
    columns = {name: torch.zeros(1, *shape) for name, shape in data.column_shapes.items()}
    batch: Batch = {}
    for part in (features, columns, recipe.draw(config, lambda purpose: [torch.Generator()])):
        if twice := batch.keys() & part.keys():
            raise InputError(
                f"a batch has two tensors named {sorted(twice)[0]!r}: give the column, or the draw, another name"
            )
        batch |= part
    try:
        inputs, wanted = recipe.inputs(batch), recipe.target(batch)
    except KeyError as error:
        raise InputError(
            f"{type(recipe).__name__} asks for {error}, and a batch has {', '.join(batch)}: add it to "
            "dataset_param.columns in the data file"
        ) from error
    names = [*EMBED_INPUTS, *recipe.transformer.conditioning_names]
    if sorted(inputs) != sorted(names):
        raise InputError(f"{recipe.transformer.__name__} is to be given {names}, and gets {list(inputs)}")
    loss = recipe.loss(torch.zeros(1, *config.latent_shape), wanted)
    if loss.shape != (1,):
        raise InputError(
            f"the loss of {type(recipe).__name__} must be one number per sample, (B,): got {tuple(loss.shape)}"
        )
    return inputs, wanted
