"""Walk all imports: only the allowed arrows between the packages, and nothing that is not declared.

flashi2v-npu-ops  <-  flashi2v-model  <-  flashi2v-train
                                      <-  flashi2v-infer
                      flashi2v-data   <-  both
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACKAGES = Path(__file__).parent.parent / "packages"
ALLOWED = {
    "flashi2v_npu_ops": set(),
    "flashi2v_data": set(),
    "flashi2v_model": {"flashi2v_npu_ops"},
    "flashi2v_train": {"flashi2v_npu_ops", "flashi2v_model", "flashi2v_data"},
    "flashi2v_infer": {"flashi2v_npu_ops", "flashi2v_model", "flashi2v_data"},
}
# Modules whose distribution has another name.
DISTRIBUTIONS = {"PIL": "pillow", "ruamel": "ruamel.yaml"}


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, top-level module) of every import in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.lineno, node.module.split(".")[0]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def faults(package: Path) -> Iterator[str]:
    """Yield one line for every import that breaks a rule."""
    module = package.name.replace("-", "_")
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    extras = [line for lines in project.get("optional-dependencies", {}).values() for line in lines]
    declared = {canonical(Requirement(line).name) for line in (*project["dependencies"], *extras)}
    for path in sorted((package / "src").rglob("*.py")):
        for line, name in imported(path):
            where = f"{path.relative_to(PACKAGES.parent)}:{line}"
            if name == module or name in sys.stdlib_module_names:
                continue
            if name in ALLOWED and name not in ALLOWED[module]:
                yield f"{where}: {module} must not import {name}"
            if canonical(DISTRIBUTIONS.get(name, name)) not in declared:
                yield f"{where}: imports {name}, which {package.name}/pyproject.toml does not declare"


def main() -> int:
    packages = sorted(path.parent for path in PACKAGES.glob("*/pyproject.toml"))
    assert {path.name.replace("-", "_") for path in packages} == ALLOWED.keys()
    found = [fault for package in packages for fault in faults(package)]
    print("\n".join(found) or f"imports of {len(packages)} packages follow the arrows and are declared")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
