"""Models of published sizes, and a tiny whole pipeline, with random weights in diffusers' layout."""

import json
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKLWan
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

from flashi2v_model.config import DiffusionConfig
from flashi2v_model.scheduler import euler_scheduler
from flashi2v_model.transformer import FlashI2VTransformer3DModel

# Constructor arguments of the transformer; what is not named is as in the 1.3B model.
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "tiny": {
        "num_attention_heads": 4,
        "attention_head_dim": 32,
        "text_dim": 64,
        "freq_dim": 64,
        "ffn_dim": 512,
        "num_layers": 4,
    },
    "1.3b": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    "14b": {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
}


def save(name: str, directory: Path) -> None:
    """Write the transformer and scheduler of a preset; for "tiny" a whole pipeline.

    Random weights come from torch's global generator.
    """
    parts: dict[str, tuple[str, str]] = {
        "transformer": ("flashi2v_model.transformer", "FlashI2VTransformer3DModel"),
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    }
    FlashI2VTransformer3DModel(**TRANSFORMERS[name]).save_pretrained(directory / "transformer")
    euler_scheduler(DiffusionConfig(model_id="flow_matching").shift).save_pretrained(directory / "scheduler")
    if name == "tiny":
        parts |= {
            "vae": ("diffusers", "AutoencoderKLWan"),
            "text_encoder": ("transformers", "UMT5EncoderModel"),
            "tokenizer": ("transformers", "ByT5Tokenizer"),
        }
        AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1).save_pretrained(
            directory / "vae"
        )
        # A tokenizer of bytes needs no vocabulary file and reads every language.
        tokenizer = ByT5Tokenizer(extra_ids=0)
        tokenizer.save_pretrained(directory / "tokenizer")
        config = UMT5Config(
            vocab_size=len(tokenizer),
            d_model=TRANSFORMERS[name]["text_dim"],
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
        )
        UMT5EncoderModel(config).save_pretrained(directory / "text_encoder")
    index = {"_class_name": "FlashI2VPipeline", **parts}
    (directory / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
