"""The sampling loop against reference numbers, and with other schedulers."""

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler
from torch import Tensor
from torch.testing import assert_close

from flashi2v_infer.denoising import denoise, set_timesteps
from flashi2v_infer.settings import InputError
from flashi2v_model import FlashI2VTransformer3DModel, Guidance, convert_state_dict, guide
from flashi2v_model.scheduler import euler_scheduler

CPU = torch.device("cpu")
# Computed once with the public FlashI2V code (NPU release) in fp32: four steps at shift 7, guidance 5, ratio 0.1.
GOLDEN = {name: torch.from_numpy(value) for name, value in np.load(Path(__file__).with_name("golden.npz")).items()}


def hashed(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers in [-1, 1) from a 32-bit integer hash of name and position, float64."""
    count, mask = int(np.prod(shape)), 0xFFFFFFFF
    state = (np.arange(count, dtype=np.uint64) * 2654435761 + zlib.crc32(name.encode())) & mask
    for shift, factor in ((16, 2246822519), (13, 3266489917)):
        state = ((state ^ (state >> np.uint64(shift))) * factor) & mask
    state ^= state >> np.uint64(16)
    return (state / 2**31 - 1).reshape(shape)


def weight(key: str, shape: tuple[int, ...]) -> Tensor:
    values = hashed(key, shape)
    if key.endswith((".norm_q.weight", ".norm_k.weight", ".norm3.weight")):
        values = 1 + 0.1 * values
    elif key.endswith("modulation"):
        values = 0.3 * values
    elif key.endswith(".bias"):
        values = 0.1 * values
    else:
        values = values * np.sqrt(3 / np.prod(shape[1:]))
    return torch.from_numpy(values.astype(np.float32))


def latent(name: str, shape: tuple[int, ...]) -> Tensor:
    """Of variance 1; the reference drew two samples, of which the first counts here."""
    return torch.from_numpy((3**0.5 * hashed(name, (2, *shape))).astype(np.float32))[:1]


@pytest.fixture(scope="module")
def reference_model() -> FlashI2VTransformer3DModel:
    model = FlashI2VTransformer3DModel(
        num_attention_heads=4, attention_head_dim=24, text_dim=24, freq_dim=32, ffn_dim=128, num_layers=3
    )
    names = convert_state_dict(model.state_dict(), target="main")
    weights = {key: weight(key, tuple(value.shape)) for key, value in names.items()}
    model.load_state_dict(convert_state_dict(weights, "main"))
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def reference_guidance(reference_model) -> Guidance:
    return guide(reference_model, latent("sc:start", (16, 1, 8, 12)), 3, 0.1)


@pytest.fixture
def integrate(reference_model, reference_guidance):
    def run(scheduler, steps, guidance_scale=5.0, generator=None, noise=None):
        set_timesteps(scheduler, steps, CPU)
        noise = latent("sc:noise", (16, 3, 8, 12)) if noise is None else noise
        text, negative = GOLDEN["prompt"], GOLDEN["negative_prompt"]
        return denoise(
            reference_model, scheduler, noise, reference_guidance, text, negative, guidance_scale, generator=generator
        )

    return run


def test_four_guided_steps_equal_the_reference(integrate):
    assert_close(integrate(euler_scheduler(7.0), 4), GOLDEN["final"], atol=1e-4, rtol=0.0)


def test_a_scheduler_of_second_order_may_replace_the_default(integrate):
    exact = integrate(euler_scheduler(7.0), 60, guidance_scale=1.0)
    euler = integrate(euler_scheduler(7.0), 6, guidance_scale=1.0)
    heun = integrate(FlowMatchHeunDiscreteScheduler(shift=7.0), 6, guidance_scale=1.0)
    assert (heun - exact).norm() < (euler - exact).norm()


def test_schedulers_that_draw_noise_draw_it_from_the_generator(integrate):
    scheduler = FlowMatchLCMScheduler(shift=7.0)
    first, second, other = (
        integrate(scheduler, 2, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.allclose(first, other)


def test_a_scheduler_of_another_kind_is_refused():
    with pytest.raises(InputError, match=r"DDIMScheduler expects 'epsilon'.*FlowMatchEulerDiscreteScheduler"):
        set_timesteps(DDIMScheduler(), 4, CPU)


def test_infinite_latents_are_an_error_rather_than_a_black_video(integrate):
    with pytest.raises(FloatingPointError, match="bf16 or fp32"):
        integrate(euler_scheduler(7.0), 1, noise=torch.full((1, 16, 3, 8, 12), float("inf")))
