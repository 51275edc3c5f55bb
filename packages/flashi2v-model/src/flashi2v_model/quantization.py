"""Matrices of 8 bits in place of 16, by torchao: about half the memory, and with `_dynamic` 8-bit products, too."""

from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from flashi2v_model.errors import InputError

Quantization: TypeAlias = Literal["int8", "fp8", "int8_dynamic", "fp8_dynamic"]

# Compute capabilities of the first NVIDIA GPUs on which torchao multiplies such numbers.
_CAPABILITY = {"int8_dynamic": (8, 0), "fp8_dynamic": (8, 9)}


def quantize(transformer: nn.Module, kind: Quantization, device: torch.device | None = None) -> None:
    """Store the matrices of a transformer in 8 bits, in place: int8, or float8 (e4m3), with a scale for each row.

    `int8` and `fp8` compute in the dtype that the weights had. `int8_dynamic` and `fp8_dynamic` round the activations
    to 8 bits as well, each token with a scale of its own, and multiply in 8 bits. What computes in fp32 (time
    embedding, head), convolutions and norms stay as they are.

    Args:
        transformer: on any device, meta included, without adapters. Without numbers it is only stored smaller.
        kind: of numbers.
        device: that it will compute on; None: the one that it is on.

    Raises:
        InputError: torchao is not installed, there is no such kind, or the device cannot multiply it.
    """
    if kind not in get_args(Quantization):
        raise InputError(f"quantize must be one of {', '.join(get_args(Quantization))}, got {kind!r}")
    matrices = (module.weight for name, module in transformer.named_modules() if _is_stored_smaller(module, name))
    weight = next(matrices, torch.empty(0))
    check_products(kind, device or weight.device, weight.dtype)
    try:
        from torchao.quantization import quantize_
    except ImportError as error:
        raise InputError("quantize needs torchao: pip install 'flashi2v-model[quantize]'") from error
    # Without numbers nothing is multiplied, and torchao would ask for the kernels all the same.
    config = _config(kind.partition("_")[0] if weight.is_meta else kind)
    quantize_(transformer, config, filter_fn=_is_stored_smaller)


def _config(kind: str) -> Any:
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Float8WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        PerRow,
    )

    made: dict[str, Any] = {
        "int8": Int8WeightOnlyConfig,
        "fp8": Float8WeightOnlyConfig,
        "int8_dynamic": Int8DynamicActivationInt8WeightConfig,
        "fp8_dynamic": partial(Float8DynamicActivationFloat8WeightConfig, granularity=PerRow()),
    }
    return made[kind]()


def check_products(kind: Quantization, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a kind of numbers whose products a device does not compute; `int8` and `fp8` are stored alone.

    Args:
        kind: of numbers.
        device: that is to compute; of meta, and of a card that is not in this machine, nothing is known.
        dtype: of the weights before they are quantised.

    Raises:
        InputError: the device is of another type or too old, or fp8 would take the place of another dtype than bf16.
    """
    if kind not in _CAPABILITY or device.type == "meta" or (kind, device.type) == ("int8_dynamic", "cpu"):
        return
    stored, _, _ = kind.partition("_")
    needed = ".".join(map(str, _CAPABILITY[kind]))
    instead = f"{stored} stores in 8 bits alone, and runs everywhere"
    if device.type != "cuda":
        raise InputError(f"quantize {kind} needs a GPU of compute capability {needed}, not {device.type}: {instead}")
    if torch.cuda.is_available() and (found := torch.cuda.get_device_capability(device)) < _CAPABILITY[kind]:
        raise InputError(
            f"quantize {kind} needs compute capability {needed}, this GPU has {found[0]}.{found[1]}: {instead}"
        )
    if kind == "fp8_dynamic" and dtype != torch.bfloat16:
        raise InputError(f"quantize {kind} needs a model in bf16, this is in {dtype}: {instead}")


def _is_stored_smaller(module: nn.Module, name: str) -> bool:
    return type(module) is nn.Linear  # and no layer of a class derived from it, which computes in fp32


def is_quantized(weight: Tensor) -> bool:
    """Tell whether a weight is of a class that keeps fewer bits, torchao's or quanto's."""
    return type(weight).dequantize is not Tensor.dequantize
