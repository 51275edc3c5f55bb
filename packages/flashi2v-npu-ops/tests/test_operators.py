"""Every backend of this device against its reference, forward and backward, and the contracts of all operators.

FLASHI2V_TEST_DEVICE names the device: cpu unless it is set, npu for `nox -s npu`.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from operator_cases import TOLERANCE, attention_mask, normal, operator_cases, rope_tables
from torch.testing import assert_close

from flashi2v_npu_ops import (
    UnsupportedError,
    apply_rope,
    attention,
    backends,
    gated_residual,
    gelu_tanh,
    layer_norm_modulate,
    registry,
    rms_norm,
    split_frequencies,
    use_backend,
)
from flashi2v_npu_ops.backends import half_spectrum
from flashi2v_npu_ops.device import resolve_device

GOLDEN = np.load(Path(__file__).with_name("golden_fourier.npz"))
DEVICE = resolve_device(os.environ.get("FLASHI2V_TEST_DEVICE", "cpu")).type


def golden(name: str) -> torch.Tensor:
    return torch.from_numpy(GOLDEN[name]).to(DEVICE)


def golden_cutoff(name: str) -> torch.Tensor:
    """The radius that was cut at, whose square is whole: the file holds fp32 roots, whose last bit is its CPU's."""
    exact = golden(name).cpu().double().square().round().sqrt()  # on an NPU there is no fp64
    return exact.float().to(DEVICE)


def on_device(operator: str) -> list[str]:
    """The backends to test on this device; the reference is compared with, and runs on the CPU."""
    names = [name for name in backends(operator) if registry.all_backends()[name].is_for(DEVICE)]
    if operator == "attention":
        names.remove("bf16")  # which has another tolerance, and a test of its own
    if DEVICE != "cpu":
        names.remove("reference")
    if DEVICE == "npu" and operator == "split_frequencies":
        names.remove("torch")  # its FFT is not for NPUs
    return names


CUDA = ("cuda", "cudnn", "flash3")
CASES = [
    pytest.param(name, backend, dtype, id=f"{name}-{backend}-{dtype}")
    for dtype in TOLERANCE
    for name, case in operator_cases(dtype).items()
    for backend in (*on_device(case.operator), "auto")
    if backend != "reference"
]


@pytest.mark.parametrize(("name", "backend", "dtype"), CASES)
def test_backend_equals_the_reference_forward_and_backward(name, backend, dtype):
    results = {}
    for which, device in (("reference", "cpu"), (backend, DEVICE)):
        case = operator_cases(dtype, device)[name]
        try:
            out = case.call(which)
        except UnsupportedError as limit:
            if which not in ("ascend", *CUDA) and (which, DEVICE) != ("torch", "npu"):
                raise
            pytest.skip(str(limit))  # a limit of the kernel; "auto", which this test runs too, goes to the next backend
        cotangent = normal(*out.shape, dtype=dtype, device=device, seed=9)
        results[which] = [part.cpu() for part in (out, *torch.autograd.grad(out, case.inputs, cotangent))]
        assert out.dtype == dtype
    for ours, reference in zip(results[backend], results["reference"]):
        assert_close(ours, reference, **TOLERANCE[dtype])


def test_there_is_a_case_for_every_operator():
    assert {case.operator for case in operator_cases(torch.float32).values()} == {*registry.operators()}


@pytest.mark.parametrize("name", operator_cases(torch.float32))
def test_operator_is_one_graph_when_compiled(name):
    case = operator_cases(torch.float32, DEVICE)[name]
    torch._dynamo.reset()
    compiled = torch.compile(lambda: case.call("auto"), fullgraph=True, backend="aot_eager")
    out, expected = compiled(), case.call("auto")
    assert_close(out, expected)
    cotangent = normal(*out.shape, device=DEVICE, seed=9)
    for ours, eager in zip(*(torch.autograd.grad(result, case.inputs, cotangent) for result in (out, expected))):
        assert_close(ours, eager)


def test_one_graph_serves_several_lengths_and_batches():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: attention(x, x, gelu_tanh(x)), fullgraph=True, backend="eager", dynamic=True)
    for batch, length in ((2, 7), (3, 9), (5, 11)):
        x = normal(batch, length, 3, 8, device=DEVICE)
        with torch.compiler.set_stance("default" if batch == 2 else "fail_on_recompile"):
            assert_close(compiled(x), attention(x, x, gelu_tanh(x)))


@pytest.mark.skipif(DEVICE == "npu", reason="inductor has no NPU backend of its own")
def test_inductor_compiles_a_block_of_operators():
    x, gate = normal(2, 7, 24, device=DEVICE), normal(2, 1, 24, device=DEVICE, seed=1)
    tables = rope_tables(7, 8, DEVICE)

    def block(x):
        heads = apply_rope(layer_norm_modulate(x, gate, gate, 1e-6).unflatten(-1, (3, 8)), *tables)
        return gated_residual(x, gelu_tanh(attention(heads, heads, heads).flatten(-2)), gate)

    assert_close(torch.compile(block, fullgraph=True)(x), block(x), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", operator_cases(torch.float32))
def test_a_freed_graph_cannot_be_used_again_and_a_retained_one_can(name):
    case = operator_cases(torch.float32, DEVICE)[name]
    out = case.call("auto").sum()
    first = torch.autograd.grad(out, case.inputs, retain_graph=True)
    second = torch.autograd.grad(out, case.inputs)
    for ours, again in zip(first, second):
        assert torch.equal(ours, again)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, case.inputs)


@pytest.mark.skipif(DEVICE != "cpu", reason="fp64 is for the CPU")
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", operator_cases(torch.float64))
def test_backend_passes_gradcheck_in_fp64(name, backend):
    case = operator_cases(torch.float64)[name]
    assert torch.autograd.gradcheck(lambda *inputs: case.call(backend), case.inputs)


def test_attention_equals_a_loop_over_heads_and_queries():
    q, k, v = normal(1, 3, 2, 4), normal(1, 5, 2, 4, seed=1), normal(1, 5, 2, 4, seed=2)
    out = attention(q, k, v, backend="reference")
    for head in range(2):
        for i in range(3):
            weights = torch.softmax(k[0, :, head] @ q[0, i, head] / 2.0, 0)
            assert_close(out[0, i, head], weights @ v[0, :, head])


@pytest.mark.parametrize("backend", [name for name in on_device("attention") if name not in CUDA])
def test_a_query_that_attends_to_nothing_gets_zeros_and_finite_gradients(backend):
    q, k = normal(2, 7, 3, 8, device=DEVICE), normal(2, 5, 3, 8, device=DEVICE)
    out = attention(q, k, k, mask=attention_mask(DEVICE), backend=backend)
    assert (out[0, 2] == 0).all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), (q, k)))


@pytest.mark.parametrize("backend", [name for name in on_device("attention") if name not in CUDA])
def test_true_in_the_mask_means_attend(backend):
    q, v = normal(1, 2, 1, 8, device=DEVICE), normal(1, 2, 1, 8, device=DEVICE, seed=1)
    only_first = torch.tensor([[True, False], [True, False]], device=DEVICE)
    assert_close(attention(q, q, v, mask=only_first, backend=backend), v[:, :1].expand(1, 2, 1, 8))


@pytest.mark.parametrize("name", [name for name in operator_cases(torch.float32) if name.endswith(" attention")])
def test_attention_in_bf16_rounds_what_it_is_given_and_returns_fp32(name):
    case = operator_cases(torch.float32, DEVICE)[name]
    exact, rounded = case.call("auto"), case.call("bf16")
    assert rounded.dtype == torch.float32
    gradients = [torch.autograd.grad(out.square().sum(), case.inputs) for out in (exact, rounded)]
    for ours, theirs in ((rounded, exact), *zip(gradients[1], gradients[0])):
        assert 1e-4 < (ours - theirs).norm() / theirs.norm() < 1e-2
    torch._dynamo.reset()
    compiled = torch.compile(lambda: case.call("bf16"), fullgraph=True, backend="aot_eager")
    assert_close(compiled(), rounded)


def test_attention_in_bf16_is_refused_where_it_has_no_effect_and_never_calls_itself():
    q = normal(1, 4, 2, 8, device=DEVICE)
    with pytest.raises(UnsupportedError, match=r"rounds fp32 to bf16, and got torch.bfloat16"):
        attention(*[q.bfloat16()] * 3, backend="bf16")
    plain = attention(q, q, q, backend="bf16")
    with use_backend("attention", "bf16"):
        assert torch.equal(attention(q, q, q), plain)


@pytest.mark.skipif(DEVICE != "cpu", reason="of the kernel for CPUs")
@pytest.mark.parametrize(("queries", "keys"), [(200, 600), (720, 32)])
def test_gradients_of_short_attention_in_bf16_round_only_what_is_given_and_returned(queries, keys):
    given = [normal(2, length, 2, 64, seed=length, dtype=torch.bfloat16) for length in (queries, keys, keys)]
    upstream = normal(2, queries, 2, 64, seed=7, dtype=torch.bfloat16)
    results = []
    for dtype, backend in ((torch.bfloat16, "torch"), (torch.float64, "reference")):
        leaves = [x.detach().to(dtype).requires_grad_() for x in given]
        out = attention(*leaves, backend=backend)
        results.append([out, *torch.autograd.grad(out, leaves, upstream.to(dtype))])
    for ours, exact in zip(*results):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - exact).norm() < 0.002 * exact.norm()  # in bf16 throughout it is 0.0025 to 0.005


def test_rope_is_the_complex_product_of_adjacent_pairs():
    x = normal(2, 6, 3, 8)
    cos, sin = rope_tables(6, 8)
    turned = torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.complex(cos, sin)[None, :, None]
    assert_close(apply_rope(x, cos, sin, backend="reference"), torch.view_as_real(turned).flatten(-2))


def test_rope_takes_a_tensor_that_is_not_contiguous():
    x = normal(2, 3, 6, 9).transpose(1, 2)[..., 1:]  # (2, 6, 3, 8), odd offset and strides
    tables = rope_tables(6, 8)
    assert_close(apply_rope(x, *tables, backend="torch"), apply_rope(x, *tables, backend="reference"))


def test_mixed_precision_rms_norm_rounds_once():
    x, weight = normal(4, 16, dtype=torch.bfloat16), normal(16)
    exact = torch.nn.functional.rms_norm(x.double(), (16,), weight.double(), 1e-6)
    for backend in ("torch", "reference"):
        assert torch.equal(rms_norm(x, weight, 1e-6, backend=backend), exact.to(torch.bfloat16))


def test_modulation_in_bf16_is_computed_in_fp32():
    x, shift, scale = normal(2, 7, 24, dtype=torch.bfloat16), normal(2, 1, 24, seed=1), normal(2, 1, 24, seed=2)
    exact = torch.nn.functional.layer_norm(x.double(), (24,), eps=1e-6) * (1 + scale.double()) + shift.double()
    for backend in ("torch", "reference"):
        ours = layer_norm_modulate(x, shift, scale, 1e-6, backend=backend)
        assert torch.equal(ours, exact.to(torch.bfloat16))


def test_gated_residual_in_bf16_rounds_once():
    x, update, gate = normal(2, 7, 24, dtype=torch.bfloat16), normal(2, 7, 24, seed=1), normal(2, 1, 24, seed=2)
    exact = (x.double() + gate.double() * update.double()).to(torch.bfloat16)
    for backend in ("torch", "reference"):
        assert torch.equal(gated_residual(x, update, gate, backend=backend), exact)


@pytest.mark.parametrize("backend", on_device("split_frequencies"))
@pytest.mark.parametrize("ratio", ["0.0", "0.05", "0.1", "0.5", "0.95", "1.0"])
@pytest.mark.parametrize("magnitude", [True, False])
def test_frequency_split_equals_the_golden_numbers(ratio, magnitude, backend):
    high, low, cutoff = split_frequencies(golden("odd/x"), float(ratio), magnitude=magnitude, backend=backend)
    assert torch.equal(cutoff, golden_cutoff(f"odd/cutoff_{ratio}"))
    assert_close(high, golden(f"odd/high_{ratio}_abs{int(magnitude)}"), atol=1e-5, rtol=0)
    assert_close(low, golden(f"odd/low_{ratio}"), atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", on_device("split_frequencies"))
def test_every_sample_has_its_own_ratio_and_cutoff(backend):
    high, low, cutoff = split_frequencies(golden("noise/x"), torch.tensor([0.1, 0.95]), backend=backend)
    assert torch.equal(
        cutoff, torch.stack([golden_cutoff("noise/cutoff_0.1")[0], golden_cutoff("noise/cutoff_0.95")[1]])
    )
    assert_close(high[0], golden("noise/high_0.1_abs1")[0], atol=1e-5, rtol=0)
    assert_close(low[0], golden("noise/low_0.1")[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", on_device("split_frequencies"))
@pytest.mark.parametrize("size", [(60, 104), (1, 1), (1, 6), (5, 2), (16, 16)])
def test_cutoff_equals_the_reference_at_every_ratio_and_size(size, backend):
    latent = normal(2, 3, *size).detach()
    for ratio in np.linspace(0, 1, 41):
        exact = split_frequencies(latent, float(ratio), backend="reference")
        ours = [part.cpu() for part in split_frequencies(latent.to(DEVICE), float(ratio), backend=backend)]
        assert torch.equal(ours[2], exact[2])
        assert_close(ours[0], exact[0], atol=1e-5, rtol=0)
        assert_close(ours[1], exact[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", on_device("split_frequencies"))
def test_a_flat_image_is_all_high_pass(backend):
    high, low, cutoff = split_frequencies(torch.full((1, 2, 6, 8), 3.0, device=DEVICE), 0.5, backend=backend)
    assert cutoff.item() == 0
    assert_close(high, torch.full_like(high, 3.0))
    assert_close(low, torch.zeros_like(low))


def test_real_high_and_low_add_up_to_the_image():
    x = normal(2, 3, 9, 6)
    high, low, _ = split_frequencies(x, 0.4, magnitude=False, backend="reference")
    assert_close(high + low, x)


@pytest.mark.skipif(DEVICE != "cpu", reason="fp64 is for the CPU")
@pytest.mark.parametrize("magnitude", [True, False])
def test_the_split_can_be_differentiated_twice(magnitude):
    x = normal(1, 2, 5, 6, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda x: split_frequencies(x, 0.3, magnitude=magnitude)[:2], x)


def test_a_ratio_that_is_being_trained_gets_no_gradient_and_does_no_harm():
    x, ratio = normal(1, 2, 5, 6, device=DEVICE), torch.tensor(0.3, requires_grad=True)
    high, _, _ = split_frequencies(x, ratio)
    assert torch.autograd.grad(high.sum(), (x, ratio), allow_unused=True)[1] is None


@pytest.mark.parametrize("name", operator_cases(torch.float32))
def test_autocast_does_not_lower_the_precision_of_an_operator(name):
    case = operator_cases(torch.float32, DEVICE)[name]
    exact = case.call("auto")
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = case.call("auto")
    assert out.dtype == torch.float32
    assert torch.equal(out, exact)


def test_half_precision_latents_are_split_in_fp32():
    x = golden("noise/x").bfloat16()
    high, _, cutoff = split_frequencies(x, 0.1)
    exact, _, exact_cutoff = split_frequencies(x.float(), 0.1)
    assert high.dtype == torch.bfloat16
    assert torch.equal(high, exact.bfloat16())
    assert torch.equal(cutoff, exact_cutoff)


def test_tables_of_the_split_are_shared_and_bounded():
    half_spectrum._order_table.__wrapped__.cache_clear()
    for width in range(2, 2 + 2 * half_spectrum._NUM_TABLES):
        split_frequencies(torch.ones(1, 1, 4, width, device=DEVICE), 0.5)
        split_frequencies(torch.ones(1, 1, 4, width, device=DEVICE), 0.5)
    info = half_spectrum._order_table.__wrapped__.cache_info()
    assert info.hits == 2 * half_spectrum._NUM_TABLES
    assert info.currsize == half_spectrum._NUM_TABLES


def test_tables_made_while_sampling_serve_a_training_step():
    half_spectrum._order_table.__wrapped__.cache_clear()
    with torch.inference_mode():
        split_frequencies(torch.ones(1, 1, 4, 6), 0.5, backend="torch")
    x = normal(1, 1, 4, 6)
    high, _, _ = split_frequencies(x, 0.5, backend="torch")
    assert torch.autograd.grad(high.sum(), x)[0].isfinite().all()


def test_a_fake_tensor_leaves_no_fake_table_behind():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        high, low, cutoff = split_frequencies(torch.ones(2, 1, 4, 30), 0.5)
        assert (high.shape, low.shape, cutoff.shape) == ((2, 1, 4, 30), (2, 1, 4, 30), (2,))
    assert type(split_frequencies(torch.ones(2, 1, 4, 30), 0.5)[0]) is torch.Tensor


def test_a_compiled_split_refuses_a_ratio_outside_its_range_when_it_runs():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, r: split_frequencies(x, r)[0], fullgraph=True, backend="eager")
    x = torch.ones(1, 2, 4, 4, device=DEVICE)
    assert compiled(x, torch.tensor(0.5)).shape == x.shape
    with pytest.raises(ValueError, match=r"ratio must lie in \[0, 1\], got 1.5"):
        compiled(x, torch.tensor(1.5))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: attention(normal(2, 3, 4), normal(2, 3, 4), normal(2, 3, 4)), "B, N, K, d"),
        (lambda: attention(normal(1, 3, 2, 4), normal(1, 3, 1, 4), normal(1, 3, 1, 4)), "heads"),
        (lambda: attention(normal(1, 3, 2, 4), *[normal(1, 3, 2, 4).half()] * 2), "dtype"),
        (lambda: attention(*[normal(1, 3, 2, 4)] * 3, mask=torch.ones(3, 3)), "boolean"),
        (lambda: attention(*[normal(1, 3, 2, 4)] * 3, mask=torch.ones(5, 3, dtype=torch.bool)), "broadcast"),
        (lambda: rms_norm(normal(2, 4), normal(5), 1e-6), r"\(5,\)"),
        (lambda: apply_rope(normal(1, 3, 2, 4), *rope_tables(2, 4)), r"\(3, 2\)"),
        (lambda: apply_rope(normal(1, 3, 2, 3), *rope_tables(3, 3)), "even d"),
        (lambda: layer_norm_modulate(normal(2, 3, 4), normal(2, 1, 4), normal(1, 1, 4), 1e-6), r"\(1, 1, 4\)"),
        (lambda: layer_norm_modulate(normal(2, 3, 4), *[normal(2, 1, 1)] * 2, 1e-6), r"\(2, 1, 1\)"),
        (lambda: gated_residual(normal(2, 3, 4), normal(2, 1, 4), normal(2, 1, 4)), r"\(2, 1, 4\)"),
        (lambda: gated_residual(normal(2, 3, 4), normal(2, 3, 4), normal(3, 1, 4)), r"\(3, 1, 4\)"),
        (lambda: split_frequencies(normal(2, 4, 4), 0.5), "B, C, H, W"),
        (lambda: split_frequencies(torch.ones(0, 2, 4, 4), 0.5), "none of them 0"),
        (lambda: split_frequencies(torch.ones(1, 2, 4, 4, dtype=torch.int64), 0.5), "int64"),
        (lambda: gelu_tanh(torch.arange(3)), "int64"),
        (lambda: split_frequencies(normal(1, 2, 4, 4), 1.5), "1.5"),
        (lambda: split_frequencies(normal(1, 2, 4, 4), float("nan")), "nan"),
        (lambda: split_frequencies(normal(2, 2, 4, 4), torch.tensor([0.1, -0.2])), "-0.2"),
        (lambda: split_frequencies(normal(2, 2, 4, 4), torch.tensor([0.1, 0.2, 0.3])), r"\(3,\)"),
    ],
)
def test_wrong_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
