"""Conditioning, flow matching, one training step and guided sampling against reference numbers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import NUMBERS, number, small_model, tensor
from torch.testing import assert_close

from flashi2v_model import convert_state_dict
from flashi2v_model.scheduler import (
    draw_sigmas,
    dynamic_shift,
    euler_scheduler,
    inference_sigmas,
    interpolate,
    shift_sigma,
    target,
)
from flashi2v_npu_ops import split_frequencies

SHAPE = (2, 16, 3, 8, 12)
ROOT3 = 3**0.5


@pytest.mark.parametrize(("steps", "shift"), [(50, 7), (4, 7), (40, 3)])
def test_inference_sigmas_equal_the_reference(steps, shift):
    scheduler = euler_scheduler(float(shift))
    scheduler.set_timesteps(sigmas=inference_sigmas(steps))
    assert_close(scheduler.sigmas, number(f"sampling/shared/sigmas_{steps}_shift{shift}"), atol=1e-6, rtol=0.0)
    assert_close(scheduler.timesteps, 1000 * scheduler.sigmas[:-1])


@pytest.mark.parametrize("size", ["60x104", "8x12", "90x160"])
def test_dynamic_shift_equals_the_reference(size):
    height, width = map(int, size.split("x"))
    assert dynamic_shift(height, width) == pytest.approx(NUMBERS[f"sampling/shared/dyn_shift_{size}"].item(), abs=1e-6)


def test_shifted_sigmas_equal_the_reference():
    shifted = shift_sigma(number("sampling/shared/dyn_in"), dynamic_shift(60, 104))
    assert_close(shifted, number("sampling/shared/dyn_out_60x104"), atol=1e-6, rtol=0.0)


def test_interpolation_and_loss_equal_the_reference():
    latents, noise = tensor("sc:x0", SHAPE, ROOT3), tensor("sc:eps", SHAPE, ROOT3)
    phi, output = tensor("sc:phi", SHAPE, 0.5), tensor("sc:model_out", SHAPE)
    sigma = shift_sigma(torch.tensor([0.3, 0.85]), dynamic_shift(8, 12))
    assert_close(sigma, number("sampling/main/q_dyn_sigmas"), atol=1e-6, rtol=0.0)
    # What the network embeds, behind the shift.
    assert_close(interpolate(latents, noise, sigma) - phi, number("sampling/main/q_dyn_x_t"), atol=1e-5, rtol=0.0)
    loss = F.mse_loss(output, target(latents, noise))
    assert_close(loss, number("sampling/shared/loss_plain"), atol=1e-5, rtol=0.0)


def test_drawn_sigmas_follow_their_distribution():
    generators = [torch.Generator().manual_seed(i) for i in range(4000)]
    logit_normal = draw_sigmas(generators, logit_normal=True, shift=None)
    assert_close(logit_normal.logit().mean(), torch.tensor(0.0), atol=0.06, rtol=0.0)
    assert_close(logit_normal.logit().std(), torch.tensor(1.0), atol=0.06, rtol=0.0)
    generators = [torch.Generator().manual_seed(i) for i in range(4000)]
    uniform = draw_sigmas(generators, logit_normal=False, shift=3.0)
    assert_close((uniform < shift_sigma(torch.tensor(0.5), 3.0)).float().mean(), torch.tensor(0.5), atol=0.03, rtol=0.0)


@pytest.mark.parametrize(("golden", "conv3x3x3"), [("npu/conv333/b0", True), ("main/conv133/b0", False)])
def test_a_training_step_equals_the_reference(golden, conv3x3x3):
    model = small_model(conv3x3x3_proj=conv3x3x3)
    latents, noise = tensor("sc:x0", SHAPE, ROOT3)[:1], tensor("sc:eps", SHAPE, ROOT3)[:1]
    condition = tensor("sc:start", (2, 16, 1, 8, 12), ROOT3)[:1]
    sigma = shift_sigma(torch.tensor([0.3]), dynamic_shift(8, 12))
    noisy, text = interpolate(latents, noise, sigma), number("sampling/in/prompt")[:1]
    loss = F.mse_loss(model(noisy, 1000 * sigma, text, condition, 0.1).sample, target(latents, noise))
    loss.backward()
    assert_close(loss.detach(), number(f"train/{golden}/loss"), atol=1e-5, rtol=0.0)

    gradients = convert_state_dict({k: p.grad for k, p in model.named_parameters()}, target="main")
    norms = np.array([gradients[key].norm().item() for key in sorted(gradients)])
    reference = NUMBERS[f"train/{golden}/grad_norms_sorted_keys"]
    np.testing.assert_allclose(norms[reference >= 0], reference[reference >= 0], rtol=1e-4, atol=1e-7)
    total = np.sqrt((norms**2).sum())
    np.testing.assert_allclose(total, NUMBERS[f"train/{golden}/total_grad_norm"], rtol=1e-4)
    compared = 0
    for name in NUMBERS:
        if name.startswith(f"train/{golden}/grad/"):
            ours, theirs = gradients[name.rsplit("/", 1)[1]], number(name)
            assert (ours - theirs).norm() <= 1e-4 * theirs.norm(), name
            compared += 1
    assert compared == 5


@torch.no_grad()
@pytest.mark.parametrize(
    ("golden", "conv3x3x3", "batch"), [("npu/conv333/b1", True, slice(0, 1)), ("main/conv133/b2", False, slice(0, 2))]
)
def test_four_guided_steps_equal_the_reference(golden, conv3x3x3, batch):
    model = small_model(conv3x3x3_proj=conv3x3x3)
    condition = tensor("sc:start", (2, 16, 1, 8, 12), ROOT3)[batch]
    scheduler = euler_scheduler(7.0)
    scheduler.set_timesteps(sigmas=inference_sigmas(4))
    state = tensor("sc:noise", SHAPE, ROOT3)[batch]
    for i, t in enumerate(scheduler.timesteps):
        branches = [
            model(state, t.expand(len(state)), number(f"sampling/in/{text}")[batch], condition, 0.1)
            for text in ("neg_prompt", "prompt")
        ]
        unconditional, conditional = (branch.sample for branch in branches)
        velocity = unconditional + 5.0 * (conditional - unconditional)
        if i == 0 and golden.startswith("npu"):
            assert_close(velocity, number(f"sampling/{golden}_v0"), atol=1e-4, rtol=0.0)
        state = scheduler.step(velocity, t, state).prev_sample
    assert_close(state, number(f"sampling/{golden}_final"), atol=1e-4, rtol=0.0)


@torch.no_grad()
def test_low_freq_proj_feeds_the_low_pass_to_the_shift():
    condition = tensor("sc:start", (2, 16, 1, 8, 12))
    plain, low = small_model(), small_model(low_freq_proj=True)
    low_pass = split_frequencies(condition[:, :, 0], 0.5)[1][:, :, None]
    assert torch.equal(low.guide(condition, 3, 0.5)[0], plain.learnable_proj(low_pass, 3))
    assert torch.equal(plain.guide(condition, 3, 0.5)[0], plain.learnable_proj(condition, 3))
