"""A pipeline's modules without numbers: built on the meta device from their config.json alone."""

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan
from torch import nn

from flashi2v_infer.execution import DTypes
from flashi2v_infer.load import Model, PartConfig, cast
from flashi2v_model import FlashI2VTransformer3DModel
from flashi2v_model.encoders import DTYPES, TextEncoder, configure_tiling, text_encoder_class
from flashi2v_model.presets import TRANSFORMERS
from flashi2v_model.variants import transformer_class
from flashi2v_npu_ops.device import missing

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
    text_encoder: TextEncoder
    vae: AutoencoderKLWan
    assumptions: tuple[str, ...] = ()

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The parts by name."""
        return {"transformer": self.transformer, "text encoder": self.text_encoder, "VAE": self.vae}


def parts_of(model: Model, device_type: str) -> Parts:
    """Build the parts of a model, a hub id's unseen; only config.json files are read.

    Args:
        model: where it comes from.
        device_type: where it is going to run, which need not be in this machine.

    Raises:
        InputError: there is no such directory, a config.json is damaged, or the device makes no sense.
    """
    if missing(device_type) is None:
        model.settle(torch.device(device_type))  # refuses what the device cannot do
    dtypes = model.execution.dtypes_on(device_type, model.dtypes)
    parts = build_parts(*model.part_configs(), dtypes, transformer_class(model.execution.recipe))
    model.change(parts.transformer)
    if model.ae is not None:
        configure_tiling(parts.vae, model.ae)
    return parts


def build_parts(
    transformer: PartConfig,
    text_encoder: PartConfig,
    vae: PartConfig,
    dtypes: DTypes,
    network: type[FlashI2VTransformer3DModel] = FlashI2VTransformer3DModel,
) -> Parts:
    """Build parts from constructor arguments; None is taken to be as in the released 1.3B model."""
    found = {"transformer": transformer, "text encoder": text_encoder, "VAE": vae}
    standard = {"transformer": "FlashI2V 1.3B's", "text encoder": "UMT5-XXL's", "VAE": "Wan2.1's"}
    assumptions = tuple(
        f"the {part}'s sizes are taken to be {standard[part]}: its config.json is not on this disk"
        for part, config in found.items()
        if config is None
    )
    text_encoder = text_encoder or _UMT5_XXL
    encoder = text_encoder_class(text_encoder)
    with torch.device("meta"):
        parts = Parts(
            network.from_config(transformer or TRANSFORMERS["1.3b"]),
            encoder(encoder.config_class(**text_encoder)),
            AutoencoderKLWan.from_config(vae or {}),
            assumptions,
        )
    for module in parts.modules.values():
        module.requires_grad_(False).eval()
    cast(parts.transformer, DTYPES[dtypes.transformer])
    for module, dtype in ((parts.text_encoder, dtypes.text_encoder), (parts.vae, dtypes.vae)):
        for parameter in module.parameters():
            parameter.data = parameter.data.to(DTYPES[dtype])
    return parts
