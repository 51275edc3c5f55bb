"""Run every call of the `ascend` backend against the real torch_npu on fake NPU tensors; print what came of it as JSON.

For a subprocess that sees the stubs of CANN. Shape functions check little, so a wrong layout or mask shows in
what is recorded here: shapes, dtypes and devices of outputs and gradients, and the arguments that reached the kernels.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from torch._subclasses import FakeTensorMode

sys.path.insert(0, str(Path(__file__).parent.parent))
from operator_cases import normal, operator_cases

from flashi2v_npu_ops import Case, attention, attention_part, explain
from flashi2v_npu_ops.backends import half_spectrum
from flashi2v_npu_ops.device import resolve_device
from flashi2v_npu_ops.faults import explain_fault
from flashi2v_npu_ops.testing import Recorder, describe, schema_faults

SCHEMAS = Path(__file__).parent.parent / "npu_schemas.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check(call: Any, inputs: Any) -> dict[str, Any]:
    """Run forward and backward; return everything that can be seen without values."""
    with Recorder() as recorder:
        out = call("ascend")
        gradients = torch.autograd.grad(out, inputs, torch.ones_like(out))
    return {
        "calls": [(made.operator, made.arguments) for made in recorder.calls],
        "out": describe(out),
        "inputs": [describe(tensor) for tensor in inputs],
        "gradients": [describe(gradient) for gradient in gradients],
    }


def main() -> None:
    logging.disable(logging.CRITICAL)
    assert "torch_npu" not in sys.modules
    assert resolve_device("npu").type == "npu"
    known = json.loads(SCHEMAS.read_text())["2.13.0"]
    results: dict[str, Any] = {
        "schema faults": schema_faults(known),
        "faults of wrong schemas": schema_faults(["npu_gelu(Tensor x) -> Tensor", "npu_nothing(Tensor x) -> Tensor"]),
    }
    for label, dtype in DTYPES.items():
        with FakeTensorMode():
            for name, case in operator_cases(dtype, "npu").items():
                results[f"{name}, {label}"] = {"operator": case.operator, **check(case.call, case.inputs)}

    with FakeTensorMode():
        # The split is one node under a fake mode. Its inside is run here, last: the tables it keeps are fake now.
        latent, ratio = torch.empty(2, 16, 60, 104, device="npu"), torch.empty(2, device="npu")
        results["inside of the split"] = [
            describe(part) for part in half_spectrum.low_pass_share(half_spectrum.REAL_DFT, latent, ratio)
        ]
        weights = normal(4, 3, device="npu")
        optimizer = torch.optim.AdamW([weights], lr=1e-3, fused=True)
        weights.grad = torch.ones_like(weights)
        with Recorder("_fused_adamw_") as recorder:
            optimizer.step()
        state = optimizer.state[weights]
        results["optimizer"] = {
            "calls": [made.operator for made in recorder.calls],
            "state": describe(state["exp_avg"]),
        }
        half = torch.empty(2, 7, 3, 16, device="npu", dtype=torch.bfloat16)
        mask = torch.ones(2, 1, 7, 7, device="npu", dtype=torch.bool)
        with torch.no_grad(), Recorder() as recorder:
            results["inference"] = describe(attention(half, half, half, mask=mask, backend="ascend"))
        results["calls of inference"] = [(made.operator, made.arguments) for made in recorder.calls]
        with Recorder() as recorder:
            results["part"] = [describe(found) for found in attention_part(half, half, half, backend="ascend")]
        results["calls of the part"] = [(made.operator, made.arguments) for made in recorder.calls]
    results["auto"] = explain("attention", Case("npu", torch.bfloat16)).backend

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
    try:  # nothing computes here
        torch.ones(2, device="npu")
        torch.npu.synchronize()
    except RuntimeError as error:
        results["what CANN fails with"] = explain_fault(error)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
