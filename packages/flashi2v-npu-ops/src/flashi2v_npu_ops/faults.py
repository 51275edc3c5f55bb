"""What an NPU fails with, in one line that says what to do.

torch_npu's messages name a function of CANN and a number; the numbers are CANN's (AscendCL, HCCL), as torch_npu's
NPUErrorCodes.h and hccl_types.h list them.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from flashi2v_npu_ops.installation import find_installation, mismatches, version

_NUMBERED = re.compile(r"(?:NPU|OPS|HCCL) function error: (?P<function>.*?), error code is (?P<code>\d+)", re.DOTALL)
_OPERATOR = re.compile(r"current working operator name is (\w+)")
_LACKING = re.compile(r"(aclnn\w+) or aclnn\w+ not in \S+, or")
_NO_KERNEL = re.compile(r"Could not run '(\S+)' with arguments from the '(?:NPU|PrivateUse1)' backend")

_SEE = "`npu-smi info` shows its state"
_OTHER = "ASCEND_RT_VISIBLE_DEVICES=1 chooses another"
_PROBE = "`flashi2v-npu-ops doctor --device npu --probe` says which operators fail and what leads around them"
_MEANINGS = {
    (207004, 507033): f"the NPU does not start: another process holds it, or it is down; {_SEE}, {_OTHER}",
    (507010, 507012, 507899, 507901): f"the NPU was lost; {_SEE}, {_OTHER}, and the driver's log says why",
    (507053, 507054): f"the NPU's memory is damaged; {_SEE}, {_OTHER}, and its maker replaces it",
    (107019, 507014, 507017, 507034, 507046, 507047, 507048): f"the NPU did not finish its work in time; {_PROBE}",
    (507011, 507015, 507016, 507018, 507035, 507036, 507042, 507043, 507044, 507045, 507049, 507050): (
        f"an operator failed on the NPU; {_PROBE}"
    ),
}
_MEMORY = (200000, 207001, 207005, 207018)
_HCCL_TIMEOUT = 9
_HCCL_MEANINGS = {
    (1, 5): "the processes do not ask for the same (dtype, size or kind): a bug, please report it with both logs",
    (11, 12, 19): "HCCL cannot reach another machine: all must reach each other's ports; HCCL_SOCKET_IFNAME names the "
    "network",
    (13, 14, 21): "HCCL lost the connection to another process: that one's own log says why",
}
_MEETING = (
    "HCCL timed out while the processes met: are all started, and do their machines reach each other? "
    "HCCL_CONNECT_TIMEOUT=1800 waits longer"
)
_WORKING = (
    "HCCL timed out: another process is gone or far behind, and its own log says where; HCCL_EXEC_TIMEOUT, in seconds, "
    "is the limit"
)


class DeviceError(RuntimeError):
    """The device failed; the message is one line that says what to do."""

    exit_code = 1


@contextmanager
def device_faults_told(if_full: str) -> Iterator[None]:
    """Turn what a device fails with while the block runs into a `DeviceError`, where it is known.

    Args:
        if_full: what to do where the device's memory is full, in the words of the command.
    """
    try:
        yield
    except RuntimeError as error:
        told = explain_fault(error, if_full)
        if told is None:
            raise
        raise DeviceError(told) from error


def explain_fault(error: Exception, if_full: str = "use less of it") -> str | None:
    """Return what an error of a device means and what to do, in one line; None of any other error."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return f"the device's memory is full ({text.partition(' (')[0]}): {if_full}"
    if found := _NUMBERED.search(text):
        code, name = int(found["code"]), found["function"].partition("(")[0].rpartition("::")[2].strip()
        return f"{_meaning(name, code, if_full)} ({name}: error {code} of CANN)"
    if found := _LACKING.search(text):
        return f"this CANN lacks {found[1]}, which torch_npu {version('torch_npu')} calls: {_fitting_cann()}"
    if found := _NO_KERNEL.search(text):
        return f"torch_npu {version('torch_npu')} has no kernel for {found[1]}: install a newer one; {_PROBE}"
    if found := _OPERATOR.search(text):  # work is queued, so that the error comes later and from elsewhere
        reason = text.strip().splitlines()[-1]
        return f"{found[1]} failed on the NPU ({reason}): {_fitting_cann()}; {_PROBE}"
    return None


def _meaning(name: str, code: int, if_full: str) -> str:
    by_hccl = name.lower().startswith("hccl")  # whose numbers are its own, small ones
    if by_hccl and code == _HCCL_TIMEOUT:
        meets = "Comm" in name or "RootInfo" in name
        return _MEETING if meets else _WORKING
    for codes, meaning in (_HCCL_MEANINGS if by_hccl else _MEANINGS).items():
        if code in codes:
            return meaning
    if code in _MEMORY:
        return f"the NPU's memory is full: {if_full}"
    return f"the NPU failed: {_fitting_cann()}; {_SEE}"


def _fitting_cann() -> str:
    """Return which CANN to install, or where to look."""
    fixes = [mismatch.fix for mismatch in mismatches(find_installation())]
    return fixes[0] if fixes else "`flashi2v-npu-ops doctor` says whether CANN fits torch_npu"
