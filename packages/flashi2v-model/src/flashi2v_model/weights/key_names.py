"""The names of weights in every published layout.

`wan` are the names of the original Wan2.1 files, `main` the same plus FlashI2V's new layers (the FSDP2 release), `npu`
the names of the released `flashi2v_1_3B.pt`, and `diffusers` ours.
"""

import re
from collections.abc import Iterable

from flashi2v_model.errors import InputError

LAYOUTS = ("diffusers", "wan", "npu", "main")
"""Published layouts of weights."""
NEW_LAYERS = ("fourier_embedding.", "learnable_proj.")
"""What begins the keys of FlashI2V's own layers, in every layout."""

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
# What else people have files of, by a part of its names.
_ADAPTER = re.compile(r"\.(lora_|lora\.|lokr_|loha_|hada_|alpha$)")
_OTHERS = (
    ("decoder.middle.", "a VAE (Wan2.1's own layout)"),
    ("decoder.mid_block.", "a VAE (diffusers' layout)"),
    (".SelfAttention.", "a T5 text encoder (transformers' layout)"),
    ("token_embedding.weight", "a text encoder (Wan2.1's own layout)"),
)
_COLUMN = {"wan": 0, "main": 0, "diffusers": 1, "npu": 2}
_NAME = re.compile(r"(?P<block>blocks\.\d+\.)?(?P<module>.*?)(?P<parameter>\.weight|\.bias)?")


def detect_layout(names: Iterable[str]) -> str:
    """Tell the layout of weights from their names.

    Raises:
        InputError: no known layout has such names.
    """
    names = list(names)
    if 2 * sum(_ADAPTER.search(name) is not None for name in names) > len(names):
        raise InputError(
            f"these are the weights of a LoRA adapter, which changes a model but is not one (first key: {names[0]}): "
            "name the whole model"
        )
    if any(name.startswith("condition_embedder.") for name in names):
        return "diffusers"
    if any(".proj_q." in name for name in names):
        return "npu"
    if any(".self_attn.q." in name for name in names):
        return "wan" if is_trunk(names) else "main"
    if what := next((what for mark, what in _OTHERS if any(mark in name for name in names)), None):
        raise InputError(f"these are the weights of {what}, not of a transformer (first keys: {', '.join(names[:3])})")
    raise InputError(
        f"these are not weights of a Wan2.1 or FlashI2V transformer (first keys: {', '.join(names[:3])}): "
        f"known layouts are {', '.join(LAYOUTS)}"
    )


def check_layout(layout: str) -> None:
    """Refuse an unknown layout.

    Raises:
        InputError: naming those there are.
    """
    if layout not in LAYOUTS:
        raise InputError(f"unknown layout {layout!r}: choose one of {', '.join(LAYOUTS)}")


def is_trunk(names: Iterable[str]) -> bool:
    """Tell whether weights are a text-to-video trunk, without any of FlashI2V's new layers."""
    return not any(name.startswith(NEW_LAYERS) for name in names)


def modules(layout: str) -> list[str]:
    """Return the names of a layout's modules and bare parameters; "#" is the number of a block."""
    return [row[_COLUMN[layout]] for row in _NAMES]


def translate(names: Iterable[str], source: str, target: str) -> dict[str, str]:
    """Map the names of one layout to those of another; names that `source` does not know are left out."""
    modules = {row[_COLUMN[source]]: row[_COLUMN[target]] for row in _NAMES}
    translated = {}
    for name in names:
        block, module, parameter = _NAME.fullmatch(name).groups(default="")  # type: ignore[union-attr]  # matches anything
        if (known := modules.get(f"blocks.#.{module}" if block else module)) is not None:
            translated[name] = known.replace("blocks.#.", block) + parameter
    return translated
