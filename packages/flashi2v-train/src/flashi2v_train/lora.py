"""LoRA adapters in place of all weights: what of a transformer is trained, and what its checkpoints say beside it.

A parameter of an adapter is called as in its file: the layer's name in diffusers' layout, then `lora_A.weight`, say.
What is trained whole beside it keeps its own name.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from flashi2v_data.errors import InputError
from flashi2v_model import FlashI2VTransformer3DModel
from flashi2v_model.errors import named
from flashi2v_model.lora import parameter_shapes
from flashi2v_model.lora_layers import LoraConfig, check_peft
from flashi2v_model.weights.adapter_files import open_adapter
from flashi2v_model.weights.adapter_spellings import make_config, read_adapter
from flashi2v_model.weights.adapters import Adapter, by_layer, merge, misfits, split_name
from flashi2v_model.weights.checkpoint import ADAPTERS
from flashi2v_model.weights.trained_adapters import base_fingerprint
from flashi2v_train.config import RunConfig
from flashi2v_train.options import LORA_TARGETS, LoraOptions
from flashi2v_train.quantized import freeze_in_8_bits

if TYPE_CHECKING:
    from flashi2v_train.parallelise import Stage

_NAME = "default"  # of the one adapter, to peft


@dataclass(frozen=True)
class Adapters:
    """What is to be trained of a transformer.

    Attributes:
        settings: of peft's `LoraConfig`.
        also: parts that are trained whole.
        start: numbers to start from, of pairs and of whole parts; empty: A at random, B and all differences 0.
        dtype: of what is not trained.
        in_8_bits: keep its matrices so.
    """

    settings: dict[str, Any]
    also: tuple[str, ...]
    start: Adapter
    dtype: torch.dtype
    in_8_bits: bool

    def apply(self, transformer: FlashI2VTransformer3DModel) -> None:
        """Add the adapters, in fp32, and let nothing else be trained; the same on all processes, for a seed of torch.

        Args:
            transformer: whole, with its weights, in fp32, before it is spread over processes; or on the meta device.

        Raises:
            InputError: torchao is asked for, and not installed.
        """
        for name, parameter in transformer.named_parameters():
            if not self._is_whole(name):
                parameter.requires_grad_(False).data = parameter.data.to(self.dtype)
        for name, part in transformer.named_children():
            if self.in_8_bits and name not in self.also:
                freeze_in_8_bits(part)
        transformer.add_adapter(LoraConfig(**self.settings), _NAME)
        own = {}
        for name, parameter in transformer.named_parameters():
            if self._is_whole(name) or f".{_NAME}." in name:
                parameter.data = parameter.data.float()
                own[_plain(name)] = parameter.requires_grad_()
        if any(parameter.is_meta for parameter in own.values()):
            return
        pairs = {name: tensor for name, tensor in self.start.items() if name in own}
        changes = {name: tensor for name, tensor in self.start.items() if split_name(name)[1].startswith("lora_diff")}
        whole = {name: parameter.data for name, parameter in own.items() if self._is_whole(name)}
        for name, tensor in (pairs | (merge(whole, changes) if changes else {})).items():
            own[name].data.copy_(tensor)

    def _is_whole(self, name: str) -> bool:
        return name.split(".")[0] in self.also


def plan_adapters(config: RunConfig) -> Adapters | None:
    """Return what is to be trained of a transformer in place of all weights; None where these are.

    Raises:
        InputError: an option, or the adapter to go on with, does not fit the transformer; or peft is not installed.
    """
    options = config.options
    if not options.trains_adapters:
        return None
    check_peft()
    with torch.device("meta"):  # its numbers do not matter
        transformer = config.recipe.build(config.model.predictor)
    base = dict(transformer.named_modules())
    start: Adapter = {}
    also = tuple(options.lora_also)
    if options.lora_from is not None:
        with named(f"--lora-from {options.lora_from}"):
            start = read_adapter(*open_adapter(options.lora_from), tuple(base))
            also += tuple(sorted(_whole_parts(start, base) - {*also}))
    for part in also:
        if part not in (parts := _parts(transformer)):
            raise InputError(f"--lora-also {part}: there is no such part to train whole, only {', '.join(parts)}")
    if start:
        settings = make_config({name: tensor for name, tensor in start.items() if "lora_diff" not in name})
    else:
        rank = options.lora_rank
        layers = _layers(base, options, also)
        settings = {"r": rank, "lora_alpha": options.lora_alpha or rank, "target_modules": layers}
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    return Adapters(settings, also, start, dtype, options.lora_quantize is not None)


def _whole_parts(adapter: Adapter, base: Mapping[str, nn.Module]) -> set[str]:
    """Return the parts that an adapter changes as a whole, where it can be trained at all.

    Raises:
        InputError: it does not fit the transformer, or changes what is not trained here.
    """
    if faults := misfits(adapter, parameter_shapes(base)):
        raise InputError(f"it does not fit the transformer: {'; '.join(faults)}")
    parts = set()
    for layer, found in by_layer(adapter).items():
        part = layer.split(".")[0]
        pair = "lora_A.weight" in found
        other = [name for name in found if "lora_diff" in name or "magnitude" in name]
        unlike_peft = bool(other) or not isinstance(base[layer], nn.Linear)
        if unlike_peft if pair else part == "blocks":
            raise InputError(
                f"it changes {layer}.{min(other or found)}, which is not trained: merge it into the model first "
                "(flashi2v-model convert --lora)"
            )
        parts |= set() if pair else {part}
    return parts


def _parts(transformer: FlashI2VTransformer3DModel) -> list[str]:
    """Return the parts that may be trained whole: those made of matrices and convolutions, the blocks apart."""
    return [
        name
        for name, part in transformer.named_children()
        if name != "blocks"
        and (holders := [module for module in part.modules() if [*module.parameters(recurse=False)]])
        and all(isinstance(module, (nn.Linear, nn.Conv3d)) for module in holders)
    ]


def _layers(base: Mapping[str, nn.Module], options: LoraOptions, also: Sequence[str]) -> list[str]:
    """Return the layers that get an adapter.

    Raises:
        InputError: a target fits none, or one has fewer rows or columns than the rank.
    """
    matrices = {
        name: module
        for name, module in base.items()
        if isinstance(module, nn.Linear) and name.split(".")[0] not in also
    }
    found: set[str] = set()
    for target in options.lora_targets:
        fitting = [name for name in matrices if f".{name}".endswith(f".{target}")]
        if not fitting:
            raise InputError(f"--lora-targets {target}: no matrix is called so; names end in {', '.join(LORA_TARGETS)}")
        found.update(fitting)
    for name in sorted(found):
        least = min(matrices[name].in_features, matrices[name].out_features)
        if options.lora_rank is not None and options.lora_rank > least:
            raise InputError(
                f"--lora-rank {options.lora_rank} is above the width {least} of {name}: take a smaller one, 8 to 64 "
                "as a rule"
            )
    return sorted(found)


def trained_parameters(stages: Sequence["Stage"], options: LoraOptions) -> dict[str, nn.Parameter]:
    """Return what checkpoints and the moving average hold of a process's stages: all parameters, or the adapters."""
    found = {name: p for stage in stages for name, p in stage.transformer.named_parameters()}
    if not options.trains_adapters:
        return found
    return {_plain(name): parameter for name, parameter in found.items() if parameter.requires_grad}


def _plain(name: str) -> str:
    return name.replace(f".{_NAME}.", ".")


def checkpoint_facts(config: RunConfig, adapters: Adapters | None) -> dict[str, Any]:
    """Return what a checkpoint of adapters says of them, for its config.json; {} of a run that trains all weights.

    Runs go on only where it is the same, keys with an underscore apart.
    """
    if adapters is None:
        return {}
    path = str(config.model.predictor.from_pretrained)
    facts = {
        "lora_rank": adapters.settings["r"],
        "lora_alpha": adapters.settings["lora_alpha"],
        "lora_alpha_pattern": adapters.settings.get("alpha_pattern", {}),
        "lora_quantize": config.options.lora_quantize,
        "base_weights": base_fingerprint(path),
        "_base_path": path,
    }
    return {ADAPTERS: facts}


def check_start(path: str, started: Iterable[str], adapters: Adapters) -> None:
    """Refuse layers that weights lack and that would stay as they start.

    Raises:
        InputError: saying how to train them.
    """
    if new := sorted({name.split(".")[0] for name in started} - {*adapters.also}):
        more = " ".join(f"--lora-also {part}" for part in new)
        raise InputError(f"{path} lacks {', '.join(new)}, which start at zero: train them beside the adapters ({more})")
