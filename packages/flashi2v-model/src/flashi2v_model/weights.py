"""Weights in every published layout.

`wan` are the names of the original Wan2.1 files, `main` the same plus FlashI2V's new layers (the FSDP2 release), `npu`
the names of the released `flashi2v_1_3B.pt`, and `diffusers` ours.  Nothing is loaded that does not fit exactly, and
nothing is unpickled but tensors.
"""

import inspect
import json
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flashi2v_model.checkpoint import checkpoint_directory, is_checkpoint, read_checkpoint
from flashi2v_model.errors import InputError
from flashi2v_model.transformer import FlashI2VTransformer3DModel

LAYOUTS = ("diffusers", "wan", "npu", "main")
NEW_LAYERS = ("fourier_embedding.", "learnable_proj.")

# Modules and bare parameters: Wan2.1's name, diffusers', the NPU release's.  "#" is the number of a block.
_NAMES = (
    ("patch_embedding", "patch_embedding", "patch_embedding"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1", "text_embedding.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2", "text_embedding.linear_2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("time_projection.1", "condition_embedder.time_proj", "time_projection.1"),
    ("blocks.#.modulation", "blocks.#.scale_shift_table", "blocks.#.modulation"),
    ("blocks.#.self_attn.q", "blocks.#.attn1.to_q", "blocks.#.self_attn.proj_q"),
    ("blocks.#.self_attn.k", "blocks.#.attn1.to_k", "blocks.#.self_attn.proj_k"),
    ("blocks.#.self_attn.v", "blocks.#.attn1.to_v", "blocks.#.self_attn.proj_v"),
    ("blocks.#.self_attn.o", "blocks.#.attn1.to_out.0", "blocks.#.self_attn.proj_out"),
    ("blocks.#.self_attn.norm_q", "blocks.#.attn1.norm_q", "blocks.#.self_attn.q_norm"),
    ("blocks.#.self_attn.norm_k", "blocks.#.attn1.norm_k", "blocks.#.self_attn.k_norm"),
    ("blocks.#.norm3", "blocks.#.norm2", "blocks.#.norm3"),  # affine, before cross attention
    ("blocks.#.cross_attn.q", "blocks.#.attn2.to_q", "blocks.#.cross_attn.proj_q"),
    ("blocks.#.cross_attn.k", "blocks.#.attn2.to_k", "blocks.#.cross_attn.proj_k"),
    ("blocks.#.cross_attn.v", "blocks.#.attn2.to_v", "blocks.#.cross_attn.proj_v"),
    ("blocks.#.cross_attn.o", "blocks.#.attn2.to_out.0", "blocks.#.cross_attn.proj_out"),
    ("blocks.#.cross_attn.norm_q", "blocks.#.attn2.norm_q", "blocks.#.cross_attn.q_norm"),
    ("blocks.#.cross_attn.norm_k", "blocks.#.attn2.norm_k", "blocks.#.cross_attn.k_norm"),
    ("blocks.#.ffn.0", "blocks.#.ffn.net.0.proj", "blocks.#.ffn.0"),
    ("blocks.#.ffn.2", "blocks.#.ffn.net.2", "blocks.#.ffn.2"),
    ("head.modulation", "scale_shift_table", "head.modulation"),
    ("head.head", "proj_out", "head.head"),
    ("fourier_embedding.0", "fourier_embedding.0", "fourier_embedding.0"),
    ("fourier_embedding.1", "fourier_embedding.1", "fourier_embedding.1"),
    ("learnable_proj.proj.0", "learnable_proj.proj.0", "learnable_proj.0"),
    ("learnable_proj.proj.2", "learnable_proj.proj.2", "learnable_proj.2"),
)
_COLUMN = {"wan": 0, "main": 0, "diffusers": 1, "npu": 2}
_NAME = re.compile(r"(?P<block>blocks\.\d+\.)?(?P<module>.*?)(?P<parameter>\.weight|\.bias)?")


def detect_layout(keys: Mapping[str, Any]) -> str:
    """Tell a state dict's layout from its names.

    Raises:
        InputError: no known layout has such names.
    """
    if any(key.startswith("condition_embedder.") for key in keys):
        return "diffusers"
    if any(".proj_q." in key for key in keys):
        return "npu"
    if any(".self_attn.q." in key for key in keys):
        return "main" if any(key.startswith(NEW_LAYERS) for key in keys) else "wan"
    raise InputError(
        f"these are not weights of a Wan2.1 or FlashI2V transformer (first keys: {', '.join(list(keys)[:3])}): "
        f"known layouts are {', '.join(LAYOUTS)}"
    )


def convert_state_dict(
    state_dict: Mapping[str, Tensor], source: str | None = None, target: str = "diffusers"
) -> dict[str, Tensor]:
    """Rename a transformer's weights from one published layout to another; tensors are passed on as they are.

    Args:
        state_dict: weights under the names of `source`.
        source: one of `LAYOUTS`; None detects it.
        target: one of `LAYOUTS`. `wan` has no place for FlashI2V's new layers.

    Raises:
        InputError: a layout or a name is unknown, or `target` cannot hold every tensor.
    """
    source = source or detect_layout(state_dict)
    for layout in (source, target):
        if layout not in LAYOUTS:
            raise InputError(f"unknown layout {layout!r}: choose one of {', '.join(LAYOUTS)}")
    names = {row[_COLUMN[source]]: row[_COLUMN[target]] for row in _NAMES}
    converted = {}
    for key, tensor in state_dict.items():
        block, module, parameter = _NAME.fullmatch(key).groups(default="")  # type: ignore[union-attr]  # matches anything
        name = names.get(f"blocks.#.{module}" if block else module)
        if name is None:
            raise InputError(f"{key} is no name of the {source} layout")
        if target == "wan" and name.startswith(NEW_LAYERS):
            raise InputError(f"the wan layout has no place for {key}: convert to 'main', which is wan plus new layers")
        converted[name.replace("blocks.#.", block) + parameter] = tensor
    return converted


def architecture(state_dict: Mapping[str, Tensor], num_attention_heads: int | None = None) -> dict[str, Any]:
    """Read the constructor arguments of the transformer off its weights (diffusers names).

    Args:
        state_dict: weights under diffusers names.
        num_attention_heads: the one number that shapes do not tell; None means heads of 128, as in every release.

    Raises:
        InputError: a key that tells a size is missing, or the number of heads cannot be told.
    """
    try:
        patch = state_dict["patch_embedding.weight"]
        ffn_dim = state_dict["blocks.0.ffn.net.0.proj.weight"].shape[0]
        time_in = state_dict["condition_embedder.time_embedder.linear_1.weight"]
        text_in = state_dict["condition_embedder.text_embedder.linear_1.weight"]
        out = state_dict["proj_out.weight"]
    except KeyError as error:
        raise InputError(f"the weights lack {error.args[0]}, which tells a size of the model") from error
    dim, patch_size = patch.shape[0], tuple(patch.shape[2:])
    if num_attention_heads is None and dim % 128:
        raise InputError(f"width {dim} is no multiple of 128, so heads cannot be told: give --num-heads")
    heads = num_attention_heads or dim // 128
    if dim % heads:
        raise InputError(f"width {dim} is not divisible by {heads} heads")
    projection = state_dict.get("learnable_proj.proj.0.weight")
    return {
        "patch_size": patch_size,
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "in_channels": patch.shape[1],
        "out_channels": out.shape[0] // (patch_size[0] * patch_size[1] * patch_size[2]),
        "text_dim": text_in.shape[1],
        "freq_dim": time_in.shape[1],
        "ffn_dim": ffn_dim,
        "num_layers": 1 + max(int(key.split(".")[1]) for key in state_dict if key.startswith("blocks.")),
        "cross_attn_norm": "blocks.0.norm2.weight" in state_dict,
        "qk_norm": "rms_norm_across_heads" if "blocks.0.attn1.norm_q.weight" in state_dict else None,
        "conv3x3x3_proj": projection is None or projection.shape[2] == 3,
    }


def read_state_dict(path: str | Path, *, ema: bool = True) -> dict[str, Tensor]:
    """Read a `.safetensors` file, a `torch.save` file (weights only), or a directory, onto the CPU.

    Args:
        path: a file, a diffusers directory, a checkpoint of `flashi2v-train`, or a run (its newest checkpoint).
        ema: of a checkpoint, the moving average where it has one, instead of the raw weights.

    Raises:
        InputError: the file is missing, unreadable, or holds anything but named tensors.
    """
    path = Path(path)
    if path.is_dir():
        path = checkpoint_directory(path)
        return read_checkpoint(path, ema=ema) if is_checkpoint(path) else _read_directory(path)
    if not path.is_file():
        raise InputError(f"no weights at {path}: give a .safetensors or .pt file, or a diffusers directory")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, OSError, EOFError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{path} is damaged or holds more than tensors, and is not loaded: {reason}") from error
    if isinstance(loaded, dict) and len(loaded) == 1 and isinstance(only := next(iter(loaded.values())), dict):
        loaded = only  # {"model": weights} and the like
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise InputError(f"{path} does not hold a state dict (names with tensors)")
    return loaded


def _read_directory(path: Path) -> dict[str, Tensor]:
    path = path / "transformer" if (path / "transformer").is_dir() else path
    index = path / "diffusion_pytorch_model.safetensors.index.json"
    names = (
        sorted(set(_read_json(index).get("weight_map", {}).values()))
        if index.is_file()
        else ["diffusion_pytorch_model.safetensors"]
    )
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise InputError(f"{path} holds no weights: {', '.join(missing)} is not there")
    state_dict: dict[str, Tensor] = {}
    for name in names:
        state_dict.update(read_state_dict(path / name))
    return state_dict


def load_weights(
    model: FlashI2VTransformer3DModel, path: str | Path, *, new_layers_may_start: bool = False
) -> list[str]:
    """Load weights of any layout into a model, exactly or not at all.

    Args:
        model: on any device; its dtypes stay.
        path: what `read_state_dict` reads.
        new_layers_may_start: accept a text-to-video trunk; the new layers then keep their start values.

    Returns:
        the keys that kept their start values.

    Raises:
        InputError: listing every missing, unexpected and misshapen key.
    """
    state_dict = convert_state_dict(read_state_dict(path))
    is_trunk = not any(key.startswith(NEW_LAYERS) for key in state_dict)
    kept = (
        [key for key in model.state_dict() if key.startswith(NEW_LAYERS)] if new_layers_may_start and is_trunk else []
    )
    _check_fit(str(path), state_dict, model, ignore=kept)
    model.load_state_dict(state_dict, strict=False)
    return kept


def _check_fit(
    source: str, state_dict: Mapping[str, Tensor], model: FlashI2VTransformer3DModel, ignore: Sequence[str] = ()
) -> None:
    own = model.state_dict()
    problems = [f"missing {key}" for key in own if key not in state_dict and key not in ignore]
    problems += [f"unexpected {key}" for key in state_dict if key not in own]
    problems += [
        f"{key} is {tuple(tensor.shape)}, the model has {tuple(own[key].shape)}"
        for key, tensor in state_dict.items()
        if key in own and own[key].shape != tensor.shape
    ]
    if problems:
        raise InputError(f"{source} does not fit the transformer: {'; '.join(problems)}")


def sizes_of(path: str | Path, state_dict: Mapping[str, Tensor], num_attention_heads: int | None) -> dict[str, Any]:
    """Return the constructor arguments of the transformer at `path`: from its config.json, else off its shapes.

    Raises:
        InputError: as `architecture`.
    """
    directories = (checkpoint_directory(Path(path)), Path(path) / "transformer")
    config = next((d / "config.json" for d in directories if (d / "config.json").is_file()), None)
    if config is None:
        return architecture(state_dict, num_attention_heads)
    values = {key: value for key, value in _read_json(config).items() if not key.startswith("_")}
    known = inspect.signature(FlashI2VTransformer3DModel.__init__).parameters
    # Wan2.1's own configs name parts of its image-to-video model, unset.
    foreign = [key for key, value in values.items() if key not in known and value is not None]
    if foreign:
        raise InputError(f"{config}: a FlashI2V transformer has no {', '.join(foreign)}")
    return {key: value for key, value in values.items() if key in known}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged: {error}") from error


def as_model(state_dict: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> FlashI2VTransformer3DModel:
    """Wrap weights (diffusers names) in a model that shares their memory.

    Raises:
        InputError: they are not those of the whole transformer that the arguments describe.
    """
    with torch.device("meta"):
        model = FlashI2VTransformer3DModel(**arguments)
    _check_fit("the file", state_dict, model)
    model.load_state_dict(dict(state_dict), assign=True)
    return model
