"""Every backend of every operator against its reference, forward and backward."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from flashi2v_npu_ops import apply_rope, attention, backends, rms_norm, split_frequencies

GOLDEN = np.load(Path(__file__).with_name("golden_fourier.npz"))
TOLERANCE = {torch.float32: {"atol": 2e-5, "rtol": 1e-4}, torch.bfloat16: {"atol": 2e-2, "rtol": 2e-2}}


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def rope_tables(num_tokens: int, head_dim: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(num_tokens).double()[:, None] * 0.7 ** torch.arange(head_dim // 2).double()
    return angles.cos().float(), angles.sin().float()


def cases(dtype: torch.dtype):
    """(operator, call of a backend, the tensors whose gradients count)"""
    q, k, v = (
        normal(2, 7, 3, 8, dtype=dtype),
        normal(2, 5, 3, 8, dtype=dtype, seed=1),
        normal(2, 5, 3, 8, dtype=dtype, seed=2),
    )
    mask = torch.rand(2, 1, 7, 5, generator=torch.Generator().manual_seed(3)) > 0.4
    mask[0, :, 2] = False
    x, weight = normal(2, 7, 24, dtype=dtype), normal(24, dtype=dtype, seed=1)
    cos, sin = rope_tables(7, 8)
    return {
        "self attention": ("attention", lambda b: attention(q, q, q, backend=b), [q]),
        "cross attention": ("attention", lambda b: attention(q, k, v, scale=0.3, backend=b), [q, k, v]),
        "masked attention": ("attention", lambda b: attention(q, k, v, mask=mask, backend=b), [q, k, v]),
        "rms_norm": ("rms_norm", lambda b: rms_norm(x, weight, 1e-6, backend=b), [x, weight]),
        "apply_rope": ("apply_rope", lambda b: apply_rope(q, cos, sin, backend=b), [q]),
    }


CASES = [
    pytest.param(name, backend, dtype, id=f"{name}-{backend}-{dtype}")
    for dtype in TOLERANCE
    for name, (operator, _, _) in cases(dtype).items()
    for backend in (*backends(operator), "auto")
    if backend in ("torch", "auto")
]


@pytest.mark.parametrize(("name", "backend", "dtype"), CASES)
def test_backend_equals_the_reference_forward_and_backward(name, backend, dtype):
    _, call, inputs = cases(dtype)[name]
    results = {}
    for which in ("reference", backend):
        out = call(which)
        cotangent = normal(*out.shape, dtype=dtype, seed=9)
        results[which] = (out, *torch.autograd.grad(out, inputs, cotangent))
        assert out.dtype == dtype
    for ours, reference in zip(results[backend], results["reference"]):
        assert_close(ours, reference, **TOLERANCE[dtype])


def test_attention_equals_a_loop_over_heads_and_queries():
    q, k, v = normal(1, 3, 2, 4), normal(1, 5, 2, 4, seed=1), normal(1, 5, 2, 4, seed=2)
    out = attention(q, k, v, backend="reference")
    for head in range(2):
        for i in range(3):
            weights = torch.softmax(k[0, :, head] @ q[0, i, head] / 2.0, 0)
            assert_close(out[0, i, head], weights @ v[0, :, head])


@pytest.mark.parametrize("backend", backends("attention"))
def test_a_query_that_attends_to_nothing_gets_zeros_and_finite_gradients(backend):
    q = normal(1, 2, 1, 4)
    mask = torch.tensor([[True, True], [False, False]])
    out = attention(q, q, q, mask=mask, backend=backend)
    assert (out[0, 1] == 0).all()
    assert torch.autograd.grad(out.sum(), q)[0].isfinite().all()


@pytest.mark.parametrize("backend", backends("attention"))
def test_true_in_the_mask_means_attend(backend):
    q, v = normal(1, 2, 1, 4), normal(1, 2, 1, 4, seed=1)
    only_first = torch.tensor([[True, False], [True, False]])
    assert_close(attention(q, q, v, mask=only_first, backend=backend), v[:, :1].expand(1, 2, 1, 4))


def test_rope_is_the_complex_product_of_adjacent_pairs():
    x = normal(2, 6, 3, 8)
    cos, sin = rope_tables(6, 8)
    turned = torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.complex(cos, sin)[None, :, None]
    assert_close(apply_rope(x, cos, sin), torch.view_as_real(turned).flatten(-2))


def test_mixed_precision_rms_norm_rounds_once():
    x, weight = normal(4, 16, dtype=torch.bfloat16), normal(16)
    exact = torch.nn.functional.rms_norm(x.double(), (16,), weight.double(), 1e-6)
    assert torch.equal(rms_norm(x, weight, 1e-6), exact.to(torch.bfloat16))


@pytest.mark.parametrize("ratio", ["0.0", "0.05", "0.1", "0.5", "0.95", "1.0"])
@pytest.mark.parametrize("magnitude", [True, False])
def test_frequency_split_equals_the_golden_numbers(ratio, magnitude):
    x = torch.from_numpy(GOLDEN["odd/x"])
    high, low, cutoff = split_frequencies(x, float(ratio), magnitude=magnitude)
    assert cutoff.tolist() == GOLDEN[f"odd/cutoff_{ratio}"].tolist()
    assert_close(high, torch.from_numpy(GOLDEN[f"odd/high_{ratio}_abs{int(magnitude)}"]), atol=1e-5, rtol=0)
    assert_close(low, torch.from_numpy(GOLDEN[f"odd/low_{ratio}"]), atol=1e-5, rtol=0)


def test_every_sample_has_its_own_ratio_and_cutoff():
    x = torch.from_numpy(GOLDEN["noise/x"])
    high, low, cutoff = split_frequencies(x, torch.tensor([0.1, 0.95]))
    assert cutoff.tolist() == [GOLDEN["noise/cutoff_0.1"][0], GOLDEN["noise/cutoff_0.95"][1]]
    assert_close(high[0], torch.from_numpy(GOLDEN["noise/high_0.1_abs1"][0]), atol=1e-5, rtol=0)
    assert_close(low[0], torch.from_numpy(GOLDEN["noise/low_0.1"][0]), atol=1e-5, rtol=0)


def test_real_high_and_low_add_up_to_the_image():
    x = normal(2, 3, 9, 6)
    high, low, _ = split_frequencies(x, 0.4, magnitude=False)
    assert_close(high + low, x)


def test_half_precision_latents_are_split_in_fp32():
    x = torch.from_numpy(GOLDEN["noise/x"]).bfloat16()
    high, _, cutoff = split_frequencies(x, 0.1)
    exact, _, exact_cutoff = split_frequencies(x.float(), 0.1)
    assert high.dtype == torch.bfloat16
    assert torch.equal(high, exact.bfloat16())
    assert torch.equal(cutoff, exact_cutoff)


def test_references_pass_gradcheck_in_fp64():
    q, w = normal(1, 3, 2, 4, dtype=torch.float64), normal(4, dtype=torch.float64, seed=1)
    q, w = q.detach().requires_grad_(), w.detach().requires_grad_()
    cos, sin = rope_tables(3, 4)
    assert torch.autograd.gradcheck(lambda q: attention(q, q, q, backend="reference"), q)
    assert torch.autograd.gradcheck(lambda q, w: rms_norm(q, w, 1e-6, backend="reference"), (q, w))
    assert torch.autograd.gradcheck(lambda q: apply_rope(q, cos.double(), sin.double(), backend="reference"), q)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: attention(normal(2, 3, 4), normal(2, 3, 4), normal(2, 3, 4)), "B, N, K, d"),
        (lambda: attention(normal(1, 3, 2, 4), normal(1, 3, 1, 4), normal(1, 3, 1, 4)), "heads"),
        (lambda: attention(*[normal(1, 3, 2, 4)] * 3, mask=torch.ones(3, 3)), "boolean"),
        (lambda: attention(*[normal(1, 3, 2, 4)] * 3, mask=torch.ones(5, 3, dtype=torch.bool)), "broadcast"),
        (lambda: rms_norm(normal(2, 4), normal(5), 1e-6), r"\(5,\)"),
        (lambda: apply_rope(normal(1, 3, 2, 4), *rope_tables(2, 4)), r"\(3, 2\)"),
        (lambda: split_frequencies(normal(1, 2, 4, 4), 1.5), "1.5"),
        (lambda: split_frequencies(normal(2, 2, 4, 4), torch.tensor([0.1, 0.2, 0.3])), r"\(3,\)"),
    ],
)
def test_wrong_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
