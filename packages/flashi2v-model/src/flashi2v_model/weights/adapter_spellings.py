"""The spellings in which LoRA adapters are published, turned into each other without touching a number.

What an adapter is, whatever its spelling, says `flashi2v_model.weights.adapters`.
"""

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashi2v_model.errors import InputError
from flashi2v_model.weights.adapters import TABLE, TABLE_LAYER, Adapter, by_layer, check_whole, scale_of
from flashi2v_model.weights.comparing import fault_phrases
from flashi2v_model.weights.key_names import modules, translate

logger = logging.getLogger(__name__)

Header = Mapping[str, str]  # of a safetensors file

CONFIG = "lora_adapter_metadata"  # where diffusers writes peft's configuration, as JSON
ALPHA_DTYPE = "flashi2v_alpha_dtype"  # of the tensors that it was; "none" of an adapter without
# Settings of peft that are read, that tensors say too, or that are of training alone. Any other changes what an adapter
# does, where it is set.
_READ = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "peft_type"}
_TOLD_BY_TENSORS = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
_OF_TRAINING = {
    *("task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "bias"),
    *("lora_dropout", "init_lora_weights", "eva_config", "megatron_core", "megatron_config", "qalora_group_size"),
}
# Ways to start that take something off the model's own weights.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Spelling:
    """How keys are written.

    Attributes:
        prefix: of every key.
        layout: of the layers' names: "diffusers" or "wan"; "flat" is wan with underscores in place of dots.
        down: what the matrix of A is called.
        up: likewise of B.
    """

    prefix: str
    layout: str
    down: str = "lora_A"
    up: str = "lora_B"

    def __str__(self) -> str:
        names = "Wan2.1's" if self.layout == "wan" else "Wan2.1's, flat" if self.layout == "flat" else "diffusers'"
        return f"{self.prefix}*.{self.down}.weight, {names} names of layers"


SPELLINGS = {
    "diffusers": Spelling("transformer.", "diffusers"),
    "bare": Spelling("", "diffusers"),
    "peft": Spelling("base_model.model.", "diffusers"),
    "comfyui": Spelling("diffusion_model.", "wan", "lora_down", "lora_up"),
    "comfyui-ab": Spelling("diffusion_model.", "wan"),
    "wan": Spelling("", "wan"),
    "kohya": Spelling("lora_unet_", "flat", "lora_down", "lora_up"),
}
_WITH_ALPHAS = ("comfyui", "comfyui-ab", "wan", "kohya")  # as tensors; the others keep peft's configuration beside them

# The endings of keys, with the part that they mean; "default" is the name of an adapter that peft left in.
_ENDINGS = {
    r"(lora_A|lora_down|lora\.down)(\.default)?\.weight": "lora_A.weight",
    r"(lora_B|lora_up|lora\.up)(\.default)?\.weight": "lora_B.weight",
    r"lora_B(\.default)?\.bias": "lora_B.bias",
    r"alpha": "alpha",
    r"diff|diff_m|lora_diff(\.default)?\.weight": "lora_diff.weight",
    r"diff_b|lora_diff(\.default)?\.bias": "lora_diff.bias",
    r"lora_magnitude_vector(\.default)?(\.weight)?": "lora_magnitude_vector",
}
_KEY = re.compile(rf"(?P<layer>.+?)\.(?P<ending>{'|'.join(_ENDINGS)})")
_BLOCK = re.compile(r"(?<![^.])blocks\.\d+\.")
# Wan2.1's image-to-video model has layers that read an image embedding.
_IMAGE = re.compile(r"k_img|v_img|img_emb|add_[kqv]_proj|norm_added|image_embedder")
_OTHER_KINDS = {".lokr_": "LoKr", ".hada_": "LoHa", ".loha_": "LoHa", "dora_scale": "DoRA as kohya writes it"}


_FLAT = {name.replace(".", "_"): name for name in modules("wan")}


def is_adapter(names: Iterable[str]) -> bool:
    """Tell whether most names are those of an adapter's parts."""
    names = list(names)
    return 2 * sum(_KEY.fullmatch(name) is not None for name in names) > len(names)


def spelling_of(names: Collection[str]) -> tuple[str, Spelling]:
    """Return the name of the spelling of an adapter's keys, "other" where it has none, and the spelling.

    Raises:
        InputError: these are not the keys of an adapter.
    """
    found = [match for name in names if (match := _KEY.fullmatch(name))]
    if not found:
        raise InputError(_no_adapter(names))
    layers = [match["layer"] for match in found]
    flat = SPELLINGS["kohya"]
    if layers[0].startswith(flat.prefix):
        return "kohya", flat
    prefix = _prefix(layers)
    own = [layer.removeprefix(prefix) for layer in layers]
    # Some names stand in both; differences are called otherwise where layers are.
    known = {layout: len(translate(own, layout, layout)) for layout in ("diffusers", "wan")}
    known["wan"] += sum(match["ending"].startswith("diff") for match in found)
    known["diffusers"] += sum(match["ending"].startswith("lora_diff") for match in found)
    layout = max(known, key=lambda layout: known[layout])
    endings = {match["ending"].removesuffix(".weight").removesuffix(".default") for match in found}
    down, up = next(
        ((a, b) for a, b in (("lora_down", "lora_up"), ("lora.down", "lora.up")) if a in endings), ("lora_A", "lora_B")
    )
    spelling = Spelling(prefix, layout, down, up)
    return next((name for name, known in SPELLINGS.items() if known == spelling), "other"), spelling


def _prefix(layers: Iterable[str]) -> str:
    """Return what most names of layers have before those of a transformer."""
    named = Counter(layer[: at.start()] for layer in layers if (at := _BLOCK.search(layer)))
    if named:
        return named.most_common(1)[0][0]
    known = [spelling.prefix for spelling in SPELLINGS.values() if spelling.prefix]
    return next((prefix for prefix in known if all(layer.startswith(prefix) for layer in layers)), "")


def read_adapter(
    state_dict: Mapping[str, Tensor], header: Header | None = None, layers: Collection[str] = ()
) -> Adapter:
    """Return an adapter of any spelling under the names of this module; tensors are passed on as they are.

    Args:
        state_dict: all of its tensors.
        header: of its safetensors file, where diffusers keeps alpha.
        layers: that a variant of the network has, in diffusers' layout.

    Raises:
        InputError: naming every key that is not understood, or lacks its other half.
    """
    _, spelling = spelling_of(state_dict)
    names = {key: _own_name(key, spelling, layers) for key in state_dict}
    if unknown := [key for key, name in names.items() if name is None]:
        raise InputError(_no_adapter(unknown))
    adapter = {name: state_dict[key] for key, name in names.items() if name is not None}
    if len(adapter) < len(names):
        twice = Counter(names.values()).most_common(1)[0][0]
        raise InputError(f"this adapter says {twice} twice: {', '.join(key for key in names if names[key] == twice)}")
    check_whole(adapter)
    return adapter | _alphas(adapter, header)


def _own_name(key: str, spelling: Spelling, layers: Collection[str]) -> str | None:
    match = _KEY.fullmatch(key)
    if match is None or not key.startswith(spelling.prefix):
        return None
    layer = match["layer"].removeprefix(spelling.prefix)
    if match["ending"] == "diff_m":
        layer += f".{TABLE_LAYER}" if spelling.layout != "flat" else f"_{TABLE_LAYER}"
    if spelling.layout == "flat":
        number = re.match(r"blocks_(\d+)_", layer)
        pattern = layer if number is None else f"blocks_#_{layer[number.end() :]}"
        layer = _FLAT.get(pattern, "").replace("#", number[1] if number else "")
        known = translate([layer], "wan", "diffusers").get(layer)
    elif spelling.layout == "diffusers" and (layer in layers or layer.rpartition(".")[2] == TABLE_LAYER):
        known = layer
    else:
        known = translate([layer], spelling.layout, "diffusers").get(layer)
    if known is None:
        return None
    part = next(part for ending, part in _ENDINGS.items() if re.fullmatch(ending, match["ending"]))
    return f"{known.replace(TABLE, TABLE_LAYER)}.{part}"


def _no_adapter(keys: Iterable[str]) -> str:
    keys = list(keys)
    hint = next((f" ({kind} is not read)" for mark, kind in _OTHER_KINDS.items() if any(mark in k for k in keys)), "")
    if all(_IMAGE.search(key) for key in keys):
        hint = " (it is of Wan2.1's image-to-video model, FlashI2V has no layers that read an image embedding)"
    phrases = fault_phrases(unexpected=keys)
    return f"this is no adapter of this transformer{hint}: {'; '.join(phrases) or 'it is empty'}"


def peft_config(header: Header | None) -> dict[str, Any]:
    """Return peft's configuration as diffusers and peft write it; {} where there is none.

    Raises:
        InputError: it is damaged, or sets what is not read here.
    """
    text = (header or {}).get(CONFIG)
    if text is None:
        return {}
    try:
        values = json.loads(text)
        config = {key.removeprefix(SPELLINGS["diffusers"].prefix): value for key, value in values.items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"this adapter's {CONFIG} is damaged: {error}") from error
    odd = {key for key, value in config.items() if value and key not in _READ | _TOLD_BY_TENSORS | _OF_TRAINING}
    odd |= {"init_lora_weights"} if str(config.get("init_lora_weights")).startswith(_CHANGES_BASE) else set()
    odd |= {"peft_type"} if config.get("peft_type", "LORA") != "LORA" else set()
    if odd:
        said = ", ".join(f"{key} {config[key]!r:.60}" for key in sorted(odd))
        raise InputError(f"this adapter's {CONFIG} sets {said}: its weights alone do not say what it does")
    return config


def _alphas(adapter: Adapter, header: Header | None) -> Adapter:
    """Return the alphas that a configuration says, and no tensor does."""
    config, written = peft_config(header), (header or {}).get(ALPHA_DTYPE, "float32")
    if not config or written == "none":
        unread = {key: value for key, value in (header or {}).items() if re.search(r"(^|_)alpha$", key)}
        if unread and not any(name.endswith(".alpha") for name in adapter):
            logger.warning("this adapter weighs 1, as it has no alpha; its header says %s, which is not read", unread)
        return {}
    if config.get("use_dora") and not any(name.endswith("lora_magnitude_vector") for name in adapter):
        raise InputError(f"this adapter's {CONFIG} says use_dora, and it has no lora_magnitude_vector")
    alphas: Adapter = {}
    try:
        dtype = getattr(torch, written)
        for layer, parts in by_layer(adapter).items():
            if "lora_A.weight" not in parts:
                continue
            rank = parts["lora_A.weight"].shape[0]
            if (said := _of_pattern(config.get("rank_pattern"), layer, config["r"])) != rank:
                raise InputError(f"this adapter's {CONFIG} says rank {said} of {layer}, which has {rank}")
            alpha = float(_of_pattern(config.get("alpha_pattern"), layer, config["lora_alpha"]))
            weighed = alpha * math.sqrt(rank) if config.get("use_rslora") else alpha
            if "alpha" in parts and not math.isclose(own := parts["alpha"].item(), weighed, rel_tol=1e-2):
                raise InputError(f"this adapter's {CONFIG} says alpha {weighed:g} of {layer}, its tensor {own:g}")
            if "alpha" not in parts:
                alphas[f"{layer}.alpha"] = torch.tensor(weighed, dtype=dtype)
    except (AttributeError, KeyError, TypeError, re.error) as error:
        raise InputError(f"this adapter's {CONFIG} is damaged: {error!r}") from error
    return alphas


def _of_pattern(patterns: Mapping[str, Any] | None, layer: str, usual: Any) -> Any:
    """Return what peft reads for a layer: its patterns are regular expressions of the ends of names."""
    fits = (value for key, value in (patterns or {}).items() if re.fullmatch(rf"(.*\.)?({key})", layer))
    return next(fits, usual)


def make_config(adapter: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return peft's configuration of an adapter, every layer by its whole name."""
    pairs = {layer: parts for layer, parts in by_layer(adapter).items() if "lora_A.weight" in parts}
    ranks = {layer: parts["lora_A.weight"].shape[0] for layer, parts in pairs.items()}
    alphas = {layer: _plain(scale_of(parts) * ranks[layer]) for layer, parts in pairs.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "init_lora_weights": False,  # what is drawn would be replaced
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{layer}": value for layer, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{layer}": value for layer, value in alphas.items() if value != alpha},
        "target_modules": sorted(pairs),
        "lora_bias": any("lora_B.bias" in parts for parts in pairs.values()),
        "use_dora": any("lora_magnitude_vector" in parts for parts in pairs.values()),
    }


def _plain(number: float) -> float:
    return int(number) if number == int(number) else number


def spell(adapter: Mapping[str, Tensor], name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Write an adapter in a spelling; tensors are passed on as they are.

    Args:
        adapter: from `read_adapter`.
        name: one of `SPELLINGS`.

    Returns:
        the tensors, and what belongs into the header of their file: alpha, where it is no tensor.

    Raises:
        InputError: naming what the spelling has no place for.
    """
    state_dict, homeless = {}, []
    for layer, parts in by_layer(adapter).items():
        for part, tensor in parts.items():
            if part == "alpha" and name not in _WITH_ALPHAS:
                continue
            key = _their_name(layer, part, name, scale_of(parts) if "lora_A.weight" in parts else None)
            if key is None or key in state_dict:
                homeless.append(f"{layer}.{part}")
            else:
                state_dict[key] = tensor
    if homeless:
        raise InputError(
            f"the spelling {name} has no place for {'; '.join(fault_phrases(unexpected=homeless))}: "
            f"take {'diffusers' if name in _WITH_ALPHAS else 'comfyui'}"
        )
    alphas = [tensor for key, tensor in adapter.items() if key.endswith(".alpha")]
    if name in _WITH_ALPHAS or (not alphas and name != "peft"):
        return state_dict, {}
    prefix = SPELLINGS["diffusers"].prefix if name == "diffusers" else ""
    config = {f"{prefix}{key}": value for key, value in make_config(adapter).items()}
    dtype = str(alphas[0].dtype).removeprefix("torch.") if alphas else "none"
    return state_dict, {CONFIG: json.dumps(config), ALPHA_DTYPE: dtype}


def _their_name(layer: str, part: str, name: str, scale: float | None) -> str | None:
    """Return a key in a spelling; `scale` is that of the layer's pair, if it has one."""
    spelling = SPELLINGS[name]
    if name not in _WITH_ALPHAS:
        # What diffusers knows too, where it means the same.
        part = "lora_B.bias" if (part, scale) == ("lora_diff.bias", 1) else part
        return f"{spelling.prefix}{layer}.{part}"
    parts = {
        "lora_A.weight": f"{spelling.down}.weight",
        "lora_B.weight": f"{spelling.up}.weight",
        "lora_B.bias": "diff_b" if scale == 1 else None,
        "lora_diff.weight": "diff",
        "lora_diff.bias": "diff_b",
        "alpha": "alpha",
    }
    ending = parts.get(part)
    is_table = layer.rpartition(".")[2] == TABLE_LAYER
    inner = f"{layer.removesuffix(TABLE_LAYER)}{TABLE}" if is_table else layer
    theirs = translate([inner], "diffusers", "wan").get(inner)
    if theirs is None or ending is None:
        return None
    if is_table:
        theirs, ending = theirs.removesuffix(f".{TABLE_LAYER}"), "diff_m"
    return f"{spelling.prefix}{theirs.replace('.', '_') if spelling.layout == 'flat' else theirs}.{ending}"
