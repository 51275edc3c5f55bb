"""Adapters as the checkpoints of flashi2v-train hold them: trained numbers alone, and which model they belong to."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashi2v_model.errors import InputError
from flashi2v_model.weights.adapters import Adapter, merge
from flashi2v_model.weights.checkpoint import ADAPTERS, checkpoint_directory, is_checkpoint
from flashi2v_model.weights.fingerprint import fingerprint
from flashi2v_model.weights.key_names import detect_layout, translate
from flashi2v_model.weights.reading import read_json, read_state_dict


def find_trained(path: Path) -> Path | None:
    """Return the newest checkpoint of the run at `path`, or `path` itself, if it is one of adapters."""
    checkpoint = checkpoint_directory(path)
    config = checkpoint / "config.json"
    found = is_checkpoint(checkpoint) and config.is_file() and ADAPTERS in read_json(config)
    return checkpoint if found else None


def trained_adapter(checkpoint: Path, *, ema: bool = True) -> Adapter:
    """Return an adapter, with what was trained whole beside it as differences from the model.

    Args:
        checkpoint: from `find_trained`.
        ema: the moving average, where there is one, instead of the raw weights.

    Raises:
        InputError: the model is needed and not there, is another one, or lacks what was trained.
    """
    pairs, whole = _trained(checkpoint, ema)
    base = base_weights(checkpoint) if whole else {}
    if new := sorted({name.split(".")[0] for name in whole.keys() - base.keys()}):
        raise InputError(
            f"{checkpoint} was trained on a model without {', '.join(new)}, which an adapter cannot add: write a whole "
            "model, by flashi2v-model convert --to diffusers into a new directory"
        )
    for name, tensor in whole.items():
        layer, _, parameter = name.rpartition(".")
        pairs[f"{layer}.lora_diff.{parameter}"] = tensor - base[name].to(tensor.dtype)
    return pairs


def merged_run(checkpoint: Path, *, ema: bool = True) -> dict[str, Tensor]:
    """Return the weights of a whole model, under diffusers' names: those that were trained on, and all that was.

    Arguments as of `trained_adapter`.

    Raises:
        InputError: the model is not there, or is another one.
    """
    pairs, whole = _trained(checkpoint, ema)
    base = base_weights(checkpoint)
    dtype = base["patch_embedding.weight"].dtype
    return merge(base | {name: tensor.to(dtype) for name, tensor in whole.items()}, pairs)


def base_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Return the weights that adapters were trained on, under diffusers' names.

    Raises:
        InputError: they are not there, or others are.
    """
    facts = _facts(checkpoint)
    path = Path(facts["_base_path"])
    if not path.exists():
        raise InputError(
            f"{checkpoint} holds adapters of {path}, which is not there: start this where the training was started"
        )
    if base_fingerprint(path) != facts["base_weights"]:
        raise InputError(f"{path} is no longer the model that {checkpoint} was trained on: put that one there")
    weights = read_state_dict(path)
    names = translate(weights, detect_layout(weights), "diffusers")
    return {names.get(key, key): tensor for key, tensor in weights.items()}


def base_fingerprint(path: str | Path) -> str:
    """Return by what the weights that adapters are trained on are known again.

    Args:
        path: what `read_state_dict` takes.
    """
    weights = checkpoint_directory(Path(path))
    return fingerprint(weights / "transformer" if (weights / "transformer").is_dir() else weights)


def _trained(checkpoint: Path, ema: bool) -> tuple[Adapter, dict[str, Tensor]]:
    """Return pairs with their alphas, and what was trained whole."""
    facts, trained = _facts(checkpoint), read_state_dict(checkpoint, ema=ema)
    whole = {name: tensor for name, tensor in trained.items() if ".lora_" not in name}
    pairs = {name: tensor for name, tensor in trained.items() if name not in whole}
    for layer in {name.rpartition(".lora_")[0] for name in pairs}:
        pairs[f"{layer}.alpha"] = torch.tensor(float(facts["lora_alpha_pattern"].get(f"^{layer}", facts["lora_alpha"])))
    return pairs, whole


def _facts(checkpoint: Path) -> Mapping[str, Any]:
    facts: Any = read_json(checkpoint / "config.json")[ADAPTERS]
    if not isinstance(facts, dict) or not {"_base_path", "base_weights", "lora_alpha"} <= facts.keys():
        raise InputError(f"{checkpoint / 'config.json'} is damaged: it does not say what adapters these are")
    return facts
