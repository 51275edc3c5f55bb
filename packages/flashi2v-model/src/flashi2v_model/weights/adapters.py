"""LoRA adapters as tensors by name, and what they do to weights.

An adapter has one form in here. A key is a layer's name in diffusers' layout and one of these parts, with r the rank:

    lora_A.weight (r, in, ...), lora_B.weight (out, r, ...)   the pair, whose product is added to the layer's weight
    lora_B.bias (out,)                                        added to the layer's bias, weighed as the pair is
    alpha (1 number)                                          the pair weighs alpha / r; without it 1
    lora_diff.weight, lora_diff.bias                          added to the layer's weight and bias as they are
    lora_magnitude_vector (out,)                              of DoRA

A table of modulation, which is no layer, is the weight of `blocks.#.modulation`, or of `modulation` behind all blocks.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flashi2v_model.errors import InputError
from flashi2v_model.weights.comparing import FLOATS, fault_phrases

Adapter = dict[str, Tensor]

PARTS = (
    *("lora_A.weight", "lora_B.weight", "lora_B.bias", "alpha"),
    *("lora_diff.weight", "lora_diff.bias", "lora_magnitude_vector"),
)
# Small adapters are stored in 8 bits too, without scales.
_FLOATS = (*FLOATS, torch.float8_e4m3fn, torch.float8_e5m2)
TABLE, TABLE_LAYER = "scale_shift_table", "modulation"  # the parameter, and what adapters call it


def by_layer(adapter: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the parts of an adapter for each layer."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in adapter.items():
        layer, part = split_name(name)
        layers.setdefault(layer, {})[part] = tensor
    return layers


def split_name(name: str) -> tuple[str, str]:
    """Return the layer of a key, and the part."""
    part = next(part for part in PARTS if name.endswith(f".{part}"))
    return name.removesuffix(f".{part}"), part


def check_whole(adapter: Adapter) -> None:
    """Refuse an adapter with halves of pairs, ranks that differ within one, or numbers that are no floats.

    Raises:
        InputError: naming all of them.
    """
    faults = fault_phrases(mistyped=[(name, t.dtype) for name, t in adapter.items() if t.dtype not in _FLOATS])
    missing, misshapen = [], []
    for layer, parts in by_layer(adapter).items():
        down, up = parts.get("lora_A.weight"), parts.get("lora_B.weight")
        if down is None and up is None:
            if alone := parts.keys() & {"alpha", "lora_B.bias", "lora_magnitude_vector"}:
                missing += [f"{layer}.lora_A.weight beside its {min(alone)}"]
            continue
        if down is None or up is None:
            missing += [f"{layer}.{'lora_A' if down is None else 'lora_B'}.weight"]
        elif down.ndim < 2 or up.ndim < 2 or down.shape[0] != up.shape[1] or not down.shape[0]:
            misshapen += [(f"{layer}.lora_B.weight", tuple(up.shape), f"lora_A.weight {tuple(down.shape)}")]
        elif "lora_diff.weight" in parts:
            missing += [f"one of {layer}: both a pair and a whole difference change its weight"]
        if (alpha := parts.get("alpha")) is not None and alpha.numel() != 1:
            missing += [f"the one number that {layer}.alpha is"]
    faults += fault_phrases(missing=missing)
    faults += [f"{name} is {given} beside {other}" for name, given, other in misshapen[:8]]
    if faults:
        raise InputError(f"this adapter is not whole: {'; '.join(faults)}")


def scale_of(parts: Mapping[str, Tensor]) -> float:
    """Return by what the pair of a layer is weighed: alpha / r."""
    alpha = parts.get("alpha")
    return 1.0 if alpha is None else alpha.item() / parts["lora_A.weight"].shape[0]


def parameter_of(layer: str, part: str) -> str:
    """Return the parameter of the network that a part changes."""
    if layer.rpartition(".")[2] == TABLE_LAYER:
        return f"{layer.removesuffix(TABLE_LAYER)}{TABLE}"
    return f"{layer}.{'bias' if part.endswith('.bias') else 'weight'}"


def misfits(adapter: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Return as phrases what an adapter has that a network has no place for.

    Args:
        adapter: from `read_adapter`.
        shapes: of the network's parameters.
    """
    unexpected, misshapen = [], []
    for layer, parts in by_layer(adapter).items():
        for part, tensor in parts.items():
            shape, given = shapes.get(parameter_of(layer, part)), tuple(tensor.shape)
            if shape is None or (part == "lora_A.weight" and len(shape) < 2):
                unexpected.append(f"{layer}.{part}")
                continue
            rank = parts["lora_A.weight"].shape[0] if "lora_A.weight" in parts else 0
            own = {
                "lora_A.weight": (rank, *shape[1:]),
                "lora_B.weight": (shape[0], rank),
                "lora_magnitude_vector": (shape[0],),
                "alpha": given,
            }.get(part, tuple(shape))
            # Of a convolution a matrix does as well, and B has a kernel of one.
            if given[0:1] != own[0:1] or math.prod(given) != math.prod(own):
                misshapen.append((f"{layer}.{part}", given, own))
    return fault_phrases(unexpected=unexpected, misshapen=misshapen)


def merge(weights: Mapping[str, Tensor], adapter: Mapping[str, Tensor], scale: float = 1.0) -> dict[str, Tensor]:
    """Return a network's weights with an adapter in them: W + scale * alpha / r * B A, summed in fp32 and rounded once.

    Args:
        weights: under diffusers' names; those that change are copied.
        adapter: from `read_adapter`.
        scale: weight of the adapter.

    Raises:
        InputError: it does not fit the weights, or is of DoRA, which is no sum.
    """
    if faults := misfits(adapter, {name: tensor.shape for name, tensor in weights.items()}):
        raise InputError(f"this adapter does not fit the weights: {'; '.join(faults)}")
    result = dict(weights)
    for layer, parts in by_layer(adapter).items():
        if "lora_magnitude_vector" in parts:
            raise InputError(f"this adapter is of DoRA ({layer}.lora_magnitude_vector), which cannot be merged here")
        weighed = scale * scale_of(parts) if "lora_A.weight" in parts else 0.0
        for part, tensor in parts.items():
            if part in ("alpha", "lora_A.weight"):
                continue
            change = tensor.float() * (weighed if part in ("lora_B.weight", "lora_B.bias") else scale)
            if part == "lora_B.weight":
                change = change.flatten(1) @ parts["lora_A.weight"].float().flatten(1)
            own = result[name := parameter_of(layer, part)]
            exact = own.to(torch.promote_types(own.dtype, torch.float32))
            result[name] = (exact + change.reshape(own.shape)).to(own.dtype)
    return result
