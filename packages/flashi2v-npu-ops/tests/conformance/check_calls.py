"""Run every call of the `ascend` backend against the real torch_npu on fake NPU tensors; print what came of it as JSON.

For a subprocess that sees the stubs of `stub_cann`. Shape functions check little, so a wrong layout or mask shows in
what is recorded here: shapes, dtypes and devices of outputs and gradients, and the arguments that reached the kernels.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent.parent))
from operator_cases import normal, operator_cases

from flashi2v_npu_ops import attention, explain, fourier, fused_adamw
from flashi2v_npu_ops.device import resolve_device

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Recorder(TorchDispatchMode):
    """Notes the npu:: operators that run, and the keyword arguments they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[list[Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "npu" or func._opname == "_fused_adamw_":
            given = {argument.name: value for argument, value in zip(func._schema.arguments, args)} | (kwargs or {})
            self.calls.append([func._opname, {name: describe(value) for name, value in given.items()}])
        return func(*args, **(kwargs or {}))


def describe(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch."), "on": value.device.type}
    return value


def check(call: Any, inputs: Any) -> dict[str, Any]:
    """Run forward and backward; return everything that can be seen without values."""
    with Recorder() as recorder:
        out = call("ascend")
        gradients = torch.autograd.grad(out, inputs, torch.ones_like(out))
    return {
        "calls": recorder.calls,
        "out": describe(out),
        "inputs": [describe(tensor) for tensor in inputs],
        "gradients": [describe(gradient) for gradient in gradients],
    }


def main() -> None:
    logging.disable(logging.CRITICAL)
    assert "torch_npu" not in sys.modules
    assert resolve_device("npu").type == "npu"
    results: dict[str, Any] = {"schemas": [str(schema) for schema in schemas()]}
    for label, dtype in DTYPES.items():
        with FakeTensorMode():
            for name, case in operator_cases(dtype, "npu").items():
                results[f"{name}, {label}"] = {"operator": case.operator, **check(case.call, case.inputs)}

    with FakeTensorMode():
        # The split is one node under a fake mode. Its inside is run here, last: the tables it keeps are fake now.
        latent, ratio = torch.empty(2, 16, 60, 104, device="npu"), torch.empty(2, device="npu")
        results["inside of the split"] = [
            describe(part) for part in fourier.low_pass_share(fourier.REAL_DFT, latent, ratio)
        ]
        weights = normal(4, 3, device="npu")
        optimizer = fused_adamw([weights], lr=1e-3)
        weights.grad = torch.ones_like(weights)
        with Recorder() as recorder:
            optimizer.step()
        state = optimizer.state[weights]
        results["optimizer"] = {"calls": [name for name, _ in recorder.calls], "state": describe(state["exp_avg"])}
    results["auto"] = explain("attention", ("npu", torch.bfloat16, True, 128, True, False)).backend

    failures = {}
    with FakeTensorMode():
        x = torch.empty(1, 4, 2, 8, device="npu")
        for name, wrong in {
            "unknown argument": lambda: torch.ops.npu.npu_rms_norm(x, x[0, 0, 0], eps=1e-6),
            "mixed devices": lambda: attention(x, x, torch.empty(1, 4, 2, 8), backend="ascend"),
        }.items():
            try:
                wrong()
            except (RuntimeError, ValueError) as error:
                failures[name] = str(error)
    results["failures"] = failures
    print(json.dumps(results))


def schemas() -> list[Any]:
    names = ("npu_fusion_attention", "npu_gelu", "npu_rms_norm", "npu_rotary_mul")
    return [getattr(torch.ops.npu, name).default._schema for name in names]


if __name__ == "__main__":
    main()
