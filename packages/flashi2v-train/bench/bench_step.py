"""What the loss around the transformer costs: a training step against the bare network's forward and backward."""

import torch
from torch.utils.benchmark import Timer

from flashi2v_model import FlashI2VTransformer3DModel
from flashi2v_model.presets import TRANSFORMERS
from flashi2v_train.step import FlowMatchingLoss

BATCH, LATENT, TEXT = 8, (16, 5, 16, 16), 128


def main() -> None:
    transformer = FlashI2VTransformer3DModel(**TRANSFORMERS["tiny"])
    loss = FlowMatchingLoss(transformer)
    latents, noise = torch.randn(BATCH, *LATENT), torch.randn(BATCH, *LATENT)
    context = torch.randn(BATCH, TEXT, transformer.config.text_dim)
    sigma, ratio = torch.rand(BATCH), torch.full((BATCH,), 0.5)
    calls = {
        "bare network": lambda: transformer(latents, 1000 * sigma, context, latents).sample.square().mean(),
        "guidance and loss": lambda: loss(latents, latents[:, :, :1], context, noise, sigma, ratio).mean(),
    }
    medians = {
        name: Timer("call().backward()", globals={"call": call}, num_threads=2).blocked_autorange(min_run_time=5).median
        for name, call in calls.items()
    }
    for name, seconds in medians.items():
        print(f"{name:<18} {seconds * 1e3:6.1f} ms forward and backward, {seconds / medians['bare network']:.2f}x")


if __name__ == "__main__":
    main()
