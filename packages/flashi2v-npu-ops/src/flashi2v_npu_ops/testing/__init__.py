"""For tests of any Ascend project, on a machine that has neither an NPU nor CANN.

`stub_cann` lets the real torch_npu wheel load, so that calls of its operators can be held to what it registers: names
of arguments, shapes and dtypes of results and gradients. Values are not computed. Three steps, in two processes:

    # test_calls.py: builds the stubs, and runs the calls in a process that sees them
    environment = stub_cann(tmp_path)
    subprocess.run([sys.executable, "calls.py"], env=environment, check=True)

    # calls.py
    import torch, torch_npu
    from torch._subclasses import FakeTensorMode
    from flashi2v_npu_ops.testing import Recorder, schema_faults

    with FakeTensorMode(), Recorder() as recorder:
        out = my_norm(torch.empty(2, 8, device="npu", dtype=torch.bfloat16))
    assert [call.operator for call in recorder.calls] == ["npu_rms_norm"]
    assert recorder.calls[0].arguments["gamma"] == {"shape": [8], "dtype": "float32", "on": "npu"}
    assert not schema_faults(["npu_rms_norm(Tensor input, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor)"])

Values, too, where the CPU stands for the NPU: in `stub_cann(tmp_path, devices=2, compute=True)` tensors on `npu` have
memory, all operators of PyTorch compute by the CPU's kernels on it, Ascend's own by emulations, and processes reach
each other by torch_npu's own process group. So whole programs run with `--device npu`, two processes included:

    environment = stub_cann(tmp_path, devices=2, compute=True)
    subprocess.run(["torchrun", "--nproc-per-node", "2", "train.py", "--device", "npu"], env=environment, check=True)

What Ascend refuses is refused with a `RefusedError` (fp64, complex numbers, Conv3d in bf16, operands on two devices,
limits of fused operators, operators that no kernel serves), and so is a collective in which ranks differ. It is no
hardware: it shows nothing of speed, of memory, or of errors in Ascend's kernels.

`emulate` lets a function of yours stand for an operator on the CPU, under the schema of any torch_npu.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashi2v_npu_ops.testing.calls import Call, Recorder, describe
    from flashi2v_npu_ops.testing.cpu_kernels import compute_on_cpu, operators_used
    from flashi2v_npu_ops.testing.emulations import RefusedError
    from flashi2v_npu_ops.testing.schemas import breaking_changes, emulate, schema_faults
    from flashi2v_npu_ops.testing.stubs import stub_cann

_HOMES = {
    "calls": ("Call", "Recorder", "describe"),
    "cpu_kernels": ("compute_on_cpu", "operators_used"),
    "emulations": ("RefusedError",),
    "schemas": ("breaking_changes", "emulate", "schema_faults"),
    "stubs": ("stub_cann",),
}

__all__ = [
    "Call",
    "Recorder",
    "RefusedError",
    "breaking_changes",
    "compute_on_cpu",
    "describe",
    "emulate",
    "operators_used",
    "schema_faults",
    "stub_cann",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: beside a torch_npu without CANN, `import torch` alone fails."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
