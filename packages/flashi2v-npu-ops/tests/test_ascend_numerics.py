"""The numbers of the `ascend` backend, with torch_npu's operators replaced by what their pages say they compute."""

import importlib.util
import sys

import pytest
import torch
from operator_cases import TOLERANCE, attention_mask, normal, operator_cases, rope_tables
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flashi2v_npu_ops import (
    Case,
    UnsupportedError,
    apply_rope,
    attention,
    attention_part,
    explain,
    registry,
    rms_norm,
    split_frequencies,
)
from flashi2v_npu_ops.backends import half_spectrum
from flashi2v_npu_ops.testing import breaking_changes

if importlib.util.find_spec("torch_npu") is not None:
    pytest.skip("the real torch_npu is installed, whose names emulations would take", allow_module_level=True)

import emulated_npu

# What each operator must have run on; nothing: CANN has no operator of its own for it.
KERNELS = {
    "attention": ["npu_fusion_attention"],
    "attention_part": ["npu_fusion_attention"] * 2 + ["npu_fusion_attention_grad"] * 2,
    "attention_part_grad": ["npu_fusion_attention"] * 2 + ["npu_fusion_attention_grad"] * 2,
    "rms_norm": ["npu_rms_norm"],
    "apply_rope": ["npu_rotary_mul"],
    "gelu_tanh": ["npu_gelu"],
    "conv3d": [],
    "layer_norm_modulate": [],
    "gated_residual": [],
    "split_frequencies": [],
}


@pytest.fixture(autouse=True)
def cpu_as_npu(monkeypatch):
    """Let the `ascend` backend serve CPU tensors."""
    monkeypatch.setattr(registry.all_backends()["ascend"], "device", None)
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
    assert emulated_npu.calls == KERNELS[case.operator]


def test_auto_prefers_the_npu_kernel():
    attention(*[normal(1, 3, 2, 8)] * 3)
    assert emulated_npu.calls == ["npu_fusion_attention"]


@pytest.mark.parametrize("masked", [False, True])
def test_without_gradients_the_kernel_for_inference_attends(masked):
    q, k, v = (normal(2, num, 3, 16, dtype=torch.bfloat16, seed=num) for num in (7, 5, 5))
    mask = attention_mask() if masked else None
    with torch.no_grad():
        out = attention(q, k, v, mask=mask)
        expected = attention(q, k, v, mask=mask, backend="reference")
    assert emulated_npu.calls == ["npu_fused_infer_attention_score"]
    assert_close(out, expected, **TOLERANCE[torch.bfloat16])


def test_parts_of_attention_come_from_the_kernel_for_inference_with_their_log_sum_exp():
    q, k, v = (normal(2, num, 3, 16, dtype=torch.bfloat16, seed=num) for num in (7, 5, 5))
    out, lse = attention_part(q, k, v)
    expected, expected_lse = attention_part(q, k, v, backend="reference")
    assert emulated_npu.calls == ["npu_fused_infer_attention_score"]
    assert_close(out, expected, **TOLERANCE[torch.bfloat16])
    assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)


def test_what_the_kernel_for_inference_does_not_take_goes_to_the_other():
    wide, exact = normal(1, 3, 2, 24, dtype=torch.bfloat16), normal(1, 3, 2, 16)
    per_head = torch.ones(1, 2, 3, 3, dtype=torch.bool)
    with torch.no_grad():
        for x, mask in ((wide, None), (exact, None), (exact.bfloat16(), per_head)):
            attention(x, x, x, mask=mask)
    assert emulated_npu.calls == ["npu_fusion_attention"] * 3


def test_a_query_that_attends_to_nothing_gets_zeros_and_gives_no_gradient():
    q, k, v = normal(2, 7, 3, 8), normal(2, 5, 3, 8), normal(2, 5, 3, 8, seed=1)
    out = attention(q, k, v, mask=attention_mask(), backend="ascend")
    assert (out[0, 2] == 0).all()
    gradients = torch.autograd.grad(out[0, 2].sum(), (q, k, v))
    assert all((grad == 0).all() for grad in gradients)


def test_rope_keeps_its_tables_in_fp32_for_half_precision():
    x, (cos, sin) = normal(1, 64, 2, 128, dtype=torch.bfloat16), rope_tables(64, 128)
    assert torch.equal(apply_rope(x, cos, sin, backend="ascend"), apply_rope(x, cos, sin, backend="reference"))


def test_rope_of_more_rows_than_the_kernel_takes_is_computed_in_parts():
    x, (cos, sin) = normal(700, 2, 3, 8), rope_tables(2, 8)
    out = apply_rope(x, cos, sin, backend="ascend")
    assert emulated_npu.calls == ["npu_rotary_mul"] * 3
    assert_close(out, apply_rope(x, cos, sin, backend="reference"))


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
        low, keep, cutoff = half_spectrum.low_pass_share(half_spectrum.REAL_DFT, latent, ratio)
        half_spectrum.low_pass(half_spectrum.REAL_DFT, latent, keep)
    assert watch.seen > 30
    assert torch.equal(cutoff, exact_cutoff)
    assert_close(low, exact_low, atol=1e-5, rtol=0)
    assert_close(latent - low, exact_high, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("operator", "case", "words"),
    [
        ("attention", Case("npu", torch.float64), "float64"),
        ("attention", Case("npu", torch.bfloat16, head_size=769), "768, got 769"),
        ("attention", Case("npu", torch.bfloat16, num_heads=257), "256 heads, got 257"),
        ("apply_rope", Case("npu", torch.bfloat16, num_heads=1000), "1000 heads"),
        ("apply_rope", Case("npu", torch.bfloat16, head_size=896), "896"),
        ("gelu_tanh", Case("npu", torch.float64), "float64"),
    ],
)
def test_limits_of_the_kernels_are_named_and_auto_goes_on(operator, case, words):
    with pytest.raises(UnsupportedError, match=words):
        explain(operator, case, "ascend")
    choice = explain(operator, case)
    assert choice.backend == ("reference" if operator == "apply_rope" else "torch")  # no complex numbers on an NPU
    assert words in choice.passed_over["ascend"]


def test_a_kernel_that_the_torch_npu_lacks_is_named_and_auto_goes_on(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    monkeypatch.delattr(torch.ops.npu, "npu_gelu", raising=False)
    monkeypatch.setattr(type(torch.ops.npu), "__getattr__", lambda self, name: getattr(object, name))
    choice = explain("gelu_tanh", Case("npu", torch.bfloat16))
    assert choice.backend == "torch"
    assert choice.passed_over == {"ascend": "this torch_npu has no npu_gelu: install a newer one"}


def test_a_wrong_argument_name_fails_as_it_would_on_an_npu():
    with pytest.raises(RuntimeError, match="eps"):
        torch.ops.npu.npu_rms_norm(torch.ones(2), torch.ones(2), eps=1e-6)


@pytest.mark.parametrize("schema", emulated_npu.SCHEMAS[emulated_npu.OLDEST])
def test_whatever_fits_the_oldest_schema_fits_the_newest(schema):
    name = schema.partition("(")[0]
    (newest,) = (line for line in emulated_npu.SCHEMAS[emulated_npu.NEWEST] if line.startswith(f"{name}("))
    # Newer versions return something behind the gradients; we read those alone.
    grows = name == "npu_fusion_attention_grad"
    assert breaking_changes(schema, newest) == (["results differ"] if grows else [])


@pytest.mark.parametrize(
    ("new", "words"),
    [
        ("f(Tensor y, int n=1) -> Tensor", "argument x differs in name, type or default"),
        ("f(Tensor x, int n=2) -> Tensor", "argument n differs in name, type or default"),
        ("f(Tensor x) -> Tensor", "argument n is gone"),
        ("f(Tensor x, int n=1, *, int m) -> Tensor", "argument m is new and has no default"),
        ("f(Tensor x, int n=1) -> (Tensor, Tensor)", "results differ"),
        ("g(Tensor x, int n=1) -> Tensor", "f became g"),
    ],
)
def test_changes_of_a_schema_that_break_calls_are_named(new, words):
    assert breaking_changes("f(Tensor x, int n=1) -> Tensor", new) == [words]
