"""Our transformer beside diffusers' WanTransformer3DModel with the same trunk: forward and backward, one run."""

import torch
from diffusers import WanTransformer3DModel
from torch.utils.benchmark import Timer

from flashi2v_model import FlashI2VTransformer3DModel

# Two blocks of the 1.3B model on 5 latent frames of 128x128.
SIZES = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 2}
LATENTS = (1, 16, 5, 16, 16)


def main() -> None:
    ours, theirs = FlashI2VTransformer3DModel(**SIZES), WanTransformer3DModel(**SIZES)
    latents, text, timestep = torch.randn(LATENTS), torch.randn(1, 512, 4096), torch.tensor([500.0])
    calls = {
        "diffusers Wan": lambda: theirs(latents, timestep, text, return_dict=False)[0],
        "FlashI2V": lambda: ours(latents, timestep, text, latents[:, :, :1], return_dict=False)[0],
    }
    medians = {
        name: Timer(
            "call().sum().backward()", globals={"call": call}, num_threads=torch.get_num_threads()
        ).blocked_autorange(min_run_time=5.0).median
        for name, call in calls.items()
    }  # fmt: skip
    for name, seconds in medians.items():
        print(f"{name:<14} {seconds:.3f} s forward and backward, {seconds / medians['diffusers Wan']:.2f}x")


if __name__ == "__main__":
    main()
