"""Libraries that signals need and the package does not: whether they are there, and which."""

import importlib.util
from importlib.metadata import PackageNotFoundError, version

from flashi2v_data.errors import InputError


def versions(signal: str, **modules: tuple[str, ...]) -> str:
    """Return the versions of what a signal is measured by, as "opencv 5.0.0.93, scenedetect 0.7.2".

    Args:
        signal: its name.
        modules: by the name that is imported, the distributions that may bring it.

    Raises:
        InputError: one is not installed; nothing is imported to find out.
    """
    found = []
    for module, distributions in modules.items():
        if importlib.util.find_spec(module) is None:
            raise InputError(f"signal {signal} needs {distributions[0]}: pip install 'flashi2v-data[signals]'")
        found.append(f"{module} {_version(distributions)}")
    return ", ".join(found)


def _version(distributions: tuple[str, ...]) -> str:
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "of its own"  # built from its sources, without a distribution's name
