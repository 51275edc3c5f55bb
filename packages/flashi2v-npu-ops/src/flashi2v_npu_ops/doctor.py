"""What this machine has, which backend serves which operator, and what keeps a faster one from working.

The survey reads files and environment variables, so it also works where torch_npu does not load. Places and names of
Ascend's files: CANN's installation guide ("checking the installation"), and torch_npu's own collect_env.
"""

import contextlib
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

import flashi2v_npu_ops
from flashi2v_npu_ops import device, registry
from flashi2v_npu_ops.probe import Probe, probe_all, setting
from flashi2v_npu_ops.registry import ENVIRONMENT, Case, UnsupportedError, explain

# CANN that each torch_npu was released with, and the range in which Ascend's release notes call any pair compatible.
# Source: README of the Ascend extension for PyTorch, and its release notes 7.1.0 to 26.2.0.
_RELEASED_WITH = {
    "8.2": ("2.6.0",),
    "8.3": ("2.6.0.post3", "2.7.1", "2.8.0"),
    "8.5": ("2.6.0.post5", "2.7.1.post2", "2.8.0.post2", "2.9.0"),
    "9.0": ("2.7.1.post4", "2.8.0.post4", "2.9.0.post2", "2.10.0"),
    "9.1": ("2.7.1.post8", "2.9.0.post6", "2.10.0.post4", "2.11.0", "2.12.0"),
    "9.2": ("2.7.1.post11", "2.9.0.post9", "2.10.0.post7", "2.11.0.post3", "2.12.0.post3", "2.13.0", "2.14.0"),
}
_COMPATIBLE = ("8.5", "9.0", "9.1", "9.2")

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Survey:
    """What was found on the machine; None where it was not."""

    torch: str  # version, as are the others that are not said to be something else
    torch_npu: str | None  # whether or not it loads
    torch_npu_fault: str | None  # why it does not load, or sees no NPU
    cann: str | None
    cann_home: Path | None  # its directory
    cann_sourced: bool  # the environment of CANN's set_env.sh is there
    driver: str | None  # of Ascend
    npu_nodes: int  # device nodes of NPUs
    nvidia_driver: str | None  # what the NVIDIA driver that is loaded says of itself
    cuda_fault: str | None  # why PyTorch cannot use a CUDA device
    autoload: bool  # torch loads extensions such as torch_npu by itself when it is imported


@dataclass(frozen=True)
class Finding:
    """Something to know, and the command or setting that fixes it; a fault makes the doctor's exit code 1."""

    what: str
    fix: str
    is_fault: bool = True


@dataclass(frozen=True)
class Served:
    """What serves an operator on a device, by dtype: "fp32", "bf16", "fp16"."""

    backends: tuple[str, ...]  # all that implement it, in the order in which "auto" tries them
    by: dict[str, str]  # a dtype that FLASHI2V_OPS_BACKEND leaves without one is not in it
    passed_over: dict[str, dict[str, str]]  # faster ones that are made for the device, and why they do not serve


@dataclass(frozen=True)
class Report:
    """All that the doctor says, as `doctor --json` prints it."""

    version: str  # of this package
    python: str
    platform: str
    survey: Survey
    cuda: str | None  # version that torch was built with
    cudnn: int | None
    flash_attn: str | None
    missing: dict[str, str | None]  # per type of device, why it cannot be used
    devices: dict[str, str]  # per type that can be used, what it calls itself
    asked: str  # the device that is wanted
    chosen: str | None  # the device that this is; None: it cannot work
    collectives: str | None  # the backend of torch.distributed for it
    backends: dict[str, str | None]  # all, in the order in which "auto" tries them, and what each is made for
    operators: dict[str, Served]  # on the chosen device
    probes: list[Probe]  # what became of each operator that was tried, if any was
    route: str | None  # the line for the shell that leads around operators that failed
    findings: list[Finding]

    @property
    def is_at_fault(self) -> bool:
        """Whether something that was asked for cannot work."""
        return any(finding.is_fault for finding in self.findings)


def survey(root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> Survey:
    """Look at the machine, files under `root`."""
    cann_home = next((home for home in _cann_homes(root, environment) if home.is_dir()), None)
    return Survey(
        torch=torch.__version__,
        torch_npu=_version("torch_npu"),
        torch_npu_fault=device.missing("npu"),
        cann=None if cann_home is None else _cann_version(cann_home),
        cann_home=cann_home,
        cann_sourced="ASCEND_HOME_PATH" in environment,
        driver=_field(root / "usr/local/Ascend/driver/version.info", "version"),
        npu_nodes=len(list((root / "dev").glob("davinci[0-9]*"))),
        nvidia_driver=_first_line(root / "proc/driver/nvidia/version"),
        cuda_fault=device.missing("cuda"),
        autoload=environment.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "1",
    )


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cann_homes(root: Path, environment: Mapping[str, str]) -> Iterator[Path]:
    for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"):
        if name in environment:
            yield Path(environment[name])
    for base in (root / "usr/local/Ascend", Path(environment.get("HOME", "/root")) / "Ascend"):
        yield from (base / "cann", base / "ascend-toolkit/latest", base / "nnae/latest")


def _cann_version(home: Path) -> str | None:
    notes = sorted((*home.glob("ascend_*_install.info"), *home.glob("*-linux/ascend_*_install.info")))
    return next((version for note in notes if (version := _field(note, "version"))), None)


def _first_line(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").partition("\n")[0].removeprefix("NVRM version:").strip()
    except OSError:
        return None


def _field(path: Path, name: str) -> str | None:
    """Return the value of a line `name=value`, whatever its case."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    pairs = (line.partition("=") for line in lines)
    return next((value.strip() for key, _, value in pairs if key.strip().lower() == name), None)


def diagnose(found: Survey, asked: str = "auto") -> list[Finding]:
    """Return what is wrong or worth knowing on a machine where the device `asked` is wanted."""
    return [*_npu_findings(found, asked), *_version_findings(found), *_other_findings(found, asked)]


def _npu_findings(found: Survey, asked: str) -> Iterator[Finding]:
    is_fault = asked in ("auto", "npu")  # who asks for another device can do without
    if found.torch_npu is None:
        if found.npu_nodes or found.cann_home:
            yield Finding(
                "this machine has Ascend software or NPUs, but torch_npu is not installed",
                f"pip install 'flashi2v-npu-ops[npu]' 'torch_npu=={_minor(found.torch)}.*'",
                is_fault,
            )
        return
    if found.torch_npu_fault is None:
        return
    if found.cann_home is None:
        fix = "install CANN (toolkit and kernels), then source its set_env.sh; without an NPU: pip uninstall torch_npu"
    elif not found.cann_sourced:
        fix = f"source {_set_env(found.cann_home)}"
    elif not found.npu_nodes:
        fix = "check `npu-smi info`; in a container, pass /dev/davinci* and mount /usr/local/Ascend/driver"
    else:
        fix = "check `npu-smi info`, and that CANN's version fits torch_npu's (below)"
    yield Finding(found.torch_npu_fault, fix, is_fault)
    if found.autoload and (found.cann_home is None or not found.cann_sourced):
        yield Finding(
            "`import torch` fails here, as torch loads torch_npu by itself",
            "export TORCH_DEVICE_BACKEND_AUTOLOAD=0, until the above is fixed",
            is_fault,
        )


def _set_env(home: Path) -> Path:
    beside = home.parent / "set_env.sh"  # ascend-toolkit/set_env.sh stands beside ascend-toolkit/latest
    return beside if beside.is_file() else home / "set_env.sh"


def _version_findings(found: Survey) -> Iterator[Finding]:
    if found.torch_npu is None:
        return
    if _minor(found.torch) != _minor(found.torch_npu):
        yield Finding(
            f"torch {found.torch} and torch_npu {found.torch_npu} do not match: each torch_npu fits one torch",
            f"pip install 'torch_npu=={_minor(found.torch)}.*'",
        )
    released_with = next((cann for cann, releases in _RELEASED_WITH.items() if found.torch_npu in releases), None)
    if found.cann is None or released_with is None or _minor(found.cann) == released_with:
        return
    together = {_minor(found.cann), released_with} <= set(_COMPATIBLE)
    yield Finding(
        f"torch_npu {found.torch_npu} was released with CANN {released_with}, this is {found.cann}"
        + (", which Ascend's release notes call compatible" if together else ""),
        f"if operators fail, install CANN {released_with}" if together else f"install CANN {released_with}",
        is_fault=not together,
    )


def _other_findings(found: Survey, asked: str) -> Iterator[Finding]:
    if found.nvidia_driver is not None and torch.version.cuda is None:
        yield Finding(
            f"there is an NVIDIA driver, but torch {found.torch} is built without CUDA",
            "install a CUDA build of torch: https://pytorch.org/get-started/locally",
            is_fault=asked == "cuda",
        )
    if found.cuda_fault is None and found.torch_npu is not None and found.torch_npu_fault is None:
        yield Finding("CUDA and NPU are both present; auto picks the NPU", "name the device to choose", is_fault=False)
    try:
        device.resolve_device(asked)
    except UnsupportedError as error:
        yield Finding(str(error), "fix what is said above, or choose another device")


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def serve(operator: str, device_type: str) -> tuple[Served, list[Finding]]:
    """Return what serves an operator on a device, and the faults of FLASHI2V_OPS_BACKEND."""
    by, passed_over, findings = {}, {}, []
    for label, dtype in _DTYPES.items():
        try:
            choice = explain(operator, Case(device_type, dtype))
        except UnsupportedError as error:
            findings.append(Finding(str(error), f"unset or correct {ENVIRONMENT}"))
            continue
        by[label], passed_over[label] = choice.backend, choice.passed_over
    return Served(registry.backends(operator), by, passed_over), findings


def examine(
    asked: str = "auto", environment: Mapping[str, str] = os.environ, probe_seconds: float | None = None
) -> Report:
    """Look at everything.

    Args:
        asked: the device that is wanted.
        environment: the variables that count.
        probe_seconds: run every operator, so many seconds at most; None: none.
    """
    found = survey(environment=environment)
    findings = diagnose(found, asked)
    for name, reason in registry.faults().items():
        findings.append(Finding(f"backend {name!r} does not load: {reason}", "correct or uninstall what offers it"))
    chosen = collectives = None
    serving: dict[str, Served] = {}
    with contextlib.suppress(UnsupportedError):  # which is among the findings
        device_found = device.resolve_device(asked)
        chosen, collectives = str(device_found), device.collective_backend(device_found)
        for operator in registry.operators():
            serving[operator], at_fault = serve(operator, device_found.type)
            findings += at_fault
    probes, route = [], None
    if probe_seconds is not None and chosen is not None:
        probes = list(probe_all(chosen, probe_seconds))
        route, at_fault = _routed(probes)
        findings += at_fault
    missing = {kind: device.missing(kind) for kind in ("npu", "cuda", "cpu")}
    return Report(
        version=flashi2v_npu_ops.__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        survey=found,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        flash_attn=_version("flash-attn"),
        missing=missing,
        devices={kind: device.name(kind) for kind, reason in missing.items() if reason is None},
        asked=asked,
        chosen=chosen,
        collectives=collectives,
        backends={name: backend.device for name, backend in registry.all_backends().items()},
        operators=serving,
        probes=probes,
        route=route,
        findings=list(dict.fromkeys(findings)),
    )


def _routed(probes: list[Probe]) -> tuple[str | None, list[Finding]]:
    """Return the setting that leads around operators that failed, and the findings about them."""
    try:
        route = setting(probes)
    except LookupError as error:
        what = f"{error.args[0]} computes with no backend what it computes on a CPU"
        return None, [Finding(what, "report it with the output of doctor --probe --json")]
    failed = dict.fromkeys(f"{each.operator} by {each.backend}" for each in probes if each.verdict != "right")
    return route, [Finding(f"not as on a CPU: {', '.join(failed)}", route)] if route else []


def lines(report: Report) -> Iterator[str]:
    """Yield the report for people to read."""
    found = report.survey
    cann = f"{found.cann or 'of unknown version'} in {found.cann_home}" if found.cann_home else "not found"
    yield f"flashi2v-npu-ops  {report.version}"
    yield f"Python            {report.python} on {report.platform}"
    yield f"torch             {found.torch}"
    yield f"torch_npu         {found.torch_npu or 'not installed'}"
    yield f"CANN              {cann}{'' if found.cann_sourced or not found.cann_home else ' (set_env.sh not sourced)'}"
    yield f"Ascend driver     {found.driver or 'not found'}, {found.npu_nodes} NPU device nodes"
    yield f"NVIDIA driver     {found.nvidia_driver or 'not found'}"
    yield f"torch's CUDA      {report.cuda or 'built without'}, cuDNN {report.cudnn or 'none'}"
    yield f"flash-attn        {report.flash_attn or 'not installed'}"
    yield ""
    for kind, reason in report.missing.items():
        yield f"device {kind:<10} {reason or 'available: ' + report.devices[kind]}"
    if report.chosen is None:
        yield f"asked for         {report.asked}, which cannot work"
    else:
        yield f"{report.asked} is {report.chosen} (collectives: {report.collectives})"
        yield ""
        yield from (_row(operator, served) for operator, served in report.operators.items())
    for each in report.probes:
        measured = f"{each.milliseconds:.1f} ms, off by {each.error:.1e}" if each.error is not None else each.words
        yield f"{each.operator:<20} {each.size} {each.dtype} {each.backend:<10} {each.verdict:<8} {measured}"
    yield ""
    for finding in report.findings:
        yield f"{'FAULT' if finding.is_fault else 'note '}  {finding.what}"
        yield f"       -> {finding.fix}"
    if not report.findings:
        yield "nothing is wrong"


def _row(operator: str, served: Served) -> str:
    """Return what serves an operator, and why nothing faster does."""
    by: dict[str, list[str]] = {}
    reasons: dict[str, list[str]] = {}
    for label, backend in served.by.items():
        by.setdefault(backend, []).append(label)
        for name, reason in served.passed_over[label].items():
            reasons.setdefault(f"not {name}: {reason}", []).append(label)
    serving = ", ".join(_with_dtypes(backend, labels) for backend, labels in by.items())
    why = "; ".join(_with_dtypes(reason, labels) for reason, labels in reasons.items())
    return f"{operator:<20} {serving or 'nothing':<12} of {', '.join(served.backends)}" + (f"  ({why})" if why else "")


def _with_dtypes(text: str, labels: list[str]) -> str:
    return text if len(labels) == len(_DTYPES) else f"{text} ({', '.join(labels)})"
