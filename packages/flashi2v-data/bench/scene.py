"""Videos to measure on: a moving texture with grain, compressed as usual."""

from pathlib import Path

import numpy as np
import torch

from flashi2v_data import write_video


def write_scene(path: Path, height: int, width: int, num_frames: int, fps: float = 24) -> None:
    """Write a video whose compressed size, at a few Mbit/s, is that of common footage."""
    random = torch.Generator().manual_seed(0)
    tall, wide = height, width + 2 * num_frames
    coarse = torch.randn(1, 3, tall // 8 + 1, wide // 8 + 1, generator=random)
    texture = torch.nn.functional.interpolate(coarse, (tall, wide), mode="bicubic")[0]
    grain = torch.randn(3, tall, wide, generator=random)
    scene = (128 + 40 * texture + 6 * grain).clamp(0, 255).byte().permute(1, 2, 0).numpy()
    write_video(path, np.stack([scene[:, 2 * t : 2 * t + width] for t in range(num_frames)]), fps, crf=20)
