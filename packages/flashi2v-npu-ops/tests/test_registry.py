"""Choosing backends, devices, and the doctor."""

import logging
import subprocess
import sys

import pytest
import torch

from flashi2v_npu_ops import UnsupportedError, backends, registry, rms_norm, set_backend
from flashi2v_npu_ops.device import collective_backend, peak_memory, resolve_device


def test_a_backend_asked_for_by_name_serves_the_call_or_raises():
    x, weight = torch.ones(2, 4, dtype=torch.bfloat16), torch.ones(4)
    with pytest.raises(UnsupportedError, match="one dtype"):
        rms_norm(x, weight, 1e-6, backend="torch")
    with pytest.raises(UnsupportedError, match="choose one of auto, torch, reference"):
        rms_norm(x, weight, 1e-6, backend="cudnn")
    with pytest.raises(UnsupportedError, match="unknown operator"):
        backends("softmax")


def test_auto_says_once_why_it_passes_over_a_backend(caplog):
    registry._report_once.cache_clear()
    x, weight = torch.ones(2, 4, dtype=torch.bfloat16), torch.ones(4)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            rms_norm(x, weight, 1e-6)
    assert len(caplog.records) == 1
    assert "passing over backend torch" in caplog.text


def test_set_backend_decides_what_auto_means(monkeypatch):
    served = []
    for name in backends("rms_norm"):
        spied = registry._implementations["rms_norm"][name]

        def call(*args, name=name, run=spied.call):
            served.append(name)
            return run(*args)

        spy = registry.Implementation("rms_norm", name, call, spied.obstacle)
        monkeypatch.setitem(registry._implementations["rms_norm"], name, spy)
    x, weight = torch.ones(2, 4), torch.ones(4)
    rms_norm(x, weight, 1e-6)
    set_backend("rms_norm", "reference")
    rms_norm(x, weight, 1e-6)
    set_backend("rms_norm", "auto")
    rms_norm(x, weight, 1e-6)
    assert served == ["torch", "reference", "torch"]


def test_devices_are_resolved_by_name():
    assert resolve_device("cpu") == torch.device("cpu")
    assert collective_backend(torch.device("cpu")) == "gloo"
    assert peak_memory(torch.device("cpu")) > 2**20
    with pytest.raises(UnsupportedError, match="auto, npu, cuda, cpu"):
        resolve_device("tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is present")
def test_a_device_that_is_absent_is_an_error_that_says_what_to_do():
    with pytest.raises(UnsupportedError, match="no CUDA device"):
        resolve_device("cuda")


def test_importing_the_package_does_not_import_torch_npu():
    code = "import sys, flashi2v_npu_ops, flashi2v_npu_ops.device; sys.exit('torch_npu' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"})


def test_doctor_lists_devices_and_operators(capsys, monkeypatch):
    from flashi2v_npu_ops import cli

    monkeypatch.setattr(sys, "argv", ["flashi2v-npu-ops", "doctor"])
    assert cli.main() == 0
    out = capsys.readouterr().out
    for operator in registry.operators():
        assert operator in out
    assert "device cpu   available" in out
