"""What `flashi2v-model` does with whole models: reads one of any layout, and writes it in another."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from flashi2v_model.adapter_choice import AdapterChoice
from flashi2v_model.adapter_commands import merged
from flashi2v_model.errors import InputError
from flashi2v_model.transformer import FlashI2VTransformer3DModel
from flashi2v_model.variants import transformer_class
from flashi2v_model.weights.conversion import (
    as_model,
    check_variant_layout,
    convert_state_dict,
    model_arguments,
    variant_arguments,
)
from flashi2v_model.weights.key_names import LAYOUTS, is_trunk
from flashi2v_model.weights.libraries import quieten
from flashi2v_model.weights.reading import read_state_dict
from flashi2v_model.weights.runs import run_of
from flashi2v_model.weights.settings import stored_settings, unusual
from flashi2v_model.weights.trained_adapters import merged_run
from flashi2v_model.weights.writing import TORCH_SUFFIXES, independent, write_file


@dataclass(frozen=True)
class Model:
    """A transformer as its files have it.

    Attributes:
        weights: under diffusers' names.
        arguments: of its constructor.
        assumed: those arguments of which nothing is said.
        network: its class.
    """

    weights: dict[str, Tensor]
    arguments: dict[str, Any]
    assumed: list[str]
    network: type[FlashI2VTransformer3DModel]

    @classmethod
    def understood(
        cls,
        path: Path,
        state_dict: dict[str, Tensor],
        network: type[FlashI2VTransformer3DModel],
        num_heads: int | None,
        to: str = "diffusers",
    ) -> "Model":
        """Understand weights.

        Args:
            path: theirs.
            state_dict: as they are stored.
            network: their class.
            num_heads: as the user says.
            to: the layout that they are for.

        Raises:
            InputError: these are not the weights of such a network, or the layout has no place for them.
        """
        if network is not FlashI2VTransformer3DModel:
            check_variant_layout(state_dict, to, network)
            return cls(state_dict, variant_arguments(path, network), [], network)
        ours = convert_state_dict(state_dict)
        return cls(ours, *model_arguments(path, ours, num_heads), network)

    @property
    def lack(self) -> str:
        """What it has not, in words; a variant is what its class says."""
        lacks = self.network is FlashI2VTransformer3DModel and is_trunk(self.weights)
        return " (text-to-video trunk, without the layers of FlashI2V)" if lacks else ""

    def changed(self, adapters: tuple[AdapterChoice, ...], dtype: str | None) -> "Model":
        """Return it with adapters in it, and its weights of another type.

        Raises:
            InputError: naming the adapter that does not fit.
        """
        from flashi2v_model.encoders import DTYPES  # which takes seconds, as do presets

        weights = merged(self.weights, adapters)
        for key in weights if dtype else ():  # one by one, so that there is no second copy of all
            weights[key] = weights[key].to(DTYPES[str(dtype)])
        return replace(self, weights=weights)

    def as_transformer(self) -> FlashI2VTransformer3DModel:
        """Return the model itself.

        Raises:
            InputError: it lacks a part.
        """
        return as_model(independent(self.weights), self.arguments, self.network)

    def write_file(self, path: Path, to: str) -> None:
        """Write one file in another layout; what is assumed is not said there."""
        known = {name: value for name, value in self.arguments.items() if name not in self.assumed}
        write_file(convert_state_dict(self.weights, "diffusers", to), path, known)

    def write_pipeline(
        self, directory: Path, source: Path, encoders: Path, shift: float | None, max_shard_size: str
    ) -> None:
        """Write a pipeline, with what is known of the run that it comes from."""
        from flashi2v_model.presets import save_pipeline

        run = run_of(source)
        save_pipeline(
            self.as_transformer(),
            directory,
            encoders,
            max_shard_size=max_shard_size,
            shift=run.shift if shift is None else shift,
            defaults=run.defaults,
            trained_on=run.words,
        )

    def notes(self, destination: Path, to: str) -> Iterator[str]:
        """Yield what whoever loads the files must know."""
        if to == "diffusers" and self.assumed:
            values = (f"{name} {self.arguments[name]}" for name in self.assumed)
            yield f"assumed, as neither the weights nor a config.json say: {', '.join(values)}"
        if destination.suffix in TORCH_SUFFIXES and (found := unusual(self.arguments)):
            yield f"a {destination.suffix} carries no settings: set {', '.join(found)} where you load it"


def read_model(
    source: Path, to: str, adapter: Path | None, *, ema: bool, recipe: str | None, num_heads: int | None
) -> Model:
    """Read a model of any layout.

    Args:
        source: its files, or a run.
        to: the layout that it is for.
        adapter: the checkpoint of a run that trained adapters, which are merged into what they were trained on.
        ema: the moving average, where there is one, instead of the raw weights.
        recipe: module:Class of a variant.
        num_heads: as the user says.

    Raises:
        InputError: it cannot be read, or is of another network.
    """
    quieten()
    network = transformer_class(recipe)
    stored_settings(source, network)  # refuses another variant before its weights are looked at
    stored = read_state_dict(source, ema=ema) if adapter is None else merged_run(adapter, ema=ema)
    return Model.understood(source, stored, network, num_heads, to)


def check_options(
    destination: Path, to: str, encoders: Path | None, shift: float | None, max_shard_size: str | None
) -> None:
    """Refuse what makes no sense for a model.

    Raises:
        InputError: naming what can be chosen.
    """
    if to not in LAYOUTS:
        raise InputError(f"--to {to} is a spelling of LoRA adapters: a model is written as {', '.join(LAYOUTS)}")
    is_file = destination.suffix in (".safetensors", *TORCH_SUFFIXES)
    if to != "diffusers" and not is_file:
        raise InputError(f"{destination}: the {to} layout is written as one file that ends in .safetensors or .pt")
    if to == "diffusers" and is_file:
        raise InputError(f"{destination}: the diffusers layout is a directory: name one without {destination.suffix}")
    if to != "diffusers" and (encoders is not None or max_shard_size is not None):
        raise InputError("--encoders and --max-shard-size are of a directory, which is always --to diffusers")
    if shift is not None and (encoders is None or not 0 < shift < float("inf")):
        raise InputError(f"--shift is a positive number, of a pipeline, so together with --encoders; got {shift}")
    if max_shard_size is not None and not re.fullmatch(r"\d+(\.\d+)?[KMGT]B", max_shard_size.upper()):
        raise InputError(f"--max-shard-size is a number with KB, MB, GB or TB, such as 5GB; got {max_shard_size}")
