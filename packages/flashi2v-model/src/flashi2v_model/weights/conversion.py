"""Weights in every published layout: converted, or loaded into a model, exactly or not at all."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashi2v_model.errors import InputError
from flashi2v_model.strict import constructor_defaults
from flashi2v_model.transformer import FlashI2VTransformer3DModel
from flashi2v_model.weights.checkpoint import (
    checkpoint_directory,
    is_checkpoint,
    load_stored,
    stored_weights,
    weight_name,
)
from flashi2v_model.weights.comparing import compare, fault_phrases
from flashi2v_model.weights.key_names import NEW_LAYERS, check_layout, detect_layout, is_trunk, translate
from flashi2v_model.weights.reading import read_state_dict
from flashi2v_model.weights.settings import DEFAULTS, contradictions, stored_settings


def convert_state_dict(
    state_dict: Mapping[str, Tensor], source: str | None = None, target: str = "diffusers"
) -> dict[str, Tensor]:
    """Rename a transformer's weights from one published layout to another; tensors are passed on as they are.

    Args:
        state_dict: all weights of a transformer, or of a text-to-video trunk, under the names of `source`.
        source: one of `LAYOUTS`; None detects it.
        target: one of `LAYOUTS`. `wan` has no place for FlashI2V's new layers.

    Raises:
        InputError: a layout is unknown or cannot hold the weights, or they are not those of one transformer; every
            missing, unexpected and misshapen key is listed.
    """
    source = source or detect_layout(state_dict)
    check_layout(source)
    check_layout(target)
    trunk = is_trunk(state_dict)
    if target == "wan" and not trunk:
        raise InputError(
            "the wan layout has no place for FlashI2V's new layers (fourier_embedding, learnable_proj): "
            "convert to 'main', which is wan plus new layers"
        )
    ours = translate(state_dict, source, "diffusers")
    # Heads change no shape, so one of them does for the comparison.
    try:
        arguments = architecture({name: state_dict[key] for key, name in ours.items()}, num_attention_heads=1)
    except InputError as error:
        unknown = fault_phrases(unexpected=[key for key in state_dict if key not in ours])
        raise InputError("; ".join([str(error), *unknown])) from None
    own = _meta_model(arguments).state_dict()
    expected = {name: own[key] for key, name in translate(own, "diffusers", source).items()}
    may_miss = {name for name in expected if trunk and name.startswith(NEW_LAYERS)}
    if faults := compare(state_dict, expected, may_miss):
        raise InputError(f"these are not the weights of one transformer in the {source} layout: {'; '.join(faults)}")
    names = translate(state_dict, source, target)
    return {names[key]: tensor for key, tensor in state_dict.items()}


def _meta_model(
    arguments: Mapping[str, Any], transformer: type[FlashI2VTransformer3DModel] = FlashI2VTransformer3DModel
) -> FlashI2VTransformer3DModel:
    try:
        with torch.device("meta"):
            return transformer(**arguments)
    except ValueError as error:
        raise InputError(f"there is no transformer of these sizes: {error}") from error


def architecture(state_dict: Mapping[str, Tensor], num_attention_heads: int | None = None) -> dict[str, Any]:
    """Read the constructor arguments of the transformer off its weights (diffusers names).

    Args:
        state_dict: weights under diffusers names.
        num_attention_heads: the one number that shapes do not tell; None means heads of 128, as in every release.

    Raises:
        InputError: a key that tells a size is missing, or the number of heads cannot be told.
    """
    # Number of dimensions of what tells a size.
    telling = {
        "patch_embedding.weight": 5,
        "blocks.0.ffn.net.0.proj.weight": 2,
        "condition_embedder.time_embedder.linear_1.weight": 2,
        "condition_embedder.text_embedder.linear_1.weight": 2,
        "proj_out.weight": 2,
    }
    if missing := [key for key in telling if key not in state_dict]:
        raise InputError(f"the weights lack {', '.join(missing)}, which tells a size of the model")
    projection = state_dict.get("learnable_proj.proj.0.weight")
    telling |= {} if projection is None else {"learnable_proj.proj.0.weight": 5}
    if odd := [key for key, dims in telling.items() if state_dict[key].ndim != dims]:
        told = ", ".join(f"{key} of shape {tuple(state_dict[key].shape)}" for key in odd)
        raise InputError(f"the sizes of the model cannot be read off {told}")
    patch, ffn, time_in, text_in, out = (state_dict[key] for key in list(telling)[:5])
    dim, patch_size = patch.shape[0], tuple(patch.shape[2:])
    if num_attention_heads is None and dim % 128:
        raise InputError(f"width {dim} is no multiple of 128, so heads cannot be told: give --num-heads")
    heads = dim // 128 if num_attention_heads is None else num_attention_heads
    if heads < 1 or dim % heads:
        raise InputError(f"width {dim} is not divisible by {heads} heads")
    return {
        "patch_size": patch_size,
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "in_channels": patch.shape[1],
        "out_channels": out.shape[0] // (patch_size[0] * patch_size[1] * patch_size[2]),
        "text_dim": text_in.shape[1],
        "freq_dim": time_in.shape[1],
        "ffn_dim": ffn.shape[0],
        # A stray number is an unexpected key, not a reason to build a model of a million blocks.
        "num_layers": min(
            1 + max(int(key.split(".")[1]) for key in state_dict if key.startswith("blocks.")), len(state_dict)
        ),
        "cross_attn_norm": any(key.endswith(".norm2.weight") for key in state_dict),
        "qk_norm": "rms_norm_across_heads" if any(key.endswith(".norm_q.weight") for key in state_dict) else None,
        "conv3x3x3_proj": projection is None or projection.shape[2] == 3,
    }


def model_arguments(
    path: str | Path, state_dict: Mapping[str, Tensor], num_attention_heads: int | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Return all constructor arguments of the transformer at `path`, and which of them nothing there tells.

    What stands nowhere is as in the releases: heads of 128 channels, and the constructor's defaults.

    Args:
        path: where the weights were read.
        state_dict: those weights, under diffusers names.
        num_attention_heads: for weights without settings whose heads are not of 128.

    Raises:
        InputError: as `architecture`; or settings beside the weights contradict them or `num_attention_heads`.
    """
    where, stored = stored_settings(path)
    heads = stored.get("num_attention_heads", num_attention_heads)
    if num_attention_heads not in (None, heads):
        raise InputError(f"--num-heads is {num_attention_heads}, but {where} says {heads}")
    shown = architecture(state_dict, heads)
    if is_trunk(state_dict):
        del shown["conv3x3x3_proj"]
    if faults := contradictions(where, {key: stored[key] for key in shown if key in stored}, shown, "the weights have"):
        raise InputError(f"{path} does not fit its own settings: {'; '.join(faults)}")
    told = stored | shown
    assumed = [key for key in DEFAULTS if key not in told]
    if heads is None:
        assumed = ["num_attention_heads", "attention_head_dim", *assumed]
    return {key: told.get(key, default) for key, default in DEFAULTS.items()}, assumed


def variant_arguments(path: str | Path, transformer: type[FlashI2VTransformer3DModel]) -> dict[str, Any]:
    """Return the constructor arguments of a variant at `path`: all that its config.json says.

    Raises:
        InputError: there is none, or it is of another variant.
    """
    _, stored = stored_settings(path, transformer)
    if not stored:
        raise InputError(f"{path}: no config.json beside the weights tells the sizes of a {transformer.__name__}")
    return constructor_defaults(transformer) | stored


def check_variant_layout(state_dict: Mapping[str, Tensor], target: str, transformer: type[Any]) -> None:
    """Refuse to write a variant in another layout than diffusers', or to take it from one.

    Raises:
        InputError: naming the parameters that such a layout has no place for.
    """
    layout = detect_layout(state_dict)
    if layout == target == "diffusers":
        return
    added = [key for key in state_dict if key not in translate(state_dict, layout, layout)]
    what = f"has no place for {', '.join(added[:8])} of" if added else "cannot say that the weights are those of"
    other = target if layout == "diffusers" else layout
    raise InputError(f"the {other} layout {what} a {transformer.__name__}: variants live in the diffusers layout alone")


def load_weights(
    model: FlashI2VTransformer3DModel, path: str | Path, *, new_layers_may_start: bool = False, ema: bool = True
) -> list[str]:
    """Load weights of any layout into a model, exactly or not at all. Those of a variant are in diffusers' layout.

    Beside the model no second copy of the weights is allocated (legacy `.pt` files excepted). Nor is a model on the
    meta device: its parameters become the file's own tensors, memory-mapped on the CPU, and are copied only where their
    dtype differs.

    Args:
        model: on any device; its dtypes stay.
        path: what `read_state_dict` reads.
        new_layers_may_start: accept weights without the layers that FlashI2V adds to a text-to-video trunk, or a
            variant to FlashI2V; these then keep their start values.
        ema: of a checkpoint, the moving average where it has one, instead of the raw weights.

    Returns:
        the keys that kept their start values.

    Raises:
        InputError: listing every missing, unexpected and misshapen key, and every setting of a config.json beside the
            weights that is not the model's.
        ValueError: new layers are to keep start values that a model on the meta device does not have.
    """
    path = checkpoint_directory(Path(path))
    weights = read_state_dict(path, ema=ema, device="meta" if is_checkpoint(path) else "cpu")
    own = model.state_dict()
    layout = detect_layout(weights)
    names = translate(own, "diffusers", layout)  # ours to theirs
    added = [key for key in own if key not in names]  # by a variant
    names |= {key: key for key in added}
    kept = []
    if new_layers_may_start:
        kept += [key for key in own if key.startswith(NEW_LAYERS)] if is_trunk(weights) else []
        kept += added if not weights.keys() & set(added) else []
    faults = compare(weights, {names[key]: tensor for key, tensor in own.items()}, {names[key] for key in kept})
    faults += contradictions(*stored_settings(path, type(model)), model.config)
    if faults:
        hint = ""
        if is_trunk(weights) and not is_trunk(own) and not kept:
            hint = " (these are weights of a text-to-video trunk, which training can start from but nothing can sample)"
        raise InputError(f"{path} does not fit the transformer{hint}: {'; '.join(faults)}")
    if any(own[key].is_meta for key in kept):
        raise ValueError("a text-to-video trunk needs a model with start values: build it on a device, not on meta")
    targets = {name: key for key, name in names.items() if key not in kept}
    if is_checkpoint(path):
        _fill_from_checkpoint(model, own, path, targets, ema)
    else:
        _fill(model, own, weights, targets)
    return kept


def _fill(
    model: FlashI2VTransformer3DModel, own: dict[str, Tensor], weights: dict[str, Tensor], targets: Mapping[str, str]
) -> None:
    """Copy weights into parameters, letting go of each, so that a shard that has been copied is unmapped."""
    assigned = {}
    for name in list(weights):
        tensor, target = weights.pop(name), own[targets[name]]
        if target.is_meta:
            assigned[targets[name]] = tensor.to(target.dtype)
        else:
            target.copy_(tensor)
    model.load_state_dict(assigned, assign=True, strict=False)


def _fill_from_checkpoint(
    model: FlashI2VTransformer3DModel, own: dict[str, Tensor], path: Path, targets: Mapping[str, str], ema: bool
) -> None:
    keys = {targets[weight_name(key)]: key for key in stored_weights(path, ema=ema)}
    filled = {name: torch.empty_like(own[name], device="cpu") if own[name].is_meta else own[name] for name in keys}
    load_stored(path, {key: filled[name] for name, key in keys.items()})
    model.load_state_dict({name: filled[name] for name in keys if own[name].is_meta}, assign=True, strict=False)


def as_model(
    state_dict: Mapping[str, Tensor],
    arguments: Mapping[str, Any],
    transformer: type[FlashI2VTransformer3DModel] = FlashI2VTransformer3DModel,
) -> FlashI2VTransformer3DModel:
    """Wrap weights (diffusers names) in a model that shares their memory.

    Raises:
        InputError: they are not those of the whole transformer that the arguments describe.
    """
    model = _meta_model(arguments, transformer)
    if is_trunk(state_dict) and not is_trunk(model.state_dict()):
        raise InputError(
            "these are weights of a text-to-video trunk, without FlashI2V's new layers, so they make no model: "
            "train from them (predictor.from_pretrained takes them as they are; the new layers start at zero)"
        )
    if faults := compare(state_dict, model.state_dict()):
        raise InputError(f"the weights do not fit the transformer: {'; '.join(faults)}")
    model.load_state_dict(dict(state_dict), assign=True)
    return model
