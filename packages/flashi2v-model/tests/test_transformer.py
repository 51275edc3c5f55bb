"""The transformer against reference numbers and against diffusers."""

from itertools import product

import pytest
import torch
from diffusers import WanTransformer3DModel
from golden import SMALL, number, small_model, tensor, weight
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from flashi2v_model import FlashI2VTransformer3DModel
from flashi2v_model.caching import conditions_kept
from flashi2v_model.layers import rope_tables, timestep_embedding
from flashi2v_npu_ops import apply_rope, split_frequencies

TIMESTEP = torch.tensor([737.25, 41.5])
CLOSE = {"atol": 5e-5, "rtol": 0.0}


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the forward pass is given: noisy latents, timesteps, text, first frames."""
    latents, timestep, text, _ = trunk_inputs()
    return latents, timestep, text, tensor("in:condition", (2, 16, 1, 8, 12))


def trunk_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the network behind the shift is given: shifted latents, timesteps, text, Fourier features."""
    shape = (2, 16, 3, 8, 12)
    return (
        tensor("in:latents", shape, 3**0.5),
        TIMESTEP,
        tensor("in:text", (2, 16, 24)),
        tensor("in:fourier", shape),
    )


@torch.no_grad()
def test_the_trunk_equals_the_reference():
    torch.testing.assert_close(small_model().trunk(*trunk_inputs()), number("dit/main_b2"), **CLOSE)


@torch.no_grad()
def test_the_forward_is_the_trunk_behind_shift_and_features():
    model, (latents, timestep, text, condition) = small_model(), inputs()
    ratio = torch.tensor([0.1, 0.7])
    features = split_frequencies(condition[:, :, 0], ratio)[0][:, :, None].expand_as(latents)
    shifted = latents - model.learnable_proj(condition, 3)
    expected = model.trunk(shifted, timestep, text, features)
    # Of one frame or of all, features are summed in another order where there are several threads.
    torch.testing.assert_close(model(latents, timestep, text, condition, ratio).sample, expected, **CLOSE)


@torch.no_grad()
def test_samples_of_a_batch_may_have_different_timesteps():
    model, batch = small_model(), inputs()
    together = model(*batch, return_dict=False)[0]
    for i in range(2):
        alone = model(*(x[i : i + 1] for x in batch), return_dict=False)[0]
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=0.0)


@torch.no_grad()
def test_the_trunk_equals_diffusers_with_the_same_weights():
    """With the Fourier branch at its zero start the model is Wan2.1."""
    model = small_model()
    torch.nn.init.zeros_(model.fourier_embedding[1].weight)
    torch.nn.init.zeros_(model.fourier_embedding[1].bias)
    wan = WanTransformer3DModel(**SMALL)
    trunk = {k: v for k, v in model.state_dict().items() if not k.startswith(("fourier_embedding", "learnable_proj"))}
    wan.load_state_dict(trunk)
    latents, timestep, text, fourier = trunk_inputs()
    ours = model.trunk(latents, timestep, text, fourier)
    theirs = wan(hidden_states=latents, timestep=timestep, encoder_hidden_states=text).sample
    torch.testing.assert_close(ours, theirs, **CLOSE)
    torch.testing.assert_close(ours, number("dit/main_t2v_trunk_b2"), **CLOSE)
    torch.testing.assert_close(ours, number("dit/diffusers_b2"), **CLOSE)


@torch.no_grad()
def test_time_embedding_and_shift_equal_the_reference():
    model = small_model()
    torch.testing.assert_close(timestep_embedding(TIMESTEP, 32), number("dit/main_sinus"), atol=1e-6, rtol=0.0)
    time, _, _ = model.condition_embedder(TIMESTEP, inputs()[2])
    torch.testing.assert_close(time, number("dit/main_times"), **CLOSE)
    shift = model.learnable_proj(number("dit/in/start_frame_latents"), 3)
    torch.testing.assert_close(shift, number("dit/main_proj_conv333"), **CLOSE)


@torch.no_grad()
def test_a_shift_without_reach_in_time_is_the_same_in_every_frame():
    model = small_model(conv3x3x3_proj=False)
    condition = tensor("condition", (1, 16, 1, 8, 12))
    shift = model.learnable_proj(condition, 3)
    assert torch.equal(shift, model.learnable_proj.proj(condition.repeat(1, 1, 3, 1, 1)))


def test_the_new_layers_start_as_if_they_were_not_there():
    torch.manual_seed(0)
    model = FlashI2VTransformer3DModel(**SMALL)
    condition = torch.randn(1, 16, 1, 8, 12)
    assert (model.learnable_proj(condition, 3) == 0).all()
    latents, timestep, text, other = (x[:1] for x in inputs())
    torch.nn.init.xavier_uniform_(model.proj_out.weight)  # a zero head would hide everything
    without = model(latents, timestep, text, condition).sample
    assert torch.equal(model(latents, timestep, text, other).sample, without)
    assert without.abs().max() > 0


def test_a_bf16_model_computes_its_islands_in_fp32(tmp_path):
    small_model().save_pretrained(tmp_path)
    model = FlashI2VTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert model.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert model.blocks[0].scale_shift_table.dtype == torch.float32
    seen = {}
    model.condition_embedder.time_embedder.register_forward_hook(lambda *a: seen.update(time=a[2].dtype))
    model.blocks[0].norm2.register_forward_hook(lambda *a: seen.update(norm=a[2].dtype))
    model.patch_embedding.register_forward_hook(lambda *a: seen.update(latents=a[1][0]))
    output = model.trunk(*trunk_inputs())
    assert {**seen, "latents": None} == {"time": torch.float32, "norm": torch.bfloat16, "latents": None}
    assert output.dtype == torch.float32
    exact = number("dit/main_b2")
    assert (output - exact).norm() < 0.02 * exact.norm()
    latents, timestep, text, condition = inputs()
    model(latents, timestep, text, condition)
    shifted = latents - model.learnable_proj(condition, 3)  # in fp32: rounded behind the shift
    assert torch.equal(seen["latents"], shifted.to(torch.bfloat16))


def test_saved_and_loaded_is_the_same_model(tmp_path):
    model = small_model(conv3x3x3_proj=False, low_freq_proj=True)
    model.save_pretrained(tmp_path)
    loaded = FlashI2VTransformer3DModel.from_pretrained(tmp_path)
    assert dict(loaded.config)["low_freq_proj"] is True
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))


@pytest.mark.parametrize("strict", [True, False])
def test_a_model_runs_after_it_was_exported(strict):
    rope_tables.__wrapped__.cache_clear()
    model, batch = small_model().eval(), inputs()
    program = torch.export.export(model, batch, strict=strict)
    exported, eager = program.module()(*batch).sample, model(*batch).sample
    torch.testing.assert_close(exported, eager, **CLOSE)
    with FakeTensorMode(allow_non_fake_inputs=True):
        rope_tables((2, 3, 4), 32, torch.device("cpu"))
    assert type(rope_tables((2, 3, 4), 32, torch.device("cpu"))[0]) is Tensor


def test_every_parameter_learns():
    model = small_model()
    model(*inputs()).sample.square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({0: torch.zeros(2, 16, 3, 7, 12)}, "not divisible by the patch"),
        ({3: torch.zeros(2, 16, 3, 8, 12)}, r"condition must be \(2, 16, 1, 8, 12\)"),
        ({1: torch.tensor([1.0])}, "timestep"),
    ],
)
def test_wrong_shapes_are_named(change, words):
    arguments = [change.get(i, value) for i, value in enumerate(inputs())]
    with pytest.raises(ValueError, match=words):
        small_model()(*arguments)


def test_hashed_weights_are_those_of_the_reference():
    """Guards the test's own generator."""
    value = weight("blocks.0.self_attn.q.weight", (96, 96))
    torch.testing.assert_close(value[0, :3], torch.tensor([-0.0750989, -0.0847244, -0.1764133]))


@torch.no_grad()
def test_weights_stored_in_eight_bits_compute_in_sixteen():
    model = small_model().to(torch.bfloat16)
    condition = inputs()[0][:, :, :1]
    exact, shift = model(*inputs()).sample, model.learnable_proj(condition, 3)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert model.blocks[0].attn1.to_q.weight.dtype == torch.float8_e4m3fn
    assert torch.equal(model.learnable_proj(condition, 3), shift)
    assert 0 < (model(*inputs()).sample - exact).norm() < 0.1 * exact.norm()


def test_what_lies_in_the_same_place_is_not_the_same():
    """A view that begins where another does may hold other numbers: its strides tell."""
    model, times = small_model(), torch.tensor([900.0, 100.0])
    calls = (times[:1].expand(2), times, times[:1].expand(2))
    expected = [model.condition_embedder.embed_time(each)[0] for each in calls]
    with conditions_kept(model):
        kept = [model.condition_embedder.embed_time(each)[0] for each in calls]
    for found, wanted in zip(kept, expected):
        assert torch.equal(found, wanted)
    assert not torch.equal(kept[0], kept[1])


@pytest.mark.parametrize("way", ["plain", "compiled", "blocks offloaded", "layers offloaded"])
@torch.no_grad()
def test_what_is_kept_over_the_steps_changes_no_number(way):
    model, cpu = small_model(), torch.device("cpu")
    if way == "compiled":
        model.compile_repeated_blocks()
    elif way == "blocks offloaded":
        model.enable_group_offload(cpu, cpu, offload_type="block_level", num_blocks_per_group=1)
    elif way == "layers offloaded":
        model.enable_group_offload(cpu, cpu, offload_type="leaf_level")
    latents, _, text, condition = inputs()
    calls = []
    for part in (model.blocks[0].attn2.to_k, model.learnable_proj, model.fourier_embedding):
        part.register_forward_hook(lambda *_: calls.append(1))
    with conditions_kept(model):
        for t, prompt in product((900.0, 700.0, 400.0), (text, -text)):  # the same two tensors in every step
            batch = torch.full((2,), t)
            plain = small_model()(latents, batch, prompt, condition).sample
            torch.testing.assert_close(model(latents, batch, prompt, condition).sample, plain, **CLOSE)
            latents = latents - 0.1 * plain
    if way == "compiled":  # a compiled graph tells nobody whom it calls
        return
    assert len(calls) == 2 + 1 + 1
    model(latents, batch, text, condition)
    assert len(calls) == 4 + 3, "nothing is kept behind the run"


@torch.no_grad()
@pytest.mark.parametrize("sigma", [1.0, 0.6, 0.2])
@pytest.mark.parametrize("conv3x3x3_proj", [True, False])
def test_from_still_start_values_a_video_stays_as_its_first_frame(conv3x3x3_proj, sigma):
    torch.manual_seed(0)
    model = FlashI2VTransformer3DModel(
        num_attention_heads=4, attention_head_dim=24, text_dim=16, freq_dim=32, ffn_dim=64, num_layers=2, text_len=4,
        conv3x3x3_proj=conv3x3x3_proj,
    )  # fmt: skip
    condition, text, noise = torch.randn(2, 16, 1, 8, 12), torch.randn(2, 4, 16), torch.randn(2, 16, 3, 8, 12)
    noisy, timestep = sigma * noise + (1 - sigma) * condition, torch.full((2,), 1000 * sigma)
    errors = []
    for start in (model.reset_parameters, model.start_still):
        start()
        velocity = model(noisy, timestep, text, condition).sample
        errors.append((velocity - (noise - condition)).square().mean().item())
    assert errors[0] > 1.9  # it predicts nothing
    assert errors[1] < 0.15
    torch.testing.assert_close(model.learnable_proj(condition, 3), condition.expand(-1, -1, 3, -1, -1))


@torch.no_grad()
def test_from_still_start_values_tokens_attend_to_near_ones_in_all_frames():
    torch.manual_seed(0)
    model = FlashI2VTransformer3DModel(
        patch_size=(1, 1, 1), num_attention_heads=2, attention_head_dim=24, text_dim=16, freq_dim=32, ffn_dim=64,
        num_layers=1, text_len=4,
    )  # fmt: skip
    model.start_still()
    grid = (3, 1, 8)
    attention, rope = model.blocks[0].attn1, rope_tables(grid, 24, torch.device("cpu"))
    query, key, _ = attention.all_of(torch.randn(64, 24, 48))
    query, key = apply_rope(query, *rope), apply_rope(key, *rope)
    weights = (torch.einsum("bnkd,bmkd->bknm", query, key) / 24**0.5).softmax(-1).mean((0, 1))
    from_first = weights.unflatten(1, (3, 8))[0]  # (F, W), of the token at the upper left
    for frame in from_first:
        assert frame[0] > 1.2 * frame[1] > 1.2 * 1.2 * frame[2]
    torch.testing.assert_close(from_first.sum(1), torch.full((3,), 1 / 3), atol=0.03, rtol=0)


def test_what_leaves_the_network_is_no_view_of_what_it_computed():
    model = FlashI2VTransformer3DModel(
        patch_size=(1, 1, 1), num_attention_heads=1, attention_head_dim=24, num_layers=1, ffn_dim=8
    )
    velocity = model.project(torch.randn(2, 12, 24), torch.randn(2, 24), (3, 2, 2))
    assert velocity.shape == (2, 16, 3, 2, 2)
    assert not velocity._is_view()  # what FSDP2 asks


def test_still_start_values_need_tokens_that_hold_a_patch():
    narrow = FlashI2VTransformer3DModel(num_attention_heads=2, attention_head_dim=16, num_layers=1, ffn_dim=8)
    with pytest.raises(ValueError, match="64 numbers of a patch do not pass through tokens of 32 channels"):
        narrow.start_still()
