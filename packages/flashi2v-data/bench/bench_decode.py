"""Reading a training clip: decoding alone, and with crop, resize and normalisation, by decoder, in one run."""

import importlib.util
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch.utils.benchmark import Timer

from flashi2v_data import center_crop_resize, normalise, read_frames, to_tensor, write_video

FRAMES, HEIGHT, WIDTH = 49, 720, 1280


def main() -> None:
    random = np.random.default_rng(0)
    texture = random.integers(0, 256, (HEIGHT // 16, (WIDTH + 2 * FRAMES) // 16 + 1, 3), dtype=np.uint8)
    scene = texture.repeat(16, 0).repeat(16, 1)
    frames = np.stack([scene[:, 2 * t : 2 * t + WIDTH] for t in range(FRAMES)])
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "clip.mp4"
        write_video(path, frames, 16)

        def clip(backend: str) -> torch.Tensor:
            return normalise(to_tensor(center_crop_resize(read_frames(path, range(FRAMES), backend), 480, 832)))

        calls = {}
        for backend in ("decord", "pyav"):
            if backend == "pyav" or importlib.util.find_spec(backend):
                calls[f"{backend}, decoding"] = lambda backend=backend: read_frames(path, range(FRAMES), backend)
                calls[f"{backend}, decoding and transforms"] = lambda backend=backend: clip(backend)
        medians = {
            name: Timer("call()", globals={"call": call}, num_threads=2).blocked_autorange(min_run_time=2.0).median
            for name, call in calls.items()
        }
    first = next(iter(medians.values()))
    for name, seconds in medians.items():
        print(f"{name:<32} {seconds * 1e3:6.0f} ms for {FRAMES} frames of {HEIGHT}x{WIDTH}, {seconds / first:.2f}x")


if __name__ == "__main__":
    main()
