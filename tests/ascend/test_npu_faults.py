"""What a command says of an NPU that fails: the stubs of CANN fail, the messages are torch_npu's own."""

import pytest
from npu_runs import EMULATED

pytestmark = pytest.mark.skipif(not EMULATED, reason="an NPU fails when it wants to")

FULL = ",".join(f"{name}=207001" for name in ("aclrtMalloc", "aclrtMallocAlign32", "aclrtMallocPhysical"))
FAULTS = {
    "aclrtSetDevice=507033": "the NPU does not start: another process holds it, or it is down; `npu-smi info`",
    "aclrtSynchronizeStreamWithTimeout=507010": "the NPU was lost; `npu-smi info` shows its state",
    FULL: "the device's memory is full (NPU out of memory. Tried to allocate",
}


def told(errors, command):
    """Return the one line that a command ended with."""
    lines = [line for line in errors.splitlines() if line.startswith(f"{command}: ")]
    assert len(lines) == 1, errors
    assert "Traceback" not in errors, errors
    return lines[0]


@pytest.mark.parametrize("fault", FAULTS, ids=["busy", "lost", "full"])
@pytest.mark.parametrize("command", ["flashi2v-infer", "flashi2v-train"])
def test_a_command_says_in_one_line_what_the_npu_fails_with_and_what_to_do(command, fault, make_workspace, runs):
    workspace = make_workspace("fault")
    words = ["--model", "demo", "--output", workspace.directory / "out.mp4", "--device", "npu"]
    words += ["--num-inference-steps", 2]
    if command == "flashi2v-train":
        words = workspace.arguments(device="npu", train_iters=2, global_batch_size=2)
    codes, errors = runs.try_("faults", command, *words, STUB_CANN_FAULT=fault)
    line = told(errors, command)
    assert codes == [1]
    assert FAULTS[fault] in line
    assert not (workspace.directory / "out.mp4").exists()


def test_a_process_that_hccl_waits_for_in_vain_is_told_of(make_workspace, runs):
    workspace = make_workspace("timeout")
    words = workspace.arguments(device="npu", train_iters=2, global_batch_size=2)
    codes, errors = runs.try_("faults", "flashi2v-train", *words, processes=2, STUB_CANN_FAULT="HcclReduceScatter=9")
    assert 1 in codes
    assert "flashi2v-train: HCCL timed out: another process is gone or far behind" in errors
    assert "HCCL_EXEC_TIMEOUT" in errors
