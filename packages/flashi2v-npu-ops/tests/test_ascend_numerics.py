"""The numbers of the `ascend` backend, with torch_npu's operators replaced by what their pages say they compute."""

import importlib.util

import pytest
import torch
from operator_cases import TOLERANCE, attention_mask, normal, operator_cases, rope_tables
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flashi2v_npu_ops import (
    UnsupportedError,
    apply_rope,
    attention,
    explain,
    fourier,
    registry,
    rms_norm,
    split_frequencies,
)

if importlib.util.find_spec("torch_npu") is not None:
    pytest.skip("the real torch_npu is installed, whose names emulations would take", allow_module_level=True)

import emulated_npu

# What each operator must have run on; None: CANN has no operator of its own for it.
KERNELS = {
    "attention": "npu_fusion_attention",
    "rms_norm": "npu_rms_norm",
    "apply_rope": "npu_rotary_mul",
    "gelu_tanh": "npu_gelu",
    "layer_norm_modulate": None,
    "gated_residual": None,
    "split_frequencies": None,
}


@pytest.fixture(autouse=True)
def cpu_as_npu(monkeypatch):
    """Let the `ascend` backend serve CPU tensors."""
    monkeypatch.setattr(registry, "_MADE_FOR", {"cuda": "cuda"})
    registry._choose_once.cache_clear()
    emulated_npu.calls.clear()
    yield
    registry._choose_once.cache_clear()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", operator_cases(torch.float32))
def test_ascend_equals_the_reference_forward_and_backward(name, dtype):
    case = operator_cases(dtype)[name]
    results = {}
    for backend in ("reference", "ascend"):
        out = case.call(backend)
        assert out.dtype == dtype
        results[backend] = (out, *torch.autograd.grad(out, case.inputs, normal(*out.shape, dtype=dtype, seed=9)))
    for ours, reference in zip(results["ascend"], results["reference"]):
        assert_close(ours, reference, **TOLERANCE[dtype])
    kernel = KERNELS[case.operator]
    assert emulated_npu.calls == ([] if kernel is None else [kernel])


def test_auto_prefers_the_npu_kernel():
    attention(*[normal(1, 3, 2, 8)] * 3)
    assert emulated_npu.calls == ["npu_fusion_attention"]


def test_a_query_that_attends_to_nothing_gets_zeros_and_gives_no_gradient():
    q, k, v = normal(2, 7, 3, 8), normal(2, 5, 3, 8), normal(2, 5, 3, 8, seed=1)
    out = attention(q, k, v, mask=attention_mask(), backend="ascend")
    assert (out[0, 2] == 0).all()
    gradients = torch.autograd.grad(out[0, 2].sum(), (q, k, v))
    assert all((grad == 0).all() for grad in gradients)


def test_rope_keeps_its_tables_in_fp32_for_half_precision():
    x, (cos, sin) = normal(1, 64, 2, 128, dtype=torch.bfloat16), rope_tables(64, 128)
    assert torch.equal(apply_rope(x, cos, sin, backend="ascend"), apply_rope(x, cos, sin, backend="reference"))


def test_rms_norm_with_a_weight_that_the_kernel_refuses_is_converted():
    x, weight = normal(3, 8), normal(8, dtype=torch.bfloat16)
    assert_close(rms_norm(x, weight, 1e-6, backend="ascend"), rms_norm(x, weight, 1e-6, backend="reference"))


class WatchForUnsupported(TorchDispatchMode):
    """Fails at what some NPUs and CANN versions lack or do slowly, and counts what it saw."""

    seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "fft" not in str(func)
        assert func._opname not in ("sort", "argsort", "topk")
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            assert not tensor.is_complex()
            assert tensor.dtype != torch.float64
        self.seen += 1
        return out


@pytest.mark.parametrize("size", [(60, 104), (9, 7), (1, 1), (2, 5)])
def test_the_split_needs_neither_fft_nor_complex_numbers_nor_fp64_nor_a_sort(size):
    latent, ratio = normal(2, 3, *size).detach(), torch.tensor([0.3, 0.7])
    exact_high, exact_low, exact_cutoff = split_frequencies(latent, ratio, magnitude=False, backend="reference")
    split_frequencies(latent, ratio, backend="ascend")  # makes the tables, on the host
    with WatchForUnsupported() as watch:
        low, keep, cutoff = fourier.low_pass_share(fourier.REAL_DFT, latent, ratio)
        fourier.low_pass(fourier.REAL_DFT, latent, keep)
    assert watch.seen > 30
    assert torch.equal(cutoff, exact_cutoff)
    assert_close(low, exact_low, atol=1e-5, rtol=0)
    assert_close(latent - low, exact_high, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("operator", "case", "words"),
    [
        ("attention", ("npu", torch.float64, True, 128, True, False), "float64"),
        ("attention", ("npu", torch.bfloat16, True, None, True, False), "768"),
        ("attention", ("npu", torch.bfloat16, False, 128, True, False), "256 heads"),
        ("apply_rope", ("npu", torch.bfloat16, False, True), "1000"),
        ("apply_rope", ("npu", torch.bfloat16, True, False), "896"),
        ("gelu_tanh", ("npu", torch.float64), "float64"),
    ],
)
def test_limits_of_the_kernels_are_named_and_auto_goes_on(operator, case, words):
    with pytest.raises(UnsupportedError, match=words):
        explain(operator, case, "ascend")
    choice = explain(operator, case)
    assert choice.backend == ("reference" if operator == "apply_rope" else "torch")  # no complex numbers on an NPU
    assert words in choice.passed_over["ascend"]


def test_a_wrong_argument_name_fails_as_it_would_on_an_npu():
    with pytest.raises(RuntimeError, match="eps"):
        torch.ops.npu.npu_rms_norm(torch.ones(2), torch.ones(2), eps=1e-6)


@pytest.mark.parametrize("schema", emulated_npu.SCHEMAS[emulated_npu.OLDEST])
def test_whatever_fits_the_oldest_schema_fits_the_newest(schema):
    old = torch._C.parse_schema(schema)
    (new,) = (
        parsed
        for parsed in map(torch._C.parse_schema, emulated_npu.SCHEMAS[emulated_npu.NEWEST])
        if parsed.name == old.name
    )
    described = [
        [(a.name, str(a.type), a.default_value, a.kwarg_only) for a in schema.arguments] for schema in (old, new)
    ]
    assert described[1][: len(described[0])] == described[0]
    assert all(argument.has_default_value() for argument in new.arguments[len(old.arguments) :])
    assert [str(result.type) for result in old.returns] == [str(result.type) for result in new.returns]
