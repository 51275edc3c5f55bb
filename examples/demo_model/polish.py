"""Train the decoder of a model's VAE on what its transformer leaves.

    python examples/demo_model/polish.py --model demo/rough --output demo/polished

Samplers leave latents that are not quite those of any video: what moved frays. The decoder learns to see through that:
noise is put on a true video's latents, the transformer goes on from there to the end, and what the decoder makes of it
must be the true video. Stopped anywhere, it goes on where it was.
"""

import argparse
import itertools
import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from encoders import FRAMES, SEED, Film, Machine, Phase, Shown, quicken, save_halved, story_number, train_phase
from torch import Tensor

from flashi2v_data.randomness import generator
from flashi2v_data.shapes.stories import sample_story
from flashi2v_infer import FlashI2VPipeline
from flashi2v_infer.defaults import settings_of
from flashi2v_model.encoders import encode_video
from flashi2v_model.sampling import VelocityField, set_timesteps
from flashi2v_model.scheduler import NUM_TIMESTEPS, interpolate

NUMBER = 9  # behind all phases of encoders.py
PHASE = Phase(500, 6e-4, 2, FRAMES, size=96, whole=True, encoder_too=False)


@torch.no_grad()
def finish(pipeline: FlashI2VPipeline, y: Tensor, condition: Tensor, captions: list[str], begin: int) -> Tensor:
    """Sample from step `begin` of the model's own number of steps to the end.

    Args:
        pipeline: its scheduler's timesteps are set.
        y: the state before that step, (B, C, F, H, W).
        condition: latents of the first frames, (B, C, 1, H, W).
        captions: of the videos.
        begin: 0 is the first step; behind the last one y stays as it is.
    """
    settings = settings_of(pipeline.defaults)
    field = VelocityField(
        pipeline.transformer,
        condition,
        *pipeline.encode_prompt(captions, [""] * len(captions)),
        settings.guidance_scale,
        settings.low_freq_energy_ratio,
    )
    for sigma, following in itertools.pairwise(pipeline.scheduler.sigmas[begin:]):
        y = y + (following - sigma) * field(y, NUM_TIMESTEPS * sigma)
    return y


def resample(pipeline: FlashI2VPipeline, phase: Phase, step: int, film: Film) -> Shown:
    """Encode films, put noise on them, let the transformer go on from there, and decode what it leaves."""
    vae, scheduler, steps = pipeline.vae, pipeline.scheduler, settings_of(pipeline.defaults).num_inference_steps
    numbers = [story_number(NUMBER, step * phase.batch + i) for i in range(len(film.video))]
    captions = [sample_story(SEED, number, phase.size, phase.size, looks="seen").caption for number in numbers]
    with torch.no_grad():
        latents = encode_video(vae, film.video)
    random = generator(SEED, "polish", NUMBER, step)
    noise = torch.randn(latents.shape, generator=random).to(latents.device)
    set_timesteps(scheduler, steps, latents.device)
    # Not in the first third, where things might go elsewhere than in the film; at the end there is no noise.
    begin = int(torch.randint(steps // 3, steps + 1, (), generator=random))
    noisy = interpolate(latents, noise, scheduler.sigmas[begin].expand(len(latents)))
    left = finish(pipeline, noisy, latents[:, :, :1], captions, begin)
    mean, std = (
        torch.tensor(numbers, device=vae.device).view(-1, 1, 1, 1)
        for numbers in (vae.config.latents_mean, vae.config.latents_std)
    )
    zero = torch.zeros(())
    return Shown(vae.decode(left * std + mean).sample, zero, zero)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a pipeline's directory")
    parser.add_argument("--output", type=Path, required=True, help="gets vae, text_encoder and tokenizer")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or npu (default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="compute in bf16: quick where the device has it")
    parser.add_argument("--shorter", type=int, default=1, help="do 1/N of all steps, to try it (default: %(default)s)")
    options = parser.parse_args()

    output: Path = options.output
    if (output / "vae").exists():
        return
    pipeline = FlashI2VPipeline.from_pretrained(options.model).to(options.device)
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(options.model / part, output / part, dirs_exist_ok=True)
    phase = replace(PHASE, steps=math.ceil(PHASE.steps / options.shorter))
    quicken(pipeline.vae)
    machine = Machine(options.device, options.bf16, workers=1)
    train_phase(pipeline.vae, NUMBER, phase, output, machine, partial(resample, pipeline, phase))
    save_halved(pipeline.vae.to("cpu"), output / "vae")


if __name__ == "__main__":
    main()
