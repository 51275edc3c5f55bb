"""Models of published sizes, and a tiny whole pipeline, with random weights in diffusers' layout."""

import json
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKLWan
from transformers import AutoTokenizer, ByT5Tokenizer, UMT5Config, UMT5EncoderModel

from flashi2v_model.card import CARD, model_card
from flashi2v_model.config import Defaults, DiffusionConfig
from flashi2v_model.encoders import text_encoder_class
from flashi2v_model.errors import InputError
from flashi2v_model.scheduler import euler_scheduler
from flashi2v_model.transformer import FlashI2VTransformer3DModel
from flashi2v_model.weights.writing import copy_directory

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


_COMPONENTS = {
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "transformer": ("flashi2v_model.transformer", "FlashI2VTransformer3DModel"),
    "vae": ("diffusers", "AutoencoderKLWan"),
}
# What transformers 5 calls a tokenizer without a class of its own, and the name that 4 and 5 both know.
_TOKENIZERS_NAMES = ("TokenizersBackend", "PreTrainedTokenizerFast")


def init(name: str, directory: Path) -> None:
    """Write the transformer and scheduler of a preset; for "tiny" a whole pipeline.

    Random weights come from torch's global generator.
    """
    _save_sampler(FlashI2VTransformer3DModel(**TRANSFORMERS[name]), directory)
    if name == "tiny":
        _save_tiny_encoders(directory, text_dim=TRANSFORMERS[name]["text_dim"])
        _write_index(directory)


def save_pipeline(
    transformer: FlashI2VTransformer3DModel,
    directory: Path,
    encoders: Path,
    *,
    max_shard_size: str = "10GB",
    shift: float | None = None,
    defaults: Defaults | None = None,
    trained_on: str = "",
) -> None:
    """Write a transformer as a whole pipeline, with copies of the encoders' directories, and its model card.

    Args:
        transformer: the velocity network.
        directory: where to.
        encoders: holds `vae`, `text_encoder` and `tokenizer`.
        max_shard_size: of a file of the transformer.
        shift: of the scheduler's noise levels; None: that of the released model.
        defaults: what it was trained for.
        trained_on: a sentence of the model card.

    Raises:
        InputError: `encoders` lacks one of them, or a file of one.
    """
    parts = ("vae", "text_encoder", "tokenizer")
    missing = [part for part in parts if not (encoders / part).is_dir()]
    if missing:
        raise InputError(f"--encoders {encoders}: holds no directory {' or '.join(missing)}")
    for part in ("vae", "text_encoder"):
        names = {file.name for file in (encoders / part).iterdir()}
        if "config.json" not in names or not any(Path(name).suffix in (".safetensors", ".bin") for name in names):
            raise InputError(f"--encoders {encoders}: {part} lacks its config.json or its weights")
    try:
        _tokenizer_class(encoders)
    except Exception as error:  # whatever the library raises on what it cannot read
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"--encoders {encoders}: tokenizer cannot be loaded: {reason}") from error
    _save_sampler(transformer, directory, max_shard_size, shift)
    for part in parts:
        copy_directory(encoders / part, directory / part)
    config = directory / "tokenizer" / "tokenizer_config.json"
    if config.exists():
        config.write_text(config.read_text().replace(*_TOKENIZERS_NAMES))
    _write_index(directory, defaults)
    card = model_card(directory.name, transformer.config, defaults or Defaults(), trained_on)
    (directory / CARD).write_text(card, encoding="utf-8")


def _save_sampler(
    transformer: FlashI2VTransformer3DModel, directory: Path, max_shard_size: str = "10GB", shift: float | None = None
) -> None:
    transformer.save_pretrained(directory / "transformer", max_shard_size=max_shard_size)
    if shift is None:
        shift = DiffusionConfig(model_id="flow_matching").shift
    euler_scheduler(shift).save_pretrained(directory / "scheduler")


def _write_index(directory: Path, defaults: Defaults | None = None) -> None:
    index: dict[str, Any] = {
        "_class_name": "FlashI2VPipeline",
        **_COMPONENTS,
        "text_encoder": ("transformers", text_encoder_class(directory / "text_encoder").__name__),
        "tokenizer": ("transformers", _tokenizer_class(directory)),
    }
    if defaults is not None and (known := defaults.model_dump(exclude_none=True)):
        index["defaults"] = known
    (directory / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def _tokenizer_class(directory: Path) -> str:
    """diffusers wants the tokenizer's own class, which AutoTokenizer reads off the files."""
    return type(AutoTokenizer.from_pretrained(directory / "tokenizer")).__name__.replace(*_TOKENIZERS_NAMES)


def _save_tiny_encoders(directory: Path, text_dim: int) -> None:
    vae = AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
    vae.save_pretrained(directory / "vae")
    # A tokenizer of bytes needs no vocabulary file and reads every language.
    tokenizer = ByT5Tokenizer(extra_ids=0)
    tokenizer.save_pretrained(directory / "tokenizer")
    config = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=text_dim,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    UMT5EncoderModel(config).save_pretrained(directory / "text_encoder")
