"""The sampling loop against reference numbers, and with other schedulers."""

import itertools

import pytest
import torch
from diffusers import DDIMScheduler, DEISMultistepScheduler, FlowMatchLCMScheduler
from golden import number, small_model, tensor
from torch import Tensor
from torch.testing import assert_close

from flashi2v_model import FlashI2VTransformer3DModel, InputError, sampling
from flashi2v_model.sampling import denoise, set_timesteps
from flashi2v_model.scheduler import euler_scheduler, make_scheduler

CPU = torch.device("cpu")
TEXT, NEGATIVE_TEXT = (number(f"sampling/in/{name}")[:1] for name in ("prompt", "neg_prompt"))
# Computed once with the public FlashI2V code (NPU release) in fp32: four steps at shift 7, guidance 5, ratio 0.1.
FINAL = number("sampling/npu/conv333/b1_final")


def latent(name: str, shape: tuple[int, ...]) -> Tensor:
    """Of variance 1; the reference drew two samples, of which the first counts here."""
    return tensor(name, (2, *shape), 3**0.5)[:1]


CONDITION = latent("sc:start", (16, 1, 8, 12))


@pytest.fixture(scope="module")
def reference_model() -> FlashI2VTransformer3DModel:
    return small_model().requires_grad_(False)


@pytest.fixture
def integrate(reference_model):
    def run(scheduler, steps, guidance_scale=5.0, noise=None, **options):
        set_timesteps(scheduler, steps, CPU)
        noise = latent("sc:noise", (16, 3, 8, 12)) if noise is None else noise
        return denoise(
            reference_model, scheduler, noise, CONDITION, TEXT, NEGATIVE_TEXT, guidance_scale, 0.1, **options
        )

    return run


def test_four_guided_steps_equal_the_reference(integrate):
    assert_close(integrate(euler_scheduler(7.0), 4), FINAL, atol=1e-4, rtol=0.0)


@torch.no_grad()
def test_what_is_computed_once_gives_the_numbers_of_the_plain_loop(integrate, reference_model):
    y = latent("sc:noise", (16, 3, 8, 12))
    sigmas = [7 * s / (1 + 6 * s) for s in torch.linspace(1, 0, 5, dtype=torch.float64).tolist()]
    for sigma, following in itertools.pairwise(sigmas):
        t = torch.tensor([1000 * sigma])
        v, v_negative = (reference_model(y, t, text, CONDITION, 0.1).sample for text in (TEXT, NEGATIVE_TEXT))
        y = y + (v_negative + 5.0 * (v - v_negative)) * (following - sigma)
    assert_close(integrate(euler_scheduler(7.0), 4), y, atol=2e-5, rtol=0.0)


def test_texts_are_embedded_once(integrate, reference_model):
    block = reference_model.blocks[0]
    embedder = reference_model.condition_embedder
    parts = {
        "text": embedder.text_embedder.linear_1,
        "keys": block.attn2.to_k,
        "values": block.attn2.to_v,
        "queries": block.attn2.to_q,
    }
    calls = dict.fromkeys(parts, 0)

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    handles = [part.register_forward_hook(count(name)) for name, part in parts.items()]
    integrate(euler_scheduler(7.0), 4)
    for handle in handles:
        handle.remove()
    assert calls == {"text": 2, "keys": 2, "values": 2, "queries": 8}


def test_both_branches_may_run_as_one_batch(integrate):
    assert_close(
        integrate(euler_scheduler(7.0), 3, cfg_batch=True), integrate(euler_scheduler(7.0), 3), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("name", ["heun", "unipc", "dpm++"])
def test_schedulers_of_second_order_come_nearer_to_an_exact_flow_than_euler(name):
    """From noise to a Gaussian of deviation 1.5: the flow scales every number by just that."""
    deviation = 1.5

    def velocity(y, timestep):
        sigma = timestep / 1000
        return y * (sigma - (1 - sigma) * deviation**2) / (sigma**2 + (1 - sigma) ** 2 * deviation**2)

    noise = latent("sc:noise", (16, 3, 8, 12))
    errors = {}
    for kind in ("euler", name):
        scheduler = make_scheduler(kind, 3.0)
        set_timesteps(scheduler, 25, CPU)
        result = sampling.integrate(scheduler, velocity, noise)
        errors[kind] = (result - deviation * noise).norm() / (deviation * noise).norm()
    assert errors[name] < errors["euler"] / 4


@torch.no_grad()
@pytest.mark.parametrize("name", ["unipc", "dpm++"])
def test_schedulers_that_round_their_timesteps_take_exact_euler_steps_at_first_order(integrate, reference_model, name):
    scheduler = make_scheduler(name, 7.0)
    scheduler.register_to_config(solver_order=1, disable_corrector=[0, 1, 2, 3])
    scheduler.disable_corrector = [0, 1, 2, 3]
    result = integrate(scheduler, 4, guidance_scale=1.0)
    assert not scheduler.timesteps.is_floating_point()
    y = latent("sc:noise", (16, 3, 8, 12))
    for sigma, following in itertools.pairwise(scheduler.sigmas):
        t = (1000 * sigma).expand(1)
        v = reference_model(y, t, TEXT, CONDITION, 0.1).sample
        y = y + v * (following - sigma)
    assert_close(result, y, atol=1e-4, rtol=0.0)


def test_an_observer_may_change_or_end_the_run(integrate):
    seen = []

    def stop_after_two(step, timestep, y):
        seen.append((step, timestep.item()))
        return None if step == 1 else y

    def halve(step, timestep, y):
        return y / 2

    whole = integrate(euler_scheduler(7.0), 4)
    ended = integrate(euler_scheduler(7.0), 4, on_step=stop_after_two)
    assert [step for step, _ in seen] == [0, 1]
    assert seen[0][1] == 1000.0
    assert not torch.allclose(ended, whole)
    assert not torch.allclose(integrate(euler_scheduler(7.0), 4, on_step=halve), whole)


def test_schedulers_that_draw_noise_draw_it_from_the_generator(integrate):
    scheduler = FlowMatchLCMScheduler(shift=7.0)
    first, second, other = (
        integrate(scheduler, 2, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.allclose(first, other)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DDIMScheduler(), "DDIMScheduler is set up for 'epsilon'.*: use FlowMatchEulerDiscreteScheduler, or give"),
        (DEISMultistepScheduler(prediction_type="flow_prediction"), "use_flow_sigmas=True"),
        (
            DEISMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
            r"stop at sigma 0\.\d+, with noise left: give it final_sigmas_type='zero'",
        ),
    ],
)
def test_a_scheduler_that_does_not_integrate_the_flow_is_refused(scheduler, message):
    with pytest.raises(InputError, match=message):
        set_timesteps(scheduler, 4, CPU)


def test_infinite_latents_are_an_error_rather_than_a_black_video(integrate):
    with pytest.raises(FloatingPointError, match="bf16 or fp32"):
        integrate(euler_scheduler(7.0), 1, noise=torch.full((1, 16, 3, 8, 12), float("inf")))
