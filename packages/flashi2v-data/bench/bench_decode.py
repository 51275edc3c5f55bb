"""A training clip, 49 frames to 480x832: time of reading and transforming it over decord's of decoding it alone.

Once on one core, as where a loader has a worker for each, and once on all: decord decodes and converts colours in two
threads even where it is told to use one. The parts are measured in turns, and the fastest of each counts: a machine is
never faster than it is. A worker's part ends with uint8 pictures; float32 is written by the trainer's process, or on
its accelerator.
"""

import importlib.util
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scene import write_scene

from flashi2v_data import build_transform, read_frames
from flashi2v_data.loading.config import TransformPipeline

FRAMES, HEIGHT, WIDTH, ROUNDS = 49, 480, 832, 9
RESIZE = {"trans_type": "CenterCropResizeVideo", "param": {"transform_size": [HEIGHT, WIDTH], "antialias": True}}
PIPELINE = TransformPipeline(video=[RESIZE, {"trans_type": "ToTensorVideo"}, {"trans_type": "norm_fun"}])
TARGET = 1.25


def main() -> None:
    torch.set_num_threads(1)
    cores = os.sched_getaffinity(0)
    # From 24 to 16 frames a second, as in training.
    indices = (np.arange(FRAMES) * 1.5).astype(int).tolist()
    with tempfile.TemporaryDirectory() as directory:
        for height, width in ((720, 1280), (1080, 1920)):
            path = Path(directory) / f"{height}.mp4"
            write_scene(path, height, width, 97)
            for name, allowed in (("one core", {min(cores)}), ("all cores", cores)):
                os.sched_setaffinity(0, allowed)
                report(f"{height}p, {name}", measure(path, indices))


def measure(path: Path, indices: list[int]) -> dict[str, list[float]]:
    transform = build_transform(PIPELINE)

    def decord_alone() -> None:
        import decord

        decord.VideoReader(str(path), num_threads=1).get_batch(indices).asnumpy()

    def pictures() -> np.ndarray:
        places = np.empty((FRAMES, 3, HEIGHT, WIDTH), np.uint8)
        return read_frames(path, indices, convert=transform.put_picture, out=places)

    calls: dict[str, Callable[[], object]] = {
        "decord, decoding alone": decord_alone,
        "ours, decoding alone": lambda: read_frames(path, indices),
        "ours, decoding, crop, resize": pictures,
        "ours, whole, to float32": lambda: transform.normalise(torch.from_numpy(pictures())),
    }
    if importlib.util.find_spec("decord") is None:
        del calls["decord, decoding alone"]
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def report(title: str, seconds: dict[str, list[float]]) -> None:
    base = next(iter(seconds))
    print(f"{title}: {FRAMES} frames to {HEIGHT}x{WIDTH}; ratios to {base} (target of the whole: {TARGET})")
    for name, times in seconds.items():
        print(f"  {name:<30} {min(times) * 1e3:6.0f} ms  {min(times) / min(seconds[base]):5.2f}x")


if __name__ == "__main__":
    main()
