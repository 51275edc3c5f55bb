"""What NPUs fail with, in words; the messages are as torch_npu writes them (see tests/ascend for its own)."""

import pytest
import torch

from flashi2v_npu_ops.faults import device_faults_told, explain_fault
from flashi2v_npu_ops.installation import InstallationError, loading_told

MESSAGES = {
    "HCCL function error: HcclCommInitRootInfo(1, 2), error code is 9": "HCCL_CONNECT_TIMEOUT=1800",
    "HCCL function error: hcclAllReduce(a), error code is 9": "HCCL_EXEC_TIMEOUT",
    "HCCL function error: hcclAllReduce(a), error code is 19": "HCCL_SOCKET_IFNAME",
    "NPU function error: c10_npu::acl::AclrtX(y), error code is 507014": "did not finish its work in time",
    "NPU function error: c10_npu::acl::AclrtX(y), error code is 507015": "doctor --device npu --probe",
    "NPU function error: c10_npu::acl::AclrtX(y), error code is 561000": "the NPU failed",
    "aclnnMul or aclnnMulGetWorkspaceSize not in libopapi.so, or libopapi.so not found.": "this CANN lacks aclnnMul",
    "Could not run 'aten::svd' with arguments from the 'NPU' backend.": "has no kernel for aten::svd",
}


@pytest.mark.parametrize("message", MESSAGES)
def test_a_number_of_cann_is_put_into_words(message):
    said = explain_fault(RuntimeError(message))
    assert MESSAGES[message] in said
    assert len(said) < 400
    assert "\n" not in said


def test_what_is_no_devices_fault_stays_as_it_is():
    with pytest.raises(RuntimeError, match=r"^shapes do not match$") as caught, device_faults_told("less"):
        raise RuntimeError("shapes do not match")
    assert type(caught.value) is RuntimeError


def test_memory_that_is_full_names_the_commands_own_way_out():
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB (GPU 0)")
    expected = "the device's memory is full (CUDA out of memory. Tried to allocate 1 GiB): use --offload"
    assert explain_fault(error, "use --offload") == expected


@loading_told()
def load():
    try:
        raise ImportError("libhccl.so: not there")
    except ImportError as cause:
        raise RuntimeError("Failed to load the backend extension: torch_npu. You can disable") from cause


def test_a_torch_npu_that_does_not_load_is_told_of_with_what_fixes_that():
    with pytest.raises(InstallationError, match=r"^torch_npu does not load \(libhccl.so: not there\): ") as caught:
        load()
    assert caught.value.exit_code == 2
    with pytest.raises(ImportError, match=r"^no module of mine$"), loading_told():
        raise ImportError("no module of mine")
