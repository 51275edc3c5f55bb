"""What a transformer's weights cannot tell of it: the config.json beside them, or the header of the file.

Settings go by the names of `FlashI2VTransformer3DModel`'s constructor.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from flashi2v_model.errors import InputError
from flashi2v_model.strict import check_class, constructor_defaults, known_names
from flashi2v_model.transformer import FlashI2VTransformer3DModel
from flashi2v_model.weights.checkpoint import checkpoint_directory
from flashi2v_model.weights.reading import check_header, read_json

HEADER = "flashi2v_config"  # key of a safetensors header
DEFAULTS = constructor_defaults(FlashI2VTransformer3DModel)
# The configuration files' names, where they differ.
_PREDICTOR = {
    "num_attention_heads": "num_heads",
    "attention_head_dim": "hidden_size",
    "in_channels": "in_dim",
    "out_channels": "out_dim",
    "rope_max_seq_len": "max_seq_len",
}
# The config.json of the original Wan2.1.
_WAN = {
    "num_heads": "num_attention_heads",
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    **{key: key for key in ("patch_size", "text_dim", "freq_dim", "ffn_dim", "num_layers", "eps", "text_len")},
}


def stored_settings(
    path: str | Path, transformer: type[FlashI2VTransformer3DModel] = FlashI2VTransformer3DModel
) -> tuple[str, dict[str, Any]]:
    """Return where the settings of the weights at `path` are written, and those written there (none is possible).

    Args:
        path: what `read_state_dict` takes.
        transformer: class that the weights are for.

    Raises:
        InputError: the file is damaged, or describes another kind of model, or another variant.
    """
    path = checkpoint_directory(Path(path))
    directories = (path.parent,) if path.is_file() else (path, path / "transformer")
    for file in (directory / "config.json" for directory in directories):
        if file.is_file() and (settings := _from_config(file, transformer)):
            return str(file), settings
    if path.is_file() and (settings := _from_header(path)):
        return f"the header of {path}", settings
    return "", {}


def _from_config(file: Path, transformer: type[FlashI2VTransformer3DModel]) -> dict[str, Any]:
    values = read_json(file)
    kind = values.get("_class_name")
    if "conv3x3x3_proj" in values:
        check_class(str(file), kind, transformer)
    if kind == "WanModel":
        settings = _checked(file, {ours: values[wan] for wan, ours in _WAN.items() if wan in values})
        if "dim" in values and "num_attention_heads" in settings:
            if type(values["dim"]) is not int:
                raise InputError(f"{file}: dim must be like 1536, got {values['dim']!r}")
            settings["attention_head_dim"] = values["dim"] // settings["num_attention_heads"]
        return settings
    if kind not in (None, *known_names(transformer)) or "num_attention_heads" not in values:
        return {}  # a run's, say, or another library's
    values = {key: value for key, value in values.items() if not key.startswith("_")}
    # Wan2.1's own configs name parts of its image-to-video model, unset.
    defaults = constructor_defaults(transformer)
    foreign = [key for key, value in values.items() if key not in defaults and value is not None]
    if foreign:
        raise InputError(f"{file}: a FlashI2V transformer has no {', '.join(foreign)}")
    return _checked(file, {key: value for key, value in values.items() if key in defaults})


def _from_header(file: Path) -> dict[str, Any]:
    if file.suffix != ".safetensors":
        return {}
    check_header(file)
    try:
        with safe_open(file, framework="numpy") as opened:
            written = json.loads((opened.metadata() or {}).get(HEADER, "{}"))
        return _checked(file, {key: written[key] for key in DEFAULTS if key in written})
    except InputError:
        raise
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{file} is damaged: its header cannot be read: {error}") from error


def _checked(file: Path, settings: dict[str, Any]) -> dict[str, Any]:
    settings = _in_form(settings)
    for key, value in settings.items():
        if key not in DEFAULTS:  # of a variant
            continue
        default = DEFAULTS[key]
        fits = type(value) is type(default) or (type(value), type(default)) == (int, float)
        if not fits and not (key == "qk_norm" and value is None):
            raise InputError(f"{file}: {key} must be like {default!r}, got {value!r}")
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not 0 < value < math.inf:
            raise InputError(f"{file}: {key} must be above 0, got {value!r}")
    return settings


def _in_form(settings: dict[str, Any]) -> dict[str, Any]:
    """JSON has no tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}


def contradictions(
    where: str, stored: Mapping[str, Any], own: Mapping[str, Any], whose: str = "the model has"
) -> list[str]:
    """Return, as phrases, the settings that weights were made with and a model does not have.

    Args:
        where: the place that `stored` was read from.
        stored: settings of the weights; a key that it lacks contradicts nothing.
        own: those of the model.
        whose: what has `own`.
    """
    own = _in_form({key: own.get(key) for key in stored})
    return [
        f"{key} is {value!r} in {where}, {whose} {own[key]!r} (predictor.{_PREDICTOR.get(key, key)})"
        for key, value in stored.items()
        if value != own[key] and key != "rope_max_seq_len"  # a limit, which changes no number
    ]


def unusual(arguments: Mapping[str, Any]) -> list[str]:
    """Return, in a configuration file's words, what neither shapes nor defaults tell of a model."""
    unseen = ("eps", "rope_max_seq_len", "low_freq_proj", "fft_return_abs", "text_len")
    keys = [key for key in unseen if arguments[key] != DEFAULTS[key]]
    if arguments["attention_head_dim"] != DEFAULTS["attention_head_dim"]:
        keys = ["num_attention_heads", *keys]
    return [f"predictor.{_PREDICTOR.get(key, key)} to {json.dumps(arguments[key])}" for key in keys]
