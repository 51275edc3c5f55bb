"""Which backend serves an operator: the one that was named, or the first that can serve the call.

A `Backend` is a set of implementations: `reference` (plain torch, the specification), `torch` (PyTorch's own fused
paths), `ascend`, `cuda`, `taps` and `unfold` (convolutions in other words), and whatever other distributions offer as
entry points of the group `flashi2v_npu_ops.backends`. They are loaded when the first operator is called, not on import.
`cudnn`, `flash3` and `bf16` are taken by name alone: they stand behind the reference, which serves every case.

What a choice may depend on is a call's `Case`. So "auto" decides once per case, and a compiled graph holds the
decision as a constant. What a kernel cannot do is said by its backend, never by the operator's contract.

Nothing falls back in silence: a backend asked for by name serves the call or raises, and where "auto" has to pass
over a backend made for the call's device, it says so once.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module, metadata
from operator import index
from typing import Any, TypeVar

import torch

logger = logging.getLogger(__name__)

ENTRY_POINTS = "flashi2v_npu_ops.backends"
ENVIRONMENT = "FLASHI2V_OPS_BACKEND"
_AUTO = "auto"


class UnsupportedError(ValueError):
    """A backend or device was asked for that is unknown, or that cannot serve the call."""

    exit_code = 2


@dataclass(frozen=True)
class Case:
    """What the choice of a backend may depend on: facts of a call that hardly change within a program."""

    device: str  # type of the tensors' device: "cpu", "cuda", "npu", "meta", ...
    dtype: torch.dtype  # of the operator's main argument
    num_heads: int = 1
    head_size: int = 128
    masked: bool = False  # attention is given a mask


@dataclass(frozen=True)
class Choice:
    """The backend for a case, and the reasons against those made for its device that come before it."""

    backend: str
    passed_over: dict[str, str]


@dataclass(frozen=True)
class Implementation:
    """One backend's version of one operator; `obstacle` says why a case cannot be served, or None."""

    call: Callable[..., Any]
    obstacle: Callable[[Case], str | None]


def _no_obstacle(case: Case) -> str | None:
    return None


_Call = TypeVar("_Call", bound=Callable[..., Any])


class Backend:
    """Implementations of operators that belong together.

    Args:
        name: what users choose it by.
        device: the type of device that it is made for; None: it runs on any.
    """

    def __init__(self, name: str, device: str | None = None) -> None:
        self.name = name
        self.device = device
        self.implementations: dict[str, Implementation] = {}

    def serves(
        self, operator: str, *, obstacle: Callable[[Case], str | None] = _no_obstacle
    ) -> Callable[[_Call], _Call]:
        """Decorate a function as this backend's version of an operator.

        The function takes what the operator's reference takes. `obstacle` says why it cannot serve a case, or None.
        """

        def add(call: _Call) -> _Call:
            self.implementations[operator] = Implementation(call, obstacle)
            return call

        return add

    def is_for(self, device: str) -> bool:
        """Say whether tensors on this type of device are what the backend is made for."""
        return self.device in (None, device)


reference = Backend("reference")
_backends: dict[str, Backend] = {}  # all, in the order in which "auto" tries them, once they are loaded
_faults: dict[str, str] = {}  # entry points that gave no backend, and why
_overrides: dict[str, str] = {}


def all_backends() -> dict[str, Backend]:
    """Return all backends by name, in the order in which "auto" tries them: other distributions' go before ours."""
    if not _backends:
        import_module("flashi2v_npu_ops.operators")  # with every operator comes its reference
        names = ("ascend", "cuda", "torch")
        ours = {name: import_module(f"flashi2v_npu_ops.backends.{name}").backend for name in names}
        flat = import_module("flashi2v_npu_ops.backends.flat")
        ours |= {"taps": flat.taps, "unfold": flat.unfold}
        ours["reference"] = reference
        cuda, bf16 = (import_module(f"flashi2v_npu_ops.backends.{name}") for name in ("cuda", "bf16"))
        ours |= {"cudnn": cuda.cudnn, "flash3": cuda.flash3, "bf16": bf16.backend}
        others: dict[str, Backend] = {}
        for entry in sorted(metadata.entry_points(group=ENTRY_POINTS), key=lambda entry: entry.name):
            try:
                others[entry.name] = _checked(entry.load(), entry.name, taken={_AUTO, *ours, *others})
            except Exception as error:  # another project's code, which may fail in any way
                _faults.setdefault(entry.name, f"{type(error).__name__}: {error}")
                logger.warning("backend %r (%s) does not load: %s", entry.name, entry.value, error)
        _backends.update(others | ours)
    return _backends


def _checked(backend: Any, name: str, taken: set[str]) -> Backend:
    if not isinstance(backend, Backend):
        raise TypeError(f"its entry point leads to {backend!r}, not to a Backend")
    if backend.name != name or name in taken:
        raise ValueError(f"its entry point is called {name!r}, the backend {backend.name!r}: both must be one new name")
    unknown = sorted(backend.implementations.keys() - reference.implementations.keys())
    if unknown:
        raise ValueError(f"it serves operators that have no reference: {', '.join(unknown)}")
    return backend


def faults() -> dict[str, str]:
    """Return the entry points that gave no backend, and why."""
    all_backends()
    return dict(_faults)


def operators() -> tuple[str, ...]:
    """Return the names of all operators."""
    all_backends()
    return tuple(sorted(reference.implementations))


def backends(operator: str) -> tuple[str, ...]:
    """Return the backends that implement an operator, in the order in which "auto" tries them.

    Raises:
        UnsupportedError: no operator has this name.
    """
    if operator not in operators():
        raise UnsupportedError(f"unknown operator {operator!r}: choose one of {', '.join(operators())}")
    return tuple(name for name, backend in all_backends().items() if operator in backend.implementations)


def set_backend(operator: str, backend: str) -> None:
    """Make `backend` the one that "auto" stands for in this process; "auto" restores the choice by case.

    Raises:
        UnsupportedError: the operator or its backend is unknown.
    """
    _check(operator, backend)
    if backend == _AUTO:
        _overrides.pop(operator, None)
    else:
        _overrides[operator] = backend


@contextlib.contextmanager
def use_backend(operator: str, backend: str) -> Iterator[None]:
    """Within the context, make `backend` the one that "auto" stands for.

    This holds in all threads, so contexts for one operator must not overlap in several of them.

    Raises:
        UnsupportedError: the operator or its backend is unknown.
    """
    before = _overrides.get(operator, _AUTO)
    set_backend(operator, backend)
    try:
        yield
    finally:
        set_backend(operator, before)


def check_floating(operator: str, x: torch.Tensor) -> None:
    """Raise a ValueError unless `x`, the operator's main argument, holds floating-point numbers."""
    if not x.is_floating_point():
        raise ValueError(f"{operator} takes floating-point tensors, got {x.dtype}")


def explain(operator: str, case: Case, backend: str = _AUTO) -> Choice:
    """Return the backend that serves a case, and why not a faster one.

    What "auto" means is decided by `set_backend` and `use_backend`, then by the environment variable
    FLASHI2V_OPS_BACKEND: a backend for all operators that have it, or `operator=backend` pairs, or both, with commas
    between.

    Raises:
        UnsupportedError: a backend was named, by argument or variable, that is unknown or cannot serve the case.
    """
    if backend == _AUTO:
        backend = _overrides.get(operator) or _environment().get(operator, _AUTO)
    _check(operator, backend)
    if backend != _AUTO:
        reason = _obstacle(operator, backend, case)
        if reason is not None:
            raise UnsupportedError(f"{operator}: backend {backend!r} cannot serve this call: {reason}")
        return Choice(backend, {})
    return _first_serving(operator, case)


def _first_serving(operator: str, case: Case) -> Choice:
    passed_over: dict[str, str] = {}
    for name in backends(operator):
        if _backends[name].is_for(case.device):
            reason = _obstacle(operator, name, case)
            if reason is None:
                return Choice(name, passed_over)
            passed_over[name] = reason
    raise AssertionError(f"the reference of {operator} must serve every case")


def _obstacle(operator: str, name: str, case: Case) -> str | None:
    backend = _backends[name]
    if not backend.is_for(case.device):
        return f"it runs on {backend.device} devices, the tensors are on {case.device}"
    return backend.implementations[operator].obstacle(case)


def dispatch(
    operator: str,
    backend: str,
    x: torch.Tensor,
    *args: Any,
    num_heads: int = 1,
    head_size: int = 128,
    masked: bool = False,
) -> Any:
    """Run `operator` on `backend`, or on the first one that can serve the case.

    `x` is the main argument, whose device and dtype count; `args` are all others, as implementations take them. What
    has a name belongs to the `Case`.

    Raises:
        UnsupportedError: the named backend is unknown or cannot serve the case.
    """
    if backend == _AUTO:
        backend = _overrides.get(operator, _AUTO)
    device = x.device.type
    # Flat, and plain numbers: what a compiler can take for constants.
    facts = device, x.dtype, index(num_heads), index(head_size), masked
    chosen, refusal = _choose(operator, backend, *facts)
    if refusal:
        raise UnsupportedError(refusal)
    call = _backends[chosen].implementations[operator].call
    if device != "meta" and torch.is_autocast_enabled(device):  # shapes alone have no autocast to ask about
        # The contracts say in which precision an operator computes, and it would not be the one of autocast.
        with torch.autocast(device, enabled=False):
            return call(x, *args)
    return call(x, *args)


def fastest(operator: str, *facts: Any) -> Callable[..., Any]:
    """Return the implementation that "auto" would take if nobody had chosen one, for a backend that builds on others.

    Args:
        operator: its name.
        facts: those of a `Case`, in order.
    """
    return _backends[_fastest(operator, *facts)].implementations[operator].call


@torch.compiler.assume_constant_result
def _fastest(operator: str, *facts: Any) -> str:
    return _first_serving(operator, Case(*facts)).backend


@torch.compiler.assume_constant_result
def _choose(operator: str, backend: str, *facts: Any) -> tuple[str, str]:
    return _choose_once(operator, backend, *facts)


@lru_cache(maxsize=1024)
def _choose_once(operator: str, backend: str, *facts: Any) -> tuple[str, str]:
    """Return the backend, or the reason why none serves: a compiler would turn an error raised here into its own."""
    try:
        choice = explain(operator, Case(*facts), backend)
    except UnsupportedError as error:
        return "", str(error)
    for name, reason in choice.passed_over.items():
        _report_once(operator, name, reason)
    return choice.backend, ""


@lru_cache(maxsize=1024)
def _report_once(operator: str, backend: str, reason: str) -> None:
    logger.warning("%s: passing over backend %s: %s", operator, backend, reason)


@lru_cache(maxsize=1)
def _environment() -> dict[str, str]:
    chosen: dict[str, str] = {}
    text = os.environ.get(ENVIRONMENT, "")
    pairs = [part.strip().rpartition("=") for part in text.split(",") if part.strip()]
    try:
        for _, sign, backend in pairs:
            if not sign:
                if backend not in (_AUTO, *all_backends()):
                    raise UnsupportedError(_unknown(backend, f"unknown backend {backend!r}", all_backends()))
                chosen.update({name: backend for name in operators() if backend in (_AUTO, *backends(name))})
        for operator, sign, backend in pairs:
            if sign:
                _check(operator.strip(), backend.strip())
                chosen[operator.strip()] = backend.strip()
    except UnsupportedError as error:
        raise UnsupportedError(f"{error} (from {ENVIRONMENT}={text!r})") from None
    return chosen


def check_environment(device: str) -> None:
    """Refuse a FLASHI2V_OPS_BACKEND that no call on a type of device can honour; for programs, before they load models.

    Raises:
        UnsupportedError: it names an operator or backend that is unknown, or a backend made for other devices.
    """
    for operator, name in _environment().items():
        if name != _AUTO and not _backends[name].is_for(device):
            raise UnsupportedError(
                f"{operator}: backend {name!r} runs on {_backends[name].device} devices, not on {device} "
                f"(from {ENVIRONMENT}={os.environ[ENVIRONMENT]!r})"
            )


def _check(operator: str, backend: str) -> None:
    known = backends(operator)
    if backend not in (_AUTO, *known):
        raise UnsupportedError(_unknown(backend, f"{operator} has no backend {backend!r}", known))


def _unknown(backend: str, what: str, known: Iterable[str]) -> str:
    if backend in _faults:
        return f"backend {backend!r} does not load: {_faults[backend]}"
    return f"{what}: choose one of {_AUTO}, {', '.join(known)}"
