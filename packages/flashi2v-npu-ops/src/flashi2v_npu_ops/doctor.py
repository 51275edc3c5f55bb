"""What this machine has, which backend serves which operator, and what keeps a faster one from working."""

import contextlib
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

import flashi2v_npu_ops
from flashi2v_npu_ops import device, registry
from flashi2v_npu_ops.installation import Installation, find_installation, fix_of_loading, minor, mismatches, version
from flashi2v_npu_ops.probe import Probe, setting
from flashi2v_npu_ops.registry import ENVIRONMENT, Case, UnsupportedError, explain
from flashi2v_npu_ops.tested import installed, tested_sets, untested

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Survey(Installation):
    """What was found on the machine; None where it was not."""

    torch_npu_fault: str | None  # why it does not load, or sees no NPU
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
    return Survey(
        **vars(find_installation(root, environment)),
        torch_npu_fault=device.missing("npu"),
        nvidia_driver=_first_line(root / "proc/driver/nvidia/version"),
        cuda_fault=device.missing("cuda"),
        autoload=environment.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "1",
    )


def _first_line(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").partition("\n")[0].removeprefix("NVRM version:").strip()
    except OSError:
        return None


def diagnose(found: Survey, asked: str = "auto") -> list[Finding]:
    """Return what is wrong or worth knowing on a machine where the device `asked` is wanted."""
    versions = [Finding(each.what, each.fix, each.is_fault) for each in mismatches(found)]
    return [*_npu_findings(found, asked), *versions, *_other_findings(found, asked)]


def _npu_findings(found: Survey, asked: str) -> Iterator[Finding]:
    is_fault = asked in ("auto", "npu")  # who asks for another device can do without
    if found.torch_npu is None:
        if found.npu_nodes or found.cann_home:
            yield Finding(
                "this machine has Ascend software or NPUs, but torch_npu is not installed",
                f"pip install 'flashi2v-npu-ops[npu]' 'torch_npu=={minor(found.torch)}.*'",
                is_fault,
            )
        return
    if found.torch_npu_fault is None:
        return
    fix = fix_of_loading(found)
    yield Finding(found.torch_npu_fault.removesuffix(f": {fix}"), fix, is_fault)
    if found.autoload and (found.cann_home is None or not found.cann_sourced):
        yield Finding(
            "`import torch` fails here, as torch loads torch_npu by itself",
            "export TORCH_DEVICE_BACKEND_AUTOLOAD=0, until the above is fixed",
            is_fault,
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


def combination(versions: Mapping[str, str], sets: list[dict[str, str]]) -> Iterator[Finding]:
    """Yield what no set of versions that was tested has together with the others, if there is anything."""
    apart = untested(versions, sets)
    if apart:
        named = [f"{name} {versions[name]} (tested: {was or 'none'})" for name, was in apart.items()]
        pins = [f"'{name}=={minor(was)}.*'" for name, was in apart.items() if was and name != "CANN"]
        fix = f"pip install {' '.join(pins)}" if pins else "flashi2v-npu-ops doctor --probe"
        what = f"never tested together with what else is installed: {', '.join(named)}"
        yield Finding(what, f"if something fails: {fix}", is_fault=False)


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
    asked: str = "auto",
    environment: Mapping[str, str] = os.environ,
    probes: Callable[[str], Iterable[Probe]] | None = None,
) -> Report:
    """Look at everything.

    Args:
        asked: the device that is wanted.
        environment: the variables that count.
        probes: runs operators on a device, as `probe_all`; None: none is run.
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
    probed, route = [], None
    if probes is not None and chosen is not None:
        probed = list(probes(chosen))
        route, at_fault = _routed(probed)
        findings += at_fault
    findings += combination(installed(found), [*tested_sets()])
    missing = {kind: device.missing(kind) for kind in ("npu", "cuda", "cpu")}
    return Report(
        version=flashi2v_npu_ops.__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        survey=found,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        flash_attn=version("flash-attn"),
        missing=missing,
        devices={kind: device.name(kind) for kind, reason in missing.items() if reason is None},
        asked=asked,
        chosen=chosen,
        collectives=collectives,
        backends={name: backend.device for name, backend in registry.all_backends().items()},
        operators=serving,
        probes=probed,
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
