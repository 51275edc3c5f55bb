"""LoRA adapters of any published spelling in a transformer: every key or none, and a failure changes nothing."""

import copy
import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.loaders import PeftAdapterMixin
from torch import Tensor, nn

from flashi2v_model.errors import InputError
from flashi2v_model.lora_layers import (
    BaseTunerLayer,
    Conv3d,
    Conv3dLayer,
    DifferenceLayer,
    LoraConfig,
    LoraLayer,
    check_peft,
)
from flashi2v_model.quantization import is_quantized
from flashi2v_model.weights.adapter_files import open_adapter
from flashi2v_model.weights.adapter_spellings import CONFIG, make_config, read_adapter
from flashi2v_model.weights.adapters import TABLE, Adapter, by_layer, misfits, scale_of, split_name
from flashi2v_model.weights.comparing import fault_phrases
from flashi2v_npu_ops import route_conv3d

_MATRICES = (nn.Linear, nn.Conv3d)


class AdapterModel(PeftAdapterMixin):
    """A model of diffusers that takes adapters exactly or not at all."""

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        prefix: str | None = "transformer",
        hotswap: bool = False,
        adapter_name: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        network_alphas: None = None,
        low_cpu_mem_usage: bool = False,
        _pipeline: Any = None,
        **fetching: Any,
    ) -> None:
        """Load a LoRA adapter, exactly or not at all: after an error the model is what it was before.

        Args:
            pretrained_model_name_or_path_or_dict: a file, a directory, a hub id or a state dict, in any spelling of
                `flashi2v_model.weights.adapter_spellings`.
            prefix: has no effect: what comes before the names of layers is found in the keys.
            hotswap: put it in the place of the adapter of this name, which a compiled model does not notice.
            adapter_name: what to call it; None: "default_0", "default_1", ...
            metadata: peft's configuration of it, where the file does not hold it.
            network_alphas: nothing; alphas belong into the state dict.
            low_cpu_mem_usage: as of diffusers.
            fetching: as of `flashi2v_model.weights.adapter_files.open_adapter`.

        Raises:
            InputError: naming every key that this model has no place for; or the name is taken, or (for `hotswap`) not
                there; or peft is not installed.
        """
        check_peft()
        if network_alphas is not None:
            raise InputError("network_alphas: give alphas in the state dict, as layer.alpha")
        for unused in ("use_safetensors", "proxies"):  # nothing is unpickled here but tensors
            fetching.pop(unused, None)
        state_dict, header = open_adapter(pretrained_model_name_or_path_or_dict, **fetching)
        if metadata:
            header = {**header, CONFIG: json.dumps(dict(metadata), default=list)}
        base = dict(self._base_layers())
        adapter = read_adapter(state_dict, header, base)
        if faults := misfits(adapter, parameter_shapes(base)):
            raise InputError(f"this adapter does not fit the transformer: {'; '.join(faults)}")
        name = self._checked_name(adapter_name, hotswap)
        pairs, differences = _as_layers(adapter, base)
        config = make_config(pairs | {key: alpha for key, alpha in adapter.items() if key.endswith(".alpha")})
        kept = {}
        if hotswap:
            self._check_swap(name, pairs, differences)
            # What peft would hold against the adapter that is there; the weights below count.
            there = self.peft_config[name]
            kept = {key: getattr(there, key) for key in ("alpha_pattern", "use_rslora", "lora_dropout")}
        pipeline = _pipeline.components.values() if _pipeline is not None else ()
        with _unchanged_on_failure([self, *(part for part in pipeline if isinstance(part, nn.Module))], name):
            super().load_lora_adapter(
                self._as_large(name, pairs) if hotswap else pairs,
                prefix=None,
                hotswap=hotswap,
                adapter_name=name,
                metadata=config | kept,
                low_cpu_mem_usage=low_cpu_mem_usage,
                _pipeline=_pipeline,
            )
            self._add_differences(name, differences, hotswap)
            if hotswap:
                self._reweigh(name, adapter)
                self.peft_config[name] = LoraConfig(**config)
            for layer in self.modules():
                if type(layer) is Conv3d:
                    layer.__class__ = Conv3dLayer
            route_conv3d(self)  # the new ones too

    def fuse_lora(
        self, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: list[str] | None = None
    ) -> None:
        """Add active adapters to the weights; arguments as of diffusers.

        Raises:
            InputError: the weights are quantised, and would lose the adapter in their rounding.
        """
        if any(isinstance(m, nn.Linear) and is_quantized(m.weight) for m in self.modules()):
            raise InputError(
                "adapters are not fused into quantised weights: leave them as they are, or merge them before, by "
                "flashi2v-model convert --lora"
            )
        super().fuse_lora(lora_scale, safe_fusing, adapter_names)

    def _base_layers(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the model's own modules under the names that they have without adapters."""
        for name, module in self.named_modules():
            if ".lora_" not in f".{name}" and not name.endswith("base_layer"):
                yield name, module.get_base_layer() if isinstance(module, BaseTunerLayer) else module

    def _checked_name(self, name: str | None, hotswap: bool) -> str:
        taken = getattr(self, "peft_config", {})
        if name is None:
            name = next(free for i in range(len(taken) + 1) if (free := f"default_{i}") not in taken)
        if hotswap and name not in taken:
            raise InputError(f"hotswap: there is no adapter {name!r} to replace, only {', '.join(taken) or 'none'}")
        if not hotswap and name in taken:
            raise InputError(f"adapter_name: {name!r} is already in use: choose another, or delete that one first")
        if "." in name or not name:
            raise InputError(f"adapter_name: {name!r} must be a word without dots")
        return name

    def _check_swap(self, name: str, pairs: Adapter, differences: Mapping[str, Mapping[str, Tensor]]) -> None:
        wanted = {*pairs, *(f"{path}.{part}" for path, parts in differences.items() for part in parts)}
        if new := sorted(wanted - self._adapter(name).keys()):
            raise InputError(f"hotswap: the adapter {name!r} that is there has no {', '.join(_grouped(new))}")

    def _adapter(self, name: str) -> dict[str, nn.Parameter]:
        """Return the parameters of an adapter under the keys of its file."""
        parameters = ((path, parameter) for path, parameter in self.named_parameters() if f".{name}." in path)
        return {path.replace(f".{name}.", "."): parameter for path, parameter in parameters}

    def _as_large(self, name: str, pairs: Adapter) -> Adapter:
        """Return pairs of the ranks of those in whose place they are put: the lesser ones are filled up with zeros."""
        there, filled = self._adapter(name), {}
        for key, tensor in pairs.items():
            if (rank_dim := {"lora_A.weight": 0, "lora_B.weight": 1}.get(split_name(key)[1])) is not None:
                missing = list(tensor.shape)
                missing[rank_dim] = there[key].shape[rank_dim] - tensor.shape[rank_dim]
                if missing[rank_dim] < 0:
                    there[key].data = there[key].new_zeros(tensor.shape)
                else:
                    tensor = torch.cat((tensor, tensor.new_zeros(missing)), rank_dim)
            filled[key] = tensor
        return filled

    def _add_differences(self, name: str, differences: Mapping[str, Mapping[str, Tensor]], hotswap: bool) -> None:
        layers = [(path, layer) for path, layer in self.named_modules() if isinstance(layer, DifferenceLayer)]
        held = {path for path, layer in layers if name in layer.lora_diff}
        for path in held | differences.keys():
            parent, _, last = path.rpartition(".")
            holder = self.get_submodule(parent)
            child = getattr(holder, last)
            layer = child if isinstance(child, DifferenceLayer) else DifferenceLayer(child, holder)
            layer.add(name, differences.get(path, {}))
            if not hotswap:
                layer.set_adapter(name)  # as peft does with its own: the last to come is active, alone
            setattr(holder, last, layer)

    def _reweigh(self, name: str, adapter: Adapter) -> None:
        """Weigh what was put in an adapter's place as it asks for: peft reads no patterns there, nor set ranks."""
        layers = by_layer(adapter)
        for path, layer in self.named_modules():
            if isinstance(layer, LoraLayer) and name in layer.lora_A:
                parts = layers.get(path, {})
                scale = scale_of(parts) if "lora_A.weight" in parts else 1.0
                layer.r[name], layer.use_rslora[name] = layer.lora_A[name].get_parameter("weight").shape[0], False
                layer.lora_alpha[name] = scale * layer.r[name]
                if isinstance(layer.scaling[name], Tensor):  # of a model that is compiled for swapping
                    layer.scaling[name].fill_(scale)
                else:
                    layer.scaling[name] = scale


def _grouped(keys: list[str]) -> list[str]:
    return [phrase.removeprefix("missing ") for phrase in fault_phrases(missing=keys)]


def parameter_shapes(base: Mapping[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what adapters may change, by name."""
    shapes = {}
    for path, module in base.items():
        for key, parameter in module.named_parameters(recurse=False):
            if key in ("weight", "bias", TABLE):
                shapes[f"{path}.{key}" if path else key] = tuple(parameter.shape)
        if isinstance(module, nn.Linear):  # quantised ones are packed
            shapes[f"{path}.weight"] = (module.out_features, module.in_features)
    return shapes


def _as_layers(adapter: Adapter, base: Mapping[str, nn.Module]) -> tuple[Adapter, dict[str, dict[str, Tensor]]]:
    """Return what peft's layers hold, and what `DifferenceLayer`s do, by layer.

    Where a matrix is changed as a whole, it is one of the pair and the other is the identity. A difference of a bias
    is the bias of B.
    """
    pairs: Adapter = {}
    differences = {}
    layers = by_layer(adapter)
    for path, parts in layers.items():
        if not isinstance(base[path], _MATRICES):
            differences[path] = parts
            continue
        for part, tensor in _as_pair(base[path], parts).items():
            pairs[f"{path}.{part}"] = tensor
    if not pairs:  # peft knows adapters by their matrices
        path = next(path for path, module in base.items() if isinstance(module, nn.Linear))
        pairs = {f"{path}.{part}": tensor for part, tensor in _as_pair(base[path], {}).items()}
    # peft knows biases of all layers or of none.
    ups = [key for key in pairs if key.endswith("lora_B.weight")]
    if any(key.endswith("lora_B.bias") for key in pairs):
        biases = {key.replace("weight", "bias"): pairs[key].new_zeros(pairs[key].shape[0]) for key in ups}
        pairs = biases | pairs
    return pairs, differences


def _as_pair(module: nn.Module, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    weight = module.get_parameter("weight")
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.bfloat16
    scale = scale_of(parts) if "lora_A.weight" in parts else 1.0
    parts = {part: tensor.to(dtype) for part, tensor in parts.items()}
    rows, *kernel = (module.out_features, module.in_features) if isinstance(module, nn.Linear) else weight.shape
    columns = torch.Size(kernel).numel()
    down, up, bias = parts.get("lora_A.weight"), parts.get("lora_B.weight"), parts.get("lora_B.bias")
    if (whole := parts.get("lora_diff.weight")) is not None:
        whole = whole.reshape(rows, columns)
        down = whole if rows < columns else torch.eye(columns, dtype=dtype)
        up = torch.eye(rows, dtype=dtype) if rows < columns else whole
    elif down is None or up is None:  # the bias alone is changed
        down, up = torch.zeros(1, columns, dtype=dtype), torch.zeros(rows, 1, dtype=dtype)
    if (change := parts.get("lora_diff.bias")) is not None:
        bias = change / scale if bias is None else bias + change / scale
    ones = () if isinstance(module, nn.Linear) else (1,) * (len(kernel) - 1)
    pair = {"lora_A.weight": down.reshape(-1, *kernel), "lora_B.weight": up.reshape(rows, -1, *ones)}
    pair |= {} if bias is None else {"lora_B.bias": bias}
    magnitude = parts.get("lora_magnitude_vector")
    return pair | ({} if magnitude is None else {"lora_magnitude_vector": magnitude})


@contextmanager
def _unchanged_on_failure(roots: Iterable[nn.Module], name: str) -> Iterator[None]:
    """Leave modules as they were, down to the adapter of this name, where the block fails."""
    modules = list({id(module): module for root in roots for module in root.modules()}.values())
    containers = (dict, list, set, OrderedDict)
    before = [{k: copy.copy(v) if type(v) in containers else v for k, v in vars(module).items()} for module in modules]
    flags = [(parameter, parameter.requires_grad) for module in modules for parameter in module.parameters(False)]
    named = (item for root in roots for item in root.named_parameters())
    numbers = [(parameter, parameter.detach().clone()) for path, parameter in named if f".{name}." in path]
    try:
        yield
    except BaseException:
        for module, attributes in zip(modules, before):
            vars(module).clear()
            vars(module).update(attributes)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for parameter, values in numbers:
            parameter.data = values
        raise
