"""Layers that adapters change: peft's own, and those that peft has none for.

A `DifferenceLayer` is of the same kind as peft's, so that what chooses, weighs, fuses and deletes adapters in diffusers
holds for it too.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils import is_peft_available
from torch import Tensor, nn
from torch.func import functional_call

from flashi2v_model.errors import InputError
from flashi2v_model.weights.adapters import TABLE

if TYPE_CHECKING or is_peft_available():
    from peft import LoraConfig as LoraConfig
    from peft.tuners.lora import Conv3d as Conv3d
    from peft.tuners.lora import LoraLayer as LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer as BaseTunerLayer
    from peft.tuners.tuners_utils import check_adapters_to_merge
else:  # `check_peft` says so before any of it is used
    Conv3d = LoraConfig = LoraLayer = BaseTunerLayer = object


def check_peft() -> None:
    """Refuse to go on without peft.

    Raises:
        InputError: saying how to install it.
    """
    if not is_peft_available():
        raise InputError("LoRA adapters need peft: pip install 'flashi2v-model[lora]'")


@contextmanager
def adapters_scaled(model: nn.Module, attention_kwargs: Mapping[str, Any] | None) -> Iterator[None]:
    """Weigh the active adapters of a model, besides what each is weighed by, while the block runs.

    Args:
        model: with or without adapters.
        attention_kwargs: {"scale": weight}, as diffusers' pipelines hand it on.

    Raises:
        InputError: `attention_kwargs` has another key.
    """
    given = dict(attention_kwargs or {})
    scale = given.pop("scale", 1.0)
    if given:
        raise InputError(f"attention_kwargs: there is only 'scale', not {', '.join(map(repr, given))}")
    found = model.modules() if scale != 1 and is_peft_available() else ()
    layers: list[Any] = [module for module in found if isinstance(module, BaseTunerLayer)]
    before = [dict(layer.scaling) for layer in layers]
    for layer, scaling in zip(layers, before):
        active = (name for name in layer.active_adapters if name in scaling)
        layer.scaling.update({name: scaling[name] * scale for name in active})
    try:
        yield
    finally:
        for layer, scaling in zip(layers, before):
            layer.scaling.update(scaling)


class Conv3dLayer(Conv3d):
    """peft's, which takes a kernel of one for that of a 2-D convolution when it fuses."""

    def get_delta_weight(self, adapter: str) -> Tensor:
        up, down = (layers[adapter].get_parameter("weight") for layers in (self.lora_B, self.lora_A))
        weight = self.get_base_layer().get_parameter("weight")
        change = up.float().flatten(1) @ down.float().flatten(1) * self.scaling[adapter]
        return change.reshape(weight.shape).to(weight.dtype)


class DifferenceLayer(nn.Module, LoraLayer):
    """A norm, or a place where a table passes, with what adapters add to its weight and bias.

    Args:
        base_layer: the norm; or an identity.
        holder: the module that holds the table which passes through the identity.
    """

    adapter_layer_names = ("lora_diff",)
    other_param_names = ("r", "lora_alpha", "scaling")

    def __init__(self, base_layer: nn.Module, holder: nn.Module) -> None:
        nn.Module.__init__(self)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft does not know such layers
            LoraLayer.__init__(self, base_layer)
        self.lora_diff = nn.ModuleDict()
        self._holder = (holder,)  # in a tuple, as it is no part of this one

    def add(self, name: str, parts: Mapping[str, Tensor]) -> None:
        """Take what an adapter adds, in place of what it added before, whose parameters compiled code may hold."""
        is_new = name not in self.lora_diff
        changes = nn.Module() if is_new else self.lora_diff[name]
        for key, own in self._changed().items():
            given = parts.get(f"lora_diff.{key}")
            change = torch.zeros(own.shape) if given is None else given.reshape(own.shape)
            if not is_new:
                changes.get_parameter(key).data.copy_(change)
                continue
            # Where the weights are put away, what changes them waits on the CPU.
            change = change.to("cpu" if own.is_meta else own.device, own.dtype, copy=True)
            changes.register_parameter(key, nn.Parameter(change, requires_grad=False))
        self.lora_diff[name] = changes
        self.r[name] = self.lora_alpha[name] = 1
        self.scaling[name] = 1.0

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Refuse the pair of matrices that peft would add."""
        raise InputError(f"adapter {adapter_name!r}: a norm has no matrices, so peft cannot train it")

    def forward(self, x: Tensor) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x)
        if self.disable_adapters or self.merged:
            return result
        for name in self.active_adapters:
            if name in self.lora_diff:
                # A norm is linear in its weight and bias.
                changes = {key: tensor.to(x.device) for key, tensor in self.lora_diff[name].named_parameters()}
                is_table = isinstance(self.base_layer, nn.Identity)
                change = changes["weight"] if is_table else functional_call(self.base_layer, changes, (x,))
                result = result + change * self.scaling[name]
        return result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.lora_diff:
                self._add_to_base(name, 1, safe=safe_merge)
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        while self.merged_adapters:
            self._add_to_base(self.merged_adapters.pop(), -1)

    def scale_layer(self, scale: float) -> None:
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] = 1.0 if scale is None else self.scaling[name] / scale

    def _changed(self) -> dict[str, Tensor]:
        """Return the parameters that adapters change."""
        if isinstance(self.base_layer, nn.Identity):
            return {"weight": self._holder[0].get_parameter(TABLE)}
        return dict(self.base_layer.named_parameters())

    def _add_to_base(self, name: str, sign: int, safe: bool = False) -> None:
        for key, own in self._changed().items():
            changed = own.data + self.lora_diff[name].get_parameter(key).data * (sign * self.scaling[name])
            if safe and not changed.isfinite().all():
                raise ValueError(f"adapter {name!r} is not finite, and is not fused")
            own.data = changed.to(own.dtype)
