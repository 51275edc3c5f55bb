"""Building the pipeline from a configuration file or from a directory in diffusers' layout."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer

from flashi2v_data.errors import InputError
from flashi2v_infer.config import InferenceConfig
from flashi2v_infer.pipeline import FlashI2VPipeline
from flashi2v_model import FlashI2VTransformer3DModel, load_weights
from flashi2v_model.config import PredictorConfig
from flashi2v_model.encoders import DTYPES, load_text_encoder, load_vae
from flashi2v_model.scheduler import euler_scheduler
from flashi2v_npu_ops import UnsupportedError, set_backend
from flashi2v_npu_ops.device import resolve_device

logger = logging.getLogger(__name__)


def find_device(name: str) -> torch.device:
    """Return the device called `name`.

    Raises:
        InputError: this machine lacks it; the message says how to choose another.
    """
    try:
        return resolve_device(name)
    except UnsupportedError as error:
        raise InputError(f'{error}; or choose another: "device": "auto" in the file, or --device auto') from None


def load_from_config(config: InferenceConfig, device: torch.device) -> FlashI2VPipeline:
    """Build the pipeline that a configuration file describes.

    Raises:
        InputError: parts do not fit each other, or the tokenizer is missing or damaged.
        flashi2v_model.InputError: another part is missing or damaged.
    """
    set_backend("rms_norm", "auto" if config.predictor.use_fused_rmsnorm else "reference")
    if device.type == "cpu" and config.predictor.dtype not in ("fp32", "float32"):
        logger.warning("%s is slow on most CPUs: set predictor.dtype to fp32", config.predictor.dtype)
    for note in config.predictor.notes():
        logger.info(note)
    transformer = _load_transformer(config.predictor, device)
    tokenizer = _load_tokenizer(config.tokenizer.from_pretrained)
    text_encoder = load_text_encoder(config.text_encoder, device)
    vae = load_vae(config.ae, device)
    for ours, theirs, what in (
        (config.predictor.text_dim, text_encoder.config.d_model, "predictor.text_dim is {}, the text encoder's is {}"),
        (config.predictor.in_dim, vae.config.z_dim, "predictor.in_dim is {}, the VAE has {} latent channels"),
    ):
        if ours != theirs:
            raise InputError(what.format(ours, theirs))
    return FlashI2VPipeline(
        tokenizer,
        text_encoder,
        vae,
        transformer,
        euler_scheduler(config.diffusion.shift),
        use_attention_mask=config.text_encoder.use_attention_mask,
    )


def load_from_pretrained(model: str, dtype: torch.dtype, device: torch.device) -> FlashI2VPipeline:
    """Load a whole pipeline, the transformer strictly and the VAE in fp32.

    Args:
        model: a directory in diffusers' layout, or a hub id.
        dtype: of transformer and text encoder.
        device: of all parts.

    Raises:
        InputError: there is no such directory, or it holds no whole pipeline.
    """
    path = Path(model)
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise InputError(f"--model: {model} holds no model_index.json, so it is no pipeline in diffusers' layout")
    elif path.exists() or path.is_absolute() or model.startswith(".") or model.count("/") != 1:
        raise InputError(f"--model: no directory {model!r}: give one in diffusers' layout, or a hub id (owner/name)")
    try:
        # diffusers would start from random numbers where a weight is missing, with a warning at most.
        transformer, report = FlashI2VTransformer3DModel.from_pretrained(
            model, subfolder="transformer", torch_dtype=dtype, output_loading_info=True
        )
        pipeline = FlashI2VPipeline.from_pretrained(
            model, transformer=transformer, torch_dtype={"default": dtype, "vae": torch.float32}
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300].rstrip(".")
        hub = "" if path.is_dir() else " (there is no such directory here, so it was looked up on the hub)"
        raise InputError(f"--model: cannot load {model}: {reason}{hub}") from error
    problems = {what: keys for what, keys in report.items() if keys}
    if problems:
        raise InputError(f"--model: the transformer of {model} does not fit: {json.dumps(problems, default=str)[:300]}")
    return pipeline.to(device)


def _load_transformer(config: PredictorConfig, device: torch.device) -> FlashI2VTransformer3DModel:
    with torch.device("meta"):  # random start values of a large model would take minutes
        transformer = FlashI2VTransformer3DModel(**config.transformer_arguments())
    _cast(transformer, DTYPES[config.dtype])
    transformer.to_empty(device=device)
    assert config.from_pretrained is not None
    load_weights(transformer, config.from_pretrained)
    return transformer.requires_grad_(False).eval()


def _cast(transformer: FlashI2VTransformer3DModel, dtype: torch.dtype) -> None:
    """Set dtypes as `from_pretrained` does, so that both ways of loading sample the same video."""
    for name, parameter in transformer.named_parameters():
        kept = any(part in transformer._keep_in_fp32_modules for part in name.split("."))
        parameter.data = parameter.data.to(torch.float32 if kept else dtype)


def _load_tokenizer(path: str) -> Any:
    if not Path(path).is_dir():
        raise InputError(f"tokenizer.from_pretrained: no directory {path!r}")
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"tokenizer.from_pretrained: {path} holds no tokenizer: {reason}") from error
