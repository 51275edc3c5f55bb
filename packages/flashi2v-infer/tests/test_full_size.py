"""The whole way with the network of the released model, at a small size of video."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import nn
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

from flashi2v_infer import FlashI2VPipeline
from flashi2v_model import FlashI2VTransformer3DModel
from flashi2v_model.presets import TRANSFORMERS
from flashi2v_model.scheduler import euler_scheduler
from flashi2v_npu_ops.device import free_memory

GIB = 2**30
NEEDED = 12 * GIB


def _fill(model: nn.Module) -> None:
    """Give every weight random numbers: one short stretch of them over and over, as drawing 1.4 billion takes long."""
    stretch = 0.02 * torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
    for parameter in model.parameters():
        for part in parameter.data.view(-1).split(len(stretch)):
            part.copy_(stretch[: len(part)])


@pytest.mark.slow
@torch.no_grad()
def test_the_released_size_samples_a_video(photograph):
    free = free_memory(torch.device("cpu"))
    if free is not None and free < NEEDED:
        pytest.skip(f"needs {NEEDED / GIB:.0f} GiB of free memory, there are {free / GIB:.1f}")
    with torch.device("meta"):
        transformer = FlashI2VTransformer3DModel(**TRANSFORMERS["1.3b"])
    assert 1.4e9 < sum(parameter.numel() for parameter in transformer.parameters()) < 1.5e9
    transformer.to_empty(device="cpu")
    _fill(transformer)
    tokenizer = ByT5Tokenizer(extra_ids=0)
    text_dim = transformer.config.text_dim
    config = UMT5Config(vocab_size=len(tokenizer), d_model=text_dim, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    vae = AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
    pipe = FlashI2VPipeline(tokenizer, UMT5EncoderModel(config), vae, transformer, euler_scheduler(7.0))
    pipe.set_progress_bar_config(disable=True)
    frames = pipe(
        image=photograph,
        prompt="a dark object moves left",
        num_frames=17,
        height=128,
        width=128,
        num_inference_steps=1,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).frames
    assert frames.shape == (1, 17, 128, 128, 3)
    assert np.isfinite(frames).all()
    assert frames.std() > 0
