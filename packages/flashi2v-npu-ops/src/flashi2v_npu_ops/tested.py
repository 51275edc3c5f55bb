"""Which versions were tested together, as the packages of FlashI2V that are installed say of themselves.

Each package brings tested.json beside its modules: sets of versions with which its tests, or those of packages that
need it, have passed. Versions are the same here where their first two numbers are.
"""

import json
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

from flashi2v_npu_ops.installation import Installation, minor, version

PACKAGES = ("flashi2v-npu-ops", "flashi2v-data", "flashi2v-model", "flashi2v-train", "flashi2v-infer")
LIBRARIES = ("torch", "torch_npu", "CANN", "diffusers", "transformers")


def installed(found: Installation) -> dict[str, str]:
    """Return the versions that count, of what is installed, by name."""
    versions = {name: version(name) for name in (*PACKAGES, *LIBRARIES)} | {"CANN": found.cann}
    return {name: each for name, each in versions.items() if each}


def tested_sets() -> Iterator[dict[str, str]]:
    """Yield the sets of all packages that are installed, by name."""
    for name in PACKAGES:
        spec = find_spec(name.replace("-", "_"))
        if spec is not None and spec.origin is not None:
            path = Path(spec.origin).with_name("tested.json")
            yield from json.loads(path.read_text()) if path.is_file() else ()


def untested(versions: Mapping[str, str], sets: list[dict[str, str]]) -> dict[str, str | None]:
    """Return what of these versions no set has together with the others, and which version of it was tested instead.

    It is held to the set that is nearest; nothing is returned where a set has all of them.
    """

    def apart(tested: dict[str, str]) -> dict[str, str | None]:
        return {name: tested.get(name) for name in versions if minor(tested.get(name, "")) != minor(versions[name])}

    return min(map(apart, sets), key=len, default=dict.fromkeys(versions))
