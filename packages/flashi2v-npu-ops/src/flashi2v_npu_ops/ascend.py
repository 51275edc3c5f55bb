"""Ascend NPUs: the only file that imports torch_npu.

torch_npu is an optional extra. It needs CANN, and imports of it fail without, so it is imported only when an NPU is
asked for.
"""

import importlib.util
from functools import cache


@cache
def missing() -> str | None:
    """Return why this process cannot use an NPU, with what mends it, or None."""
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed: pip install 'flashi2v-npu-ops[npu]' on the Ascend machine"
    try:
        import torch_npu
    except (ImportError, OSError, RuntimeError) as error:  # the loader's words for a CANN library that is not there
        return f"torch_npu does not load ({error}): install CANN and source its ascend-toolkit/set_env.sh in this shell"
    if not torch_npu.npu.is_available():
        return "torch_npu sees no NPU: check npu-smi info and ASCEND_RT_VISIBLE_DEVICES"
    return None
