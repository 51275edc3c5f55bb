"""Ascend's software on this machine: which versions, whether they fit together, and what makes torch_npu load.

Read off files and environment variables: where torch_npu does not load, `import torch` may fail, too. Places and names
of the files: CANN's installation guide ("checking the installation"), and torch_npu's own collect_env.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

# CANN that each torch_npu was released with, and the range in which Ascend's release notes call any pair compatible.
# Source: README of the Ascend extension for PyTorch, and its release notes 7.1.0 to 26.2.0.
RELEASED_WITH = {
    "8.2": ("2.6.0",),
    "8.3": ("2.6.0.post3", "2.7.1", "2.8.0"),
    "8.5": ("2.6.0.post5", "2.7.1.post2", "2.8.0.post2", "2.9.0"),
    "9.0": ("2.7.1.post4", "2.8.0.post4", "2.9.0.post2", "2.10.0"),
    "9.1": ("2.7.1.post8", "2.9.0.post6", "2.10.0.post4", "2.11.0", "2.12.0"),
    "9.2": ("2.7.1.post11", "2.9.0.post9", "2.10.0.post7", "2.11.0.post3", "2.12.0.post3", "2.13.0", "2.14.0"),
}
_COMPATIBLE = ("8.5", "9.0", "9.1", "9.2")


# How errors begin when torch loads torch_npu by itself, and when diffusers does.
_FAILS_TO_LOAD = ("Failed to load the backend extension: torch_npu", "Failed to import diffusers")


class InstallationError(ImportError):
    """torch_npu is installed and does not load; the message is one line that says what fixes that."""

    exit_code = 2


@contextmanager
def loading_told() -> Iterator[None]:
    """Raise an `InstallationError` where an import in the block fails because torch_npu does not load.

    It is not loaded to compute on a CPU, but torch and diffusers load it wherever it is installed.
    """
    try:
        yield
    except (RuntimeError, ImportError) as error:
        reason = error.__cause__
        if reason is None or not str(error).startswith(_FAILS_TO_LOAD):
            raise
        while reason.__cause__ is not None:
            reason = reason.__cause__
        first = str(reason).partition("\n")[0]
        raise InstallationError(f"torch_npu does not load ({first}): {fix_of_loading(find_installation())}") from error


@dataclass(frozen=True)
class Installation:
    """Ascend's software, as its files say; None where it was not found."""

    torch: str  # version, as are the others that are not said to be something else
    torch_npu: str | None  # whether or not it loads
    cann: str | None
    cann_home: Path | None  # its directory
    cann_sourced: bool  # the environment of CANN's set_env.sh is there
    driver: str | None  # of Ascend
    npu_nodes: int  # device nodes of NPUs


@dataclass(frozen=True)
class Mismatch:
    """Two versions that do not belong together, and what fixes that."""

    what: str
    fix: str
    is_fault: bool  # False: they may work


def find_installation(root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> Installation:
    """Look at the machine, files under `root`."""
    cann_home = next((home for home in _cann_homes(root, environment) if home.is_dir()), None)
    return Installation(
        torch=version("torch") or "",
        torch_npu=version("torch_npu"),
        cann=None if cann_home is None else _cann_version(cann_home),
        cann_home=cann_home,
        cann_sourced="ASCEND_HOME_PATH" in environment,
        driver=_field(root / "usr/local/Ascend/driver/version.info", "version"),
        npu_nodes=len(list((root / "dev").glob("davinci[0-9]*"))),
    )


def mismatches(found: Installation) -> Iterator[Mismatch]:
    """Yield which of torch, torch_npu and CANN do not belong together."""
    if found.torch_npu is None:
        return
    if minor(found.torch) != minor(found.torch_npu):
        yield Mismatch(
            f"torch {found.torch} and torch_npu {found.torch_npu} do not match: each torch_npu fits one torch",
            f"pip install 'torch_npu=={minor(found.torch)}.*'",
            is_fault=True,
        )
    released_with = next((cann for cann, releases in RELEASED_WITH.items() if found.torch_npu in releases), None)
    if found.cann is None or released_with is None or minor(found.cann) == released_with:
        return
    together = {minor(found.cann), released_with} <= set(_COMPATIBLE)
    yield Mismatch(
        f"torch_npu {found.torch_npu} was released with CANN {released_with}, this is {found.cann}"
        + (", which Ascend's release notes call compatible" if together else ""),
        f"if operators fail, install CANN {released_with}" if together else f"install CANN {released_with}",
        is_fault=not together,
    )


def fix_of_loading(found: Installation) -> str:
    """Return what makes a torch_npu load, or see NPUs, that does not."""
    if found.cann_home is None:
        return "install CANN (toolkit and kernels), then source its set_env.sh; without an NPU: pip uninstall torch_npu"
    if not found.cann_sourced:
        return f"source {_set_env(found.cann_home)}"
    for mismatch in mismatches(found):
        if mismatch.is_fault:
            return mismatch.fix
    if not found.npu_nodes:
        return "check `npu-smi info`; in a container, pass /dev/davinci* and mount /usr/local/Ascend/driver"
    return "check `npu-smi info`, and ASCEND_RT_VISIBLE_DEVICES"


def version(distribution: str) -> str | None:
    """Return the version of what pip installed under a name, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def minor(version: str) -> str:
    """Return the first two numbers of a version."""
    return ".".join(version.split(".")[:2])


def _cann_homes(root: Path, environment: Mapping[str, str]) -> Iterator[Path]:
    for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"):
        if name in environment:
            yield Path(environment[name])
    for base in (root / "usr/local/Ascend", Path(environment.get("HOME", "/root")) / "Ascend"):
        yield from (base / "cann", base / "ascend-toolkit/latest", base / "nnae/latest")


def _cann_version(home: Path) -> str | None:
    notes = sorted((*home.glob("ascend_*_install.info"), *home.glob("*-linux/ascend_*_install.info")))
    return next((version for note in notes if (version := _field(note, "version"))), None)


def _field(path: Path, name: str) -> str | None:
    """Return the value of a line `name=value`, whatever its case."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    pairs = (line.partition("=") for line in lines)
    return next((value.strip() for key, _, value in pairs if key.strip().lower() == name), None)


def _set_env(home: Path) -> Path:
    beside = home.parent / "set_env.sh"  # ascend-toolkit/set_env.sh stands beside ascend-toolkit/latest
    return beside if beside.is_file() else home / "set_env.sh"
