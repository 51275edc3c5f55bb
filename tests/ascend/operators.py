"""The table of docs/ascend-operators.md, from what all commands asked NPUs for.

    NPU_RECORDS=records python -m flashi2v_npu_ops.testing --devices 2 --older python -m pytest tests/ascend
    python tests/ascend/operators.py records torch_npu-2.13.0-*.whl torch_npu-2.6.0-*.whl

Kernels of a torch_npu are what its wheel lists in csrc/aten/*.yaml; nothing of it is loaded.
"""

import re
import sys
import zipfile
from pathlib import Path

import torch
from npu_runs import PAGE, read_records

from flashi2v_npu_ops.testing.cpu_kernels import is_composite

PATHS = ("sampling", "encoding", "training", "FSDP2", "pipeline", "tensor parallel", "context parallel")
HEAD = "| operator | asked for by | dtypes of its tensors |"
# Whom torch_npu hands an operator to: its namespaces, in words.
KINDS = {"op_api": "aclnn", "acl_op": "acl_op"}


def path_of(record: str) -> str:
    kind, _, name = record.partition(": ")
    layout = name.removesuffix(" in bf16")
    return layout if kind == "training" and layout in PATHS else kind


def kernels_of(wheel: Path) -> dict[str, str]:
    """Return the operators that a torch_npu has a kernel for, and which kind of kernel."""
    found = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in ("npu_native_functions", "npu_native_functions_by_codegen"):
            text = archive.read(f"torch_npu/csrc/aten/{name}.yaml").decode()
            for entry in re.split(r"^- ", text, flags=re.MULTILINE)[1:]:
                operator = re.search(r"func: ([\w.]+)", entry) or re.match(r"([\w.]+)$", entry, flags=re.MULTILINE)
                kinds = re.search(r"impl_ns: (.+)", entry)
                named = [KINDS[kind] for kind in KINDS if kinds and kind in kinds[1]]
                if operator:
                    found[operator[1]] = " or ".join(named) or "its own"
    return found


def served(operator: str, kernels: dict[str, str]) -> str:
    """Return who computes an operator; "CPU" where neither torch_npu has a kernel nor PyTorch parts of it."""
    namespace, _, name = operator.partition(".")
    packet, _, overload = name.partition(".")
    if name in kernels or namespace != "aten":
        return kernels.get(name, "none")
    return "in parts" if is_composite(getattr(getattr(torch.ops.aten, packet), overload or "default")) else "CPU"


def main(records: Path, *wheels: str) -> None:
    rows: dict[str, tuple[set[str], set[str]]] = {}
    for directory in records.iterdir():
        path = path_of(directory.name)
        for operator, dtypes in read_records(directory).items() if path in PATHS else ():
            seen, known = rows.setdefault(operator, (set(), set()))
            seen.add(path)
            known |= dtypes
    versions = [Path(wheel).name.split("-")[1] for wheel in wheels]
    kernels = [kernels_of(Path(wheel)) for wheel in wheels]
    lines = [f"{HEAD[:-1]}| {' | '.join(f'kernel in {version}' for version in versions)} |"]
    lines.append("|---" * (3 + len(wheels)) + "|")
    for operator, (seen, dtypes) in sorted(rows.items()):
        asked = "all" if len(seen) == len(PATHS) else ", ".join(path for path in PATHS if path in seen)
        cells = [f"`{operator}`", asked, ", ".join(sorted(dtypes)), *(served(operator, known) for known in kernels)]
        lines.append(f"| {' | '.join(cells)} |")
    assert rows, f"{records} holds no records"
    before = PAGE.read_text().partition(HEAD[:-2])[0]
    PAGE.write_text(before + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
