"""A pipeline's modules without numbers: built on the meta device from their config.json alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from flashi2v_infer.config import InferenceConfig
from flashi2v_infer.execution import Execution
from flashi2v_infer.load import cast, check_model, settled_config
from flashi2v_model import FlashI2VTransformer3DModel
from flashi2v_model.config import DType
from flashi2v_model.encoders import DTYPES, configure_tiling
from flashi2v_model.errors import named
from flashi2v_model.presets import TRANSFORMERS
from flashi2v_model.variants import transformer_class
from flashi2v_model.weights.reading import check_directory, read_json

# Of the encoders that every release uses, for where their config.json is not at hand.
_UMT5_XXL = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": False,
    "use_cache": False,
}


@dataclass(frozen=True)
class Parts:
    """The modules of a pipeline without numbers, in their dtypes, and what had to be assumed of them."""

    transformer: FlashI2VTransformer3DModel
    text_encoder: UMT5EncoderModel
    vae: AutoencoderKLWan
    assumptions: tuple[str, ...] = ()

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The parts by name."""
        return {"transformer": self.transformer, "text encoder": self.text_encoder, "VAE": self.vae}


def parts_of_config(config: InferenceConfig, execution: Execution) -> Parts:
    """Build the parts that a configuration file describes; only config.json files are read.

    Raises:
        InputError: a config.json is damaged.
    """
    config = settled_config(config, execution)
    predictor, encoder, ae = config.predictor, config.text_encoder, config.ae
    parts = build_parts(
        predictor.transformer_arguments(),
        _read_config(Path(encoder.from_pretrained), "text_encoder.from_pretrained"),
        _read_config(Path(ae.from_pretrained), "ae.from_pretrained"),
        (predictor.dtype, encoder.dtype, ae.dtype),
        execution.recipe,
    )
    configure_tiling(parts.vae, ae)
    return parts


def parts_of_model(model: str, execution: Execution, device_type: str) -> Parts:
    """Build the parts of a pipeline directory, or, unseen, of a hub id; only config.json files are read.

    Args:
        model: what `flashi2v_infer.load.load_from_pretrained` takes.
        execution: for the dtypes.
        device_type: where it is going to run.

    Raises:
        InputError: there is no such directory, or a config.json is damaged.
    """
    path = check_model(model)
    names = ("transformer", "text_encoder", "vae")
    transformer, text_encoder, vae = (None if path is None else _read_config(path / name, "--model") for name in names)
    dtype = execution.settled_dtype(device_type)
    dtypes = (dtype, dtype, execution.settled_vae_dtype())
    return build_parts(transformer, text_encoder, vae, dtypes, execution.recipe)


def _read_config(directory: Path, key: str) -> dict[str, Any] | None:
    path = directory / "config.json"
    if not path.exists():
        return None
    with named(key):
        check_directory(directory)
        return read_json(path)


def build_parts(
    transformer: dict[str, Any] | None,
    text_encoder: dict[str, Any] | None,
    vae: dict[str, Any] | None,
    dtypes: tuple[DType, DType, DType],
    recipe: str | None = None,
) -> Parts:
    found = {"transformer": transformer, "text encoder": text_encoder, "VAE": vae}
    standard = {"transformer": "FlashI2V 1.3B's", "text encoder": "UMT5-XXL's", "VAE": "Wan2.1's"}
    assumptions = tuple(
        f"the {part}'s sizes are taken to be {standard[part]}: its config.json is not on this disk"
        for part, config in found.items()
        if config is None
    )
    network = transformer_class(recipe)
    with torch.device("meta"):
        parts = Parts(
            network.from_config(transformer or TRANSFORMERS["1.3b"]),
            UMT5EncoderModel(UMT5Config(**(text_encoder or _UMT5_XXL))),
            AutoencoderKLWan.from_config(vae or {}),
            assumptions,
        )
    for module in parts.modules.values():
        module.requires_grad_(False).eval()
    cast(parts.transformer, DTYPES[dtypes[0]])
    for module, dtype in ((parts.text_encoder, dtypes[1]), (parts.vae, dtypes[2])):
        for parameter in module.parameters():
            parameter.data = parameter.data.to(DTYPES[dtype])
    return parts
