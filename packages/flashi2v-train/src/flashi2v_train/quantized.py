"""Matrices of 8 bits that are not trained: gradients pass through them, and every parallelism takes them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashi2v_data.errors import InputError
from flashi2v_model.quantization import quantize


class FrozenLinear(nn.Linear):
    """A linear layer of 8 bits and a scale for each row; whole only while it is multiplied, forward and backward.

    Its parameters are plain tensors, which FSDP2, DTensor and DCP know.

    Args:
        linear: whose place it takes.
        weight: (out, in) in int8.
        scale: (out, 1).
    """

    def __init__(self, linear: nn.Linear, weight: Tensor, scale: Tensor) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.scale = (nn.Parameter(tensor, requires_grad=False) for tensor in (weight, scale))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Product.apply(x, self.weight, self.scale)
        return out if self.bias is None else out + self.bias


class _Product(torch.autograd.Function):
    """x W^T, which keeps W in 8 bits for its backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, weight.to(x.dtype) * scale.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        return grads[0] @ (weight.to(grads[0].dtype) * scale.to(grads[0].dtype)), None, None


def freeze_in_8_bits(part: nn.Module) -> None:
    """Store matrices in 8 bits as `flashi2v_model.quantization.quantize` does, and so that gradients pass through them.

    Args:
        part: of a transformer, on any device, meta included; none of its weights is trained.

    Raises:
        InputError: torchao is not installed, or too old.
    """
    matrices = [name for name, module in part.named_modules() if type(module) is nn.Linear]
    if not all(parameter.is_meta for parameter in part.parameters()):  # which have no numbers, and take torchao long
        quantize(part, "int8")
    for name in matrices:
        linear: Any = part.get_submodule(name)
        weight = linear.weight
        if weight.is_meta:
            numbers, scale = torch.empty_like(weight, dtype=torch.int8), weight.new_empty(len(weight), 1)
        elif hasattr(weight, "qdata"):
            numbers, scale = weight.qdata, weight.scale.reshape(-1, 1)
        else:
            raise InputError("--lora-quantize needs torchao 0.18: pip install 'flashi2v-train[quantize]'")
        part.set_submodule(name, FrozenLinear(linear, numbers, scale))
