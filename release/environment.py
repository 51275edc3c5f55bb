"""Look at the environment that runs this, in a process of its own: python -m release.environment [SITE NAME ...]

Without arguments it prints what is installed of all that the table of compatibility tells, as JSON. With them it sees
that these packages come from a folder, and that what they ask for is there.
"""

import json
import platform
import sys
from importlib import metadata
from importlib.util import find_spec

from packaging.requirements import Requirement

from flashi2v_npu_ops.installation import find_installation
from flashi2v_npu_ops.tested import installed


def versions() -> dict[str, str]:
    """Return the versions of this environment, without build tags, and what it runs on."""
    found = {name: version.partition("+")[0] for name, version in installed(find_installation()).items()}
    if "torch_npu" in found:
        found.setdefault("CANN", "stubs")  # torch_npu does not load without either
    python = ".".join(platform.python_version_tuple()[:2])
    return {"Python": python, "on": f"{platform.system()} {platform.machine()}", **found}


def fault(site: str, name: str) -> str | None:
    """Return what is wrong with a package that should be installed in a folder."""
    spec = find_spec(name.replace("-", "_"))
    if spec is None or not str(spec.origin).startswith(site):
        return f"{name} is not in {site}"
    for requirement in map(Requirement, metadata.requires(name) or ()):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            there = metadata.version(requirement.name)
            if not requirement.specifier.contains(there, prereleases=True):
                return f"{name} asks for {requirement}, and {there} is installed"
    return None


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(json.dumps(versions()))
    sys.exit("; ".join(filter(None, (fault(sys.argv[1], name) for name in sys.argv[2:]))) or None)
