"""The table of what goes together, docs/compatibility.md: python -m release.compatibility [--record WHAT]

It is made from the pyprojects and from each package's tested.json, and by nothing else. `--record` adds the versions of
the environment that runs this, in which WHAT has passed, to the tested.json of all packages that are installed in it.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from flashi2v_npu_ops.installation import RELEASED_WITH
from flashi2v_npu_ops.tested import LIBRARIES, PACKAGES
from release.environment import versions
from release.packages import Package, read

PAGE = "docs/compatibility.md"
HEAD = """\
# Which versions go together

Made from the packages' `pyproject.toml` and `tested.json` by `nox -s compatibility`: not to be changed by hand.
`flashi2v-npu-ops doctor` names what of an installation was never tested together.
"""


def record(package: Package, tested: Iterable[dict[str, str]]) -> None:
    """Add sets of versions to a package's own, where they are new."""
    path = package.init.with_name("tested.json")
    known = json.loads(path.read_text()) if path.is_file() else []
    lines = [json.dumps(each) for each in (*known, *(each for each in tested if each not in known))]
    path.write_text("[\n " + ",\n ".join(lines) + "\n]\n")


def write_page(tree: Path) -> None:
    """Write the page of a tree anew."""
    (tree / PAGE).write_text(page(tree))


def page(tree: Path) -> str:
    """Return the text of the page."""
    packages = read(tree)
    asked = ("Python", *PACKAGES, *LIBRARIES)
    asks = [
        [f"{name} {package.version}", *({"Python": package.python, **package.requires}.get(each, "") for each in asked)]
        for name, package in ((name, packages[name]) for name in PACKAGES)
    ]
    sets: dict[str, dict[str, str]] = {}
    for name in PACKAGES:
        for each in json.loads(packages[name].init.with_name("tested.json").read_text()):
            sets[json.dumps(each)] = each
    tests = [[each["what"], *(each.get(name, "") for name in ("on", *asked))] for each in sets.values()]
    cann = [[version, ", ".join(releases)] for version, releases in RELEASED_WITH.items()]
    return "\n".join(
        (
            HEAD,
            "## What the packages ask for\n",
            *_table(["", *asked], asks),
            "\nLibraries of extras are among them: torch_npu is asked for by `flashi2v-npu-ops[npu]`.\n",
            "## What was tested together\n",
            *_table(["what passed", "on", *asked], tests),
            "\nCANN `stubs`: the real torch_npu over [stand-ins](ascend.md) of what is below it, without an NPU.\n",
            "## CANN and torch_npu, as Ascend released them\n",
            *_table(["CANN", "torch_npu"], cann),
            "",
        )
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = (head, ("---",) * len(head), *rows)
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", metavar="WHAT", help="what has passed in this environment")
    what = parser.parse_args().record
    if what:
        found = {"what": what, **versions()}
        for name, package in read(Path()).items():
            if name in found:
                record(package, [found])
    write_page(Path())
