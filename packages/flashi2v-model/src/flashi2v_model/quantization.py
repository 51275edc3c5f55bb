"""Weights of 8 bits in place of 16, by torchao: about half the memory, computed in the dtype that they had."""

from typing import Literal, TypeAlias, get_args

from torch import Tensor, nn

from flashi2v_model.errors import InputError

Quantization: TypeAlias = Literal["int8", "fp8"]


def quantize(transformer: nn.Module, kind: Quantization) -> None:
    """Store the matrices of a transformer in 8 bits, in place: int8, or float8 (e4m3), with a scale for each row.

    What computes in fp32 (time embedding, head), convolutions and norms stay as they are.

    Args:
        transformer: on any device, meta included, without adapters.
        kind: of numbers.

    Raises:
        InputError: torchao is not installed, or there is no such kind.
    """
    if kind not in get_args(Quantization):
        raise InputError(f"quantize must be one of {', '.join(get_args(Quantization))}, got {kind!r}")
    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise InputError("quantize needs torchao: pip install 'flashi2v-model[quantize]'") from error
    config = Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig()
    quantize_(transformer, config, filter_fn=_is_stored_smaller)


def _is_stored_smaller(module: nn.Module, name: str) -> bool:
    return type(module) is nn.Linear  # and no layer of a class derived from it, which computes in fp32


def is_quantized(weight: Tensor) -> bool:
    """Tell whether a weight is of a class that keeps fewer bits, torchao's or quanto's."""
    return type(weight).dequantize is not Tensor.dequantize
