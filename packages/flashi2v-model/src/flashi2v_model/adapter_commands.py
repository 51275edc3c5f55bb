"""What `flashi2v-model` does with LoRA adapters: says what a file is, and writes it in another spelling."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from flashi2v_model.adapter_choice import AdapterChoice
from flashi2v_model.errors import InputError, named
from flashi2v_model.weights.adapter_files import NAMES, PEFT_CONFIG, adapter_file, open_adapter, read_adapter_file
from flashi2v_model.weights.adapter_spellings import (
    ALPHA_DTYPE,
    CONFIG,
    SPELLINGS,
    is_adapter,
    read_adapter,
    spell,
    spelling_of,
)
from flashi2v_model.weights.adapters import by_layer, merge, scale_of
from flashi2v_model.weights.comparing import fault_phrases
from flashi2v_model.weights.reading import read_tensors
from flashi2v_model.weights.writing import independent

_OWN = ("format", CONFIG, ALPHA_DTYPE)  # entries of a header that this package writes


def find_adapter(path: Path) -> Path | None:
    """Return the file, or checkpoint, of the adapter at a path; None where there is something else, or nothing.

    Raises:
        InputError: the file is damaged.
    """
    if path.is_dir():
        try:
            path = adapter_file(path)
        except InputError:
            return None
        if path.is_dir():
            return path
    if not path.is_file():
        return None
    return path if is_adapter(read_tensors(path, device="meta")) else None


def describe(path: Path) -> dict[str, str]:
    """Return what is to be said of an adapter, by what it is about.

    Raises:
        InputError: it is damaged, or of another network.
    """
    state_dict, header = read_adapter_file(path)
    name, spelling = spelling_of(state_dict)
    adapter = read_adapter(state_dict, header)
    layers = by_layer(adapter)
    pairs = {layer: parts for layer, parts in layers.items() if "lora_A.weight" in parts}
    ranks = Counter(parts["lora_A.weight"].shape[0] for parts in pairs.values())
    alphas = Counter(_alpha(parts) for parts in pairs.values())
    queries = (parts["lora_A.weight"] for layer, parts in pairs.items() if layer.endswith((".to_q", ".to_k", ".to_v")))
    widths = {down.shape[1] for down in queries}
    differences = {f"{layer} ({part[10:]})" for layer, parts in layers.items() for part in parts if "lora_diff" in part}
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state_dict.values()})
    numbers = sum(tensor.numel() for tensor in state_dict.values())
    facts = {
        "kind": f"LoRA adapter of {len(layers)} layers",
        "spelling": f"{name} ({spelling})",
        "rank": _counted(ranks),
        "alpha": _counted(alphas),
        "width": ", ".join(map(str, sorted(widths))) or "not told by its layers",
        "parameters": f"{numbers:,} in {', '.join(dtypes)}",
        "size": f"{sum(tensor.nbytes for tensor in state_dict.values()) / 1e6:,.3f} MB",
        "pairs": _named(pairs),
        "differences": _named(differences),
        # Of training, as kohya's programs write it; what an adapter does, its tensors say.
        "header": ", ".join(f"{key} {value:.20}" for key, value in sorted(header.items()) if key not in _OWN)[:400],
    }
    if any("lora_magnitude_vector" in parts for parts in pairs.values()):
        facts["kind"] = f"DoRA adapter of {len(layers)} layers"
    return {key: fact for key, fact in facts.items() if fact}


def _alpha(parts: Mapping[str, Tensor]) -> str:
    return f"{parts['alpha'].item():g} (weight {scale_of(parts):g})" if "alpha" in parts else "none (weight 1)"


def _counted(values: Counter[int] | Counter[str]) -> str:
    alone = len(values) == 1
    return ", ".join(f"{value}" if alone else f"{value} in {count} layers" for value, count in values.most_common())


def _named(layers: Mapping[str, object] | set[str]) -> str:
    return ", ".join(phrase.removeprefix("missing ") for phrase in fault_phrases(missing=sorted(layers)))


def write_adapter(source: Path, destination: Path, to: str, *, ema: bool = True) -> None:
    """Write an adapter in another spelling, with all else that the header of its file says.

    Args:
        source: its file, or the checkpoint of a run.
        destination: a new file; for peft a new directory.
        to: one of `SPELLINGS`.
        ema: as of `read_adapter_file`.

    Raises:
        InputError: it is no adapter of this network, or the spelling has no place for a part of it.
    """
    state_dict, header = read_adapter_file(source, ema=ema)
    spelled, config = spell(read_adapter(state_dict, header), to)
    kept = {key: value for key, value in header.items() if key not in _OWN}
    if to == "peft":
        destination.mkdir()
        (destination / PEFT_CONFIG).write_text(json.dumps(json.loads(config.pop(CONFIG)), indent=2) + "\n")
        destination = destination / NAMES[1]
    save_file(independent(spelled), destination, metadata={"format": "pt", **kept, **config})


def check_spelling(destination: Path, to: str, others: Mapping[str, object]) -> None:
    """Refuse what makes no sense for an adapter.

    Args:
        destination: of it.
        to: its spelling.
        others: options that are of models, by name.

    Raises:
        InputError: naming what can be chosen.
    """
    if to not in SPELLINGS:
        raise InputError(f"--to {to} is a layout of models: an adapter is written as {', '.join(SPELLINGS)}")
    if given := [option for option, value in others.items() if value not in (None, (), [])]:
        raise InputError(f"{', '.join(given)}: of a model, and the source is a LoRA adapter")
    if (to == "peft") == (destination.suffix == ".safetensors"):
        what = "a new directory" if to == "peft" else "a new file that ends in .safetensors"
        raise InputError(f"{destination}: {to} is written as {what}")


def merged(weights: dict[str, Tensor], choices: tuple[AdapterChoice, ...]) -> dict[str, Tensor]:
    """Return a transformer's weights, under diffusers' names, with adapters in them.

    Raises:
        InputError: naming the adapter that does not fit.
    """
    for choice in choices:
        with named(f"--lora {choice.source}"):
            layers = {key.rpartition(".")[0] for key in weights}
            weights = merge(weights, read_adapter(*open_adapter(choice.source), layers), choice.scale)
    return weights
