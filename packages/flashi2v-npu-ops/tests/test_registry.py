"""Choosing backends and devices."""

import logging
import mmap
import os
import subprocess
import sys
import types

import pytest
import torch

from flashi2v_npu_ops import (
    Case,
    UnsupportedError,
    attention,
    backends,
    explain,
    gelu_tanh,
    registry,
    rms_norm,
    set_backend,
    use_backend,
)
from flashi2v_npu_ops import device as devices
from flashi2v_npu_ops.backends import cuda
from flashi2v_npu_ops.device import (
    claim_device,
    collective_backend,
    free_memory,
    peak_memory,
    reset_peak_memory,
    resolve_device,
)
from flashi2v_npu_ops.registry import check_environment

HOPPER_CASE = Case("cuda", torch.bfloat16)


@pytest.fixture(autouse=True)
def _fresh_choices(monkeypatch):
    monkeypatch.setattr(registry, "_overrides", {})  # what other packages' tests have chosen

    def clear() -> None:
        for cached in (registry._choose_once, registry._report_once, registry._environment):
            cached.cache_clear()

    clear()
    yield
    clear()


@pytest.fixture
def served(monkeypatch):
    """The backends that served rms_norm, in order."""
    names = []
    for name in backends("rms_norm"):
        implementations = registry.all_backends()[name].implementations
        spied = implementations["rms_norm"]

        def call(*args, name=name, run=spied.call):
            names.append(name)
            return run(*args)

        spy = registry.Implementation(call, spied.obstacle)
        monkeypatch.setitem(implementations, "rms_norm", spy)
    return names


def normalise():
    return rms_norm(torch.ones(2, 4), torch.ones(4), 1e-6)


def test_a_backend_asked_for_by_name_serves_the_call_or_raises():
    x = torch.ones(1, 2, 1, 8)
    with pytest.raises(UnsupportedError, match="runs on npu devices, the tensors are on cpu"):
        attention(x, x, x, backend="ascend")
    with pytest.raises(UnsupportedError, match="choose one of auto, ascend, torch, reference"):
        gelu_tanh(x, backend="cudnn")
    for unknown in (
        lambda: backends("softmax"),
        lambda: set_backend("softmax", "auto"),
        lambda: explain("softmax", HOPPER_CASE),
    ):
        with pytest.raises(UnsupportedError, match="unknown operator"):
            unknown()


def test_auto_says_once_why_it_passes_over_a_backend_of_the_device(caplog, monkeypatch):
    monkeypatch.setattr(cuda.backend, "device", "cpu")  # this CPU stands in for a CUDA device
    x = torch.ones(1, 2, 1, 8)
    with caplog.at_level(logging.WARNING, "flashi2v_npu_ops"):
        for _ in range(3):
            attention(x, x, x)
    assert [record.getMessage() for record in caplog.records] == [
        "attention: passing over backend cuda: flash-attn and cuDNN take fp16 and bf16, got torch.float32"
    ]


def test_backends_of_other_devices_are_not_worth_a_word(caplog):
    with caplog.at_level(logging.WARNING, "flashi2v_npu_ops"):
        normalise()
    assert not caplog.records
    assert explain("rms_norm", Case("cpu", torch.float32)) == registry.Choice("torch", {})


def test_set_backend_decides_what_auto_means(served):
    normalise()
    set_backend("rms_norm", "reference")
    normalise()
    set_backend("rms_norm", "auto")
    normalise()
    assert served == ["torch", "reference", "torch"]


def test_use_backend_holds_within_its_context_and_nests(served):
    with use_backend("rms_norm", "reference"):
        normalise()
        with use_backend("rms_norm", "auto"):
            normalise()
        normalise()
    with pytest.raises(KeyError), use_backend("rms_norm", "reference"):
        raise KeyError
    normalise()
    assert served == ["reference", "torch", "reference", "torch"]
    with pytest.raises(UnsupportedError, match="no backend 'cuda'"), use_backend("rms_norm", "cuda"):
        pass


def test_explain_follows_use_backend():
    case = Case("cpu", torch.float32)
    with use_backend("rms_norm", "reference"):
        assert explain("rms_norm", case).backend == "reference"
    assert explain("rms_norm", case).backend == "torch"


def test_a_compiled_call_that_cannot_be_served_says_why():
    x = torch.ones(1, 2, 1, 8)
    torch._dynamo.reset()
    with pytest.raises(UnsupportedError, match="runs on npu devices"):
        torch.compile(lambda x: attention(x, x, x, backend="ascend"), backend="eager")(x)


def test_a_compiled_call_follows_use_backend(served):
    torch._dynamo.reset()
    compiled = torch.compile(normalise, fullgraph=True, backend="eager")
    compiled()
    with use_backend("rms_norm", "reference"):
        compiled()
    assert served == ["torch", "reference"]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("reference", "reference"),
        ("rms_norm=reference", "reference"),
        ("reference, rms_norm=torch", "torch"),
        ("attention=reference", "torch"),
        ("cuda", "torch"),  # rms_norm has no such backend
        ("reference,auto", "torch"),
        ("reference,rms_norm=auto", "torch"),
        ("", "torch"),
    ],
)
def test_the_environment_decides_what_auto_means(setting, expected, served, monkeypatch):
    monkeypatch.setenv("FLASHI2V_OPS_BACKEND", setting)
    normalise()
    assert served == [expected]


def test_a_choice_in_the_program_goes_before_the_environment(served, monkeypatch):
    monkeypatch.setenv("FLASHI2V_OPS_BACKEND", "reference")
    with use_backend("rms_norm", "torch"):
        normalise()
    assert served == ["torch"]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("referense", "unknown backend 'referense'"),
        ("rms_norn=torch", "unknown operator 'rms_norn'"),
        ("rms_norm=cuda", "no backend 'cuda'"),
        ("ascend", "runs on npu"),
        ("=", "unknown operator ''"),
    ],
)
def test_an_environment_that_cannot_be_honoured_is_an_error(setting, words, monkeypatch):
    monkeypatch.setenv("FLASHI2V_OPS_BACKEND", setting)
    for act in (normalise, lambda: check_environment("cpu")):
        with pytest.raises(UnsupportedError, match=words):
            act()


@pytest.mark.parametrize(
    ("capability", "flash_attn", "case", "words"),
    [
        ((8, 0), True, HOPPER_CASE, None),
        ((9, 0), False, HOPPER_CASE, None),
        ((8, 0), False, HOPPER_CASE, "flash-attn is not installed"),
        ((7, 5), True, HOPPER_CASE, "needs compute capability 8.0, this GPU has 7.5"),
        ((9, 0), True, Case("cuda", torch.float32), "fp16 and bf16"),
        ((9, 0), True, Case("cuda", torch.bfloat16, masked=True), "mask"),
        ((9, 0), True, Case("cuda", torch.bfloat16, head_size=256), None),
        ((9, 0), False, Case("cuda", torch.bfloat16, head_size=256), "up to 128"),
        ((9, 0), False, Case("cuda", torch.bfloat16, head_size=100), "divisible by 8"),
        ((9, 0), True, Case("cuda", torch.bfloat16, head_size=264), "up to 256"),
    ],
)
def test_cuda_attention_is_chosen_by_capability_dtype_and_head_size(monkeypatch, capability, flash_attn, case, words):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "flash_attn_fault", lambda: None if flash_attn else "flash-attn is not installed")
    choice = explain("attention", case)
    if words is None:
        assert choice == registry.Choice("cuda", {})
    else:
        assert choice.backend == "torch"
        assert words in choice.passed_over["cuda"]


@pytest.mark.parametrize(
    ("name", "capability", "flash3", "case", "words"),
    [
        ("cudnn", (8, 0), False, HOPPER_CASE, None),
        ("cudnn", (7, 5), False, HOPPER_CASE, "needs compute capability 8.0, this GPU has 7.5"),
        ("cudnn", (9, 0), True, Case("cuda", torch.float32), "fp16 and bf16"),
        ("cudnn", (9, 0), True, Case("cuda", torch.bfloat16, head_size=136), "up to 128"),
        ("cudnn", (9, 0), True, Case("cuda", torch.bfloat16, masked=True), "mask"),
        ("flash3", (9, 0), True, HOPPER_CASE, None),
        ("flash3", (9, 0), False, HOPPER_CASE, "flash-attn 3 is not installed"),
        ("flash3", (8, 0), True, HOPPER_CASE, "flash-attn 3 needs compute capability 9.0, this GPU has 8.0"),
        ("flash3", (9, 0), True, Case("cuda", torch.bfloat16, head_size=264), "up to 256"),
    ],
)
def test_kernels_by_name_serve_the_call_or_say_what_is_in_the_way(monkeypatch, name, capability, flash3, case, words):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    installed = {"flash_attn_interface": flash3, "flash_attn": False}
    monkeypatch.setattr(
        cuda,
        "flash_attn_fault",
        lambda module="flash_attn", name="flash-attn": None if installed[module] else f"{name} is not installed",
    )
    if words is None:
        assert explain("attention", case, name) == registry.Choice(name, {})
    else:
        with pytest.raises(UnsupportedError, match=words):
            explain("attention", case, name)


def test_what_was_never_measured_is_taken_by_name_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(cuda, "flash_attn_fault", lambda module="flash_attn", name="flash-attn": None)
    assert explain("attention", HOPPER_CASE).backend == "cuda"
    assert backends("attention")[-4:] == ("reference", "cudnn", "flash3", "bf16")


def test_flash_attn_3_may_return_the_log_sum_exp_too(monkeypatch):
    q, k = torch.randn(2, 5, 3, 8), torch.randn(2, 4, 3, 8)
    out = attention(q, k, k, scale=0.2, backend="reference")
    for returned in (out, (out, torch.zeros(2, 3, 5))):
        interface = types.SimpleNamespace(flash_attn_func=lambda q, k, v, softmax_scale, returned=returned: returned)
        monkeypatch.setitem(sys.modules, "flash_attn_interface", interface)
        assert cuda.flash3.implementations["attention"].call(q, k, k, None, 0.2) is out


def test_flash_attn_is_given_its_own_layout_and_the_scale(monkeypatch):
    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        weights = (torch.einsum("bskd,btkd->bkst", q, k) * softmax_scale).softmax(-1)
        return torch.einsum("bkst,btkd->bskd", weights, v)

    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_func=flash_attn_func))
    monkeypatch.setattr(cuda, "flash_attn_fault", lambda: None)
    q, k = torch.randn(2, 5, 3, 8), torch.randn(2, 4, 3, 8)
    ours = cuda.backend.implementations["attention"].call(q, k, k, None, 0.2)
    torch.testing.assert_close(ours, attention(q, k, k, scale=0.2, backend="reference"))


def test_devices_are_resolved_by_name():
    assert resolve_device("cpu") == torch.device("cpu")
    assert collective_backend(torch.device("cpu")) == "gloo"
    assert peak_memory(torch.device("cpu")) > 2**20
    with pytest.raises(UnsupportedError, match="auto, npu, cuda, cpu"):
        resolve_device("tpu")
    with pytest.raises(UnsupportedError, match="must be a number"):
        resolve_device("cpu:foo")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is present")
def test_a_device_that_is_absent_is_an_error_that_says_what_to_do():
    with pytest.raises(UnsupportedError, match="no CUDA device"):
        resolve_device("cuda")


def test_importing_the_package_leaves_the_environment_as_it_was():
    code = """
import os
before = dict(os.environ)
import flashi2v_npu_ops, flashi2v_npu_ops.device, sys
assert dict(os.environ) == before
assert "torch_npu" not in sys.modules
"""
    # On an Ascend machine torch would load torch_npu, which sets variables of its own.
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"})


def test_processes_on_one_machine_share_out_its_cores_and_devices(monkeypatch):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert claim_device("cpu") == CPU
    assert threads == []  # alone it keeps what it has
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert claim_device("cpu") == CPU
    assert threads == [2]
    with pytest.raises(UnsupportedError, match="'cuda:1' is one device for 4 processes: leave its number out"):
        claim_device("cuda:1")
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.accelerator, "set_device_index", current.append)
    assert claim_device("cuda") == torch.device("cuda", 1)
    assert current == [1]


CPU = torch.device("cpu")
needs_proc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells of its memory")


@needs_proc
def test_the_peak_of_the_cpu_starts_anew():
    # Not a tensor: an allocator may serve it from what others have freed, and keep it.
    held = mmap.mmap(-1, 256 * 2**20)
    for page in range(0, len(held), mmap.PAGESIZE):
        held[page] = 1
    high = peak_memory(CPU)
    held.close()
    reset_peak_memory(CPU)
    assert peak_memory(CPU) < high - 200 * 2**20


@needs_proc
def test_free_memory_of_the_cpu_shrinks_with_a_containers_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "_CGROUP", tmp_path)
    free = free_memory(CPU)
    assert free > 2**20
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(CPU) > free / 2
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("4000000\n")
    (tmp_path / "memory.stat").write_text("anon 1000\ninactive_file 2000000\nactive_file 3\n")
    assert free_memory(CPU) == 3_000_000


def test_memory_is_unknown_where_the_system_does_not_tell(tmp_path, monkeypatch):
    for name in ("_MEMINFO", "_RESET_PEAK"):
        monkeypatch.setattr(devices, name, tmp_path / "absent")
    assert free_memory(CPU) is None
    reset_peak_memory(CPU)


def test_what_an_allocator_holds_unused_is_free(monkeypatch):
    answers = {"mem_get_info": (1000, 8000), "memory_reserved": 500, "memory_allocated": 200}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: answer)
    assert free_memory(torch.device("cuda:0")) == 1300


def test_operators_run_on_the_meta_device():
    q = torch.empty(1, 4, 2, 8, device="meta")
    assert attention(q, q, q).shape == q.shape
    assert gelu_tanh(q).is_meta
