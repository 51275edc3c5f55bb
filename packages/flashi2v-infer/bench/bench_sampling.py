"""What sampling costs beyond the bare calls of the network, and what computing once saves, as ratios within one run.

    python bench/bench_sampling.py [--device cuda] [--repeats 5]

The network is a tiny one, so that what surrounds it weighs far more than with a real model: these are upper bounds. So
is what is saved: the fewer tokens a video has, the more the text weighs.
"""

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from flashi2v_infer import FlashI2VPipeline
from flashi2v_infer.arguments import prepare_image
from flashi2v_model import presets
from flashi2v_model.encoders import encode_video
from flashi2v_model.sampling import denoise, set_timesteps
from flashi2v_npu_ops.device import resolve_device, synchronize

NUM_FRAMES, HEIGHT, WIDTH, NUM_STEPS = 17, 128, 192, 10


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)

    with tempfile.TemporaryDirectory() as directory:
        presets.init("tiny", Path(directory))
        pipe = FlashI2VPipeline.from_pretrained(directory).to(device)
    pipe.set_progress_bar_config(disable=True)
    image = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    condition = encode_video(pipe.vae, prepare_image(image, HEIGHT, WIDTH)[None].to(device))
    text, negative = pipe.encode_prompt("a red circle")
    noise = torch.randn(1, 16, (NUM_FRAMES - 1) // 4 + 1, HEIGHT // 8, WIDTH // 8, device=device)

    def network(num_calls: int) -> None:
        for _ in range(num_calls):
            pipe.transformer(noise, torch.full((1,), 500.0, device=device), text, condition)

    def plain_loop() -> None:
        set_timesteps(pipe.scheduler, NUM_STEPS, device)
        y = noise
        for t in pipe.scheduler.timesteps:
            v, v_negative = (
                pipe.transformer(y, t.expand(1), context, condition).sample for context in (text, negative)
            )
            y = pipe.scheduler.step(v_negative + 5.0 * (v - v_negative), t, y).prev_sample

    def loop(cfg_batch: bool = False) -> None:
        set_timesteps(pipe.scheduler, NUM_STEPS, device)
        denoise(pipe.transformer, pipe.scheduler, noise, condition, text, negative, 5.0, cfg_batch=cfg_batch)

    def whole(output_type: str, guidance_scale: float = 5.0) -> None:
        pipe(
            image=image,
            prompt="a red circle",
            num_frames=NUM_FRAMES,
            height=HEIGHT,
            width=WIDTH,
            num_inference_steps=NUM_STEPS,
            guidance_scale=guidance_scale,
            latents=noise,
            output_type=output_type,
        )

    bare = f"{2 * NUM_STEPS} bare calls of the network"
    cases: dict[str, Callable[[], None]] = {
        bare: lambda: network(2 * NUM_STEPS),
        f"plain loop of {NUM_STEPS} guided steps, nothing kept": plain_loop,
        "the same, text computed once": loop,
        "the same, both branches in one batch": lambda: loop(cfg_batch=True),
        "pipeline to latents": lambda: whole("latent"),
        "pipeline to images (VAE decoding)": lambda: whole("pil"),
        "pipeline to latents, guidance_scale 1": lambda: whole("latent", 1.0),
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in range(arguments.repeats + 1):  # in turns, so that other load on the machine meets all alike
        for name, run in cases.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if repeat:  # the first warms up
                seconds[name].append(time.perf_counter() - start)

    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, device {device}; ", end="")
    print(", ".join(f"{name} {version(name)}" for name in ("flashi2v-infer", "torch", "diffusers", "transformers")))
    print(f"tiny preset, {NUM_FRAMES}x{HEIGHT}x{WIDTH}, median of {arguments.repeats}\n")
    print("| what | seconds | ratio |\n|---|---|---|")
    base = statistics.median(seconds[bare])
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"| {name} | {median:.3f} | {median / base:.2f} |")


if __name__ == "__main__":
    main()
