"""What the packages of a tree declare."""

import ast
import re
import sys
from dataclasses import dataclass
from graphlib import TopologicalSorter
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which nox and build bring

# The quick tests of what leans on siblings and on other libraries most: `nox -s lowest`, and every release.
QUICK_TESTS = {
    "flashi2v-npu-ops": ("package", "registry"),
    "flashi2v-data": ("cli", "config", "decode", "meta", "package", "store", "video"),
    "flashi2v-model": ("encoders", "flow_matching", "weights"),
    "flashi2v-train": ("autopsy", "launcher", "metrics", "validation"),
    "flashi2v-infer": ("config", "export", "load", "package", "pipeline"),
}


class ReleaseError(Exception):
    """A release cannot be made; the message is one line that says what to change."""

    exit_code = 2


class FailedError(ReleaseError):
    """A step of a release failed, and has said why."""

    exit_code = 1


@dataclass(frozen=True)
class Package:
    """A package as the sources at some commit declare it."""

    name: str
    folder: Path  # packages/NAME
    version: Version
    python: SpecifierSet
    requires: dict[str, SpecifierSet]  # by name, those of all extras among them
    sources: str = ""  # git's name of all that is in its folder

    @property
    def init(self) -> Path:
        """The file that tells the version."""
        return _init(self.folder)

    @property
    def siblings(self) -> dict[str, SpecifierSet]:
        """Ranges of the packages of this project that it needs."""
        return {name: allowed for name, allowed in self.requires.items() if name in QUICK_TESTS}

    def quick_tests(self, chosen: list[str]) -> list[str]:
        """Return the files of its quick tests, or those of them that are chosen by their names."""
        names = [name for name in QUICK_TESTS[self.name] if not chosen or name in chosen]
        paths = [self.folder / "tests" / f"test_{name}.py" for name in names]
        return [str(path) for path in paths if path.is_file()]

    def fits(self, other: "Package") -> bool:
        """Whether the two may be installed together, as far as they know of each other."""
        both = ((self, other.siblings.get(self.name)), (other, self.siblings.get(other.name)))
        return all(allowed is None or each.version in allowed for each, allowed in both)


def read(tree: Path) -> dict[str, Package]:
    """Return the packages of a tree by name, each behind those that it needs."""
    found = {name: _read(tree / "packages" / name) for name in QUICK_TESTS}
    order = TopologicalSorter({name: package.siblings for name, package in found.items()}).static_order()
    return {name: found[name] for name in order}


def _init(folder: Path) -> Path:
    return folder / "src" / folder.name.replace("-", "_") / "__init__.py"


def _read(folder: Path) -> Package:
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    requires: dict[str, SpecifierSet] = {}
    for line in chain(project["dependencies"], *project.get("optional-dependencies", {}).values()):
        one = Requirement(line)
        requires[one.name] = requires.get(one.name, SpecifierSet()) & one.specifier
    version = re.search(r'^__version__ = "(.+)"$', _init(folder).read_text(), re.MULTILINE)
    assert version is not None
    return Package(folder.name, folder, Version(version[1]), SpecifierSet(project["requires-python"]), requires)


def public_names(folder: Path) -> list[str]:
    """Return the names that a folder's `__init__` shows to those who import it: its stub's, or its `__all__`."""
    stub = folder / "__init__.pyi"
    tree = ast.parse((stub if stub.exists() else folder / "__init__.py").read_text())
    if stub.exists():
        imports = (node for node in tree.body if isinstance(node, ast.ImportFrom))
        return [alias.asname or alias.name for node in imports for alias in node.names]
    assigned = (node for node in tree.body if isinstance(node, ast.Assign))
    told = (node.value for node in assigned if ast.unparse(node.targets[0]) == "__all__")
    return list(ast.literal_eval(next(told, ast.List([]))))
