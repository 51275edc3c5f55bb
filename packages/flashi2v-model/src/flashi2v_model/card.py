"""The model card of a pipeline directory: what the model is, how to use it, and what is known of its training."""

from collections.abc import Mapping
from typing import Any

from flashi2v_model.config import Defaults

CARD = "README.md"

# By layers and heads: the text-to-video trunks of Wan2.1, whose licence is Apache 2.0, and so are weights made of them.
_BASES = {(30, 12): "Wan-AI/Wan2.1-T2V-1.3B", (40, 40): "Wan-AI/Wan2.1-T2V-14B"}


def model_card(name: str, config: Mapping[str, Any], defaults: Defaults, trained_on: str = "") -> str:
    """Return a model card as the hub reads it.

    Args:
        name: of the model.
        config: of its transformer.
        defaults: what it was trained for.
        trained_on: what with, in words.
    """
    base = _BASES.get((config["num_layers"], config["num_attention_heads"]))
    head = ["library_name: diffusers", "pipeline_tag: image-to-video", "tags:", "- flashi2v", "- image-to-video"]
    if base is not None:
        head += [f"base_model: {base}", "license: apache-2.0"]
    width = config["num_attention_heads"] * config["attention_head_dim"]
    known = defaults.model_dump(exclude_none=True)
    numbers = ", ".join(f"`{key}` {value:g}" for key, value in known.items()) or "those of the released FlashI2V"
    return "\n".join(
        [
            "---",
            *head,
            "---",
            "",
            f"# {name}",
            "",
            "An image-to-video model: a video starts with a given picture and follows a prompt. It is of FlashI2V's "
            "kind ([arXiv 2509.25187](https://arxiv.org/abs/2509.25187)).",
            "",
            "## How to use it",
            "",
            "    pip install flashi2v-infer",
            f'    flashi2v-infer --model {name} --image cat.jpg --prompt "A cat turns its head." -o cat.mp4',
            "",
            "```python",
            "from flashi2v_infer import FlashI2VPipeline",
            "",
            f'pipe = FlashI2VPipeline.from_pretrained("{name}")',
            'pipe(image="cat.jpg", prompt="A cat turns its head.").save("cat.mp4")',
            "```",
            "",
            f"Defaults, as in `model_index.json`: {numbers}. Other sizes than the trained one are worse.",
            "",
            "## What it is",
            "",
            f"- {config['num_layers']} blocks of width {width}, {config['num_attention_heads']} heads",
            f"- base model: {base or 'not known'}",
            f"- licence: {'apache-2.0, as the base model' if base else 'not stated: say it here before publishing'}",
            f"- trained: {trained_on or 'not recorded: say it here before publishing'}",
            "",
        ]
    )
