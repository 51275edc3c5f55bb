"""Which implementation serves an operator: chosen by name, or the best one that can serve the call.

A backend is `reference` (plain torch, the specification), `torch` (PyTorch's own fused paths), `ascend` or `cuda`.
What a choice may depend on is a call's case: the device's type, the dtype, and facts such as "masked" or "head size up
to 128", never a size itself. So "auto" decides once per case, and a compiled graph holds the decision as a constant.

Nothing falls back in silence: a backend asked for by name serves the call or raises, and where "auto" has to pass
over a backend made for the call's device, it says so once.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

logger = logging.getLogger(__name__)

BACKENDS = ("ascend", "cuda", "torch", "reference")  # in the order in which "auto" tries them
ENVIRONMENT = "FLASHI2V_OPS_BACKEND"
_MADE_FOR = {"ascend": "npu", "cuda": "cuda"}  # the others run anywhere

# (device type, dtype, facts of the operator's own ...)
Case = tuple[Any, ...]


class UnsupportedError(ValueError):
    """A backend was asked for that is unknown, or that cannot serve this call on this device."""

    exit_code = 2


@dataclass(frozen=True)
class Implementation:
    """One backend's version of one operator; `obstacle` says of a case why it cannot be served, or None."""

    call: Callable[..., Any]
    obstacle: Callable[..., str | None]


@dataclass(frozen=True)
class Choice:
    """The backend for a case, and the reasons against those made for its device that come before it."""

    backend: str
    passed_over: dict[str, str]


_implementations: dict[str, dict[str, Implementation]] = {}
_overrides: dict[str, str] = {}


def _no_obstacle(*case: Any) -> str | None:
    return None


def register(
    operator: str, backend: str, *, obstacle: Callable[..., str | None] = _no_obstacle
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a function as `backend`'s version of `operator`; `obstacle` takes the parts of a case."""
    assert backend in BACKENDS, backend

    def add(call: Callable[..., Any]) -> Callable[..., Any]:
        _implementations.setdefault(operator, {})[backend] = Implementation(call, obstacle)
        return call

    return add


def operators() -> tuple[str, ...]:
    """Return the names of all operators."""
    return tuple(sorted(_implementations))


def backends(operator: str) -> tuple[str, ...]:
    """Return the backends that implement an operator, in the order in which "auto" tries them.

    Raises:
        UnsupportedError: no operator has this name.
    """
    if operator not in _implementations:
        raise UnsupportedError(f"unknown operator {operator!r}: choose one of {', '.join(operators())}")
    return tuple(name for name in BACKENDS if name in _implementations[operator])


def set_backend(operator: str, backend: str) -> None:
    """Make `backend` the one that "auto" stands for in this process; "auto" restores the choice by case.

    Raises:
        UnsupportedError: the operator or its backend is unknown.
    """
    _check(operator, backend)
    if backend == "auto":
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
    before = _overrides.get(operator, "auto")
    set_backend(operator, backend)
    try:
        yield
    finally:
        set_backend(operator, before)


def check_floating(operator: str, x: torch.Tensor) -> None:
    """Raise a ValueError unless `x`, the operator's main argument, holds floating-point numbers."""
    if not x.is_floating_point():
        raise ValueError(f"{operator} takes floating-point tensors, got {x.dtype}")


def _obstacle(operator: str, backend: str, case: Case) -> str | None:
    made_for = _MADE_FOR.get(backend)
    if made_for not in (None, case[0]):
        return f"it runs on {made_for} devices, the tensors are on {case[0]}"
    return _implementations[operator][backend].obstacle(*case)


def explain(operator: str, case: Case, backend: str = "auto") -> Choice:
    """Return the backend that serves a case, and why not a faster one.

    What "auto" means is decided by `set_backend` and `use_backend`, then by the environment variable
    FLASHI2V_OPS_BACKEND: a backend for all operators that have it, or `operator=backend` pairs, or both, with commas
    between.

    Raises:
        UnsupportedError: a backend was named, by argument or variable, that is unknown or cannot serve the case.
    """
    if backend == "auto":
        backend = _overrides.get(operator) or _environment().get(operator, "auto")
    _check(operator, backend)
    if backend != "auto":
        reason = _obstacle(operator, backend, case)
        if reason is not None:
            raise UnsupportedError(f"{operator}: backend {backend!r} cannot serve this call: {reason}")
        return Choice(backend, {})
    passed_over: dict[str, str] = {}
    for name in backends(operator):
        if _MADE_FOR.get(name) in (None, case[0]):
            reason = _obstacle(operator, name, case)
            if reason is None:
                return Choice(name, passed_over)
            passed_over[name] = reason
    raise AssertionError(f"the reference of {operator} must serve every case")


def dispatch(operator: str, backend: str, case: Case, *args: Any) -> Any:
    """Run `operator` on `backend`, or on the first one that can serve the case.

    Raises:
        UnsupportedError: the named backend is unknown or cannot serve the case.
    """
    if backend == "auto":
        backend = _overrides.get(operator, "auto")
    call = _implementations[operator][_choose(operator, backend, case)].call
    if case[0] != "meta" and torch.is_autocast_enabled(case[0]):  # shapes alone have no autocast to ask about
        # The contracts say in which precision an operator computes, and it would not be the one of autocast.
        with torch.autocast(case[0], enabled=False):
            return call(*args)
    return call(*args)


@torch.compiler.assume_constant_result
def _choose(operator: str, backend: str, case: Case) -> str:
    return _choose_once(operator, backend, case)


@lru_cache(maxsize=1024)
def _choose_once(operator: str, backend: str, case: Case) -> str:
    choice = explain(operator, case, backend)
    for name, reason in choice.passed_over.items():
        _report_once(operator, name, reason)
    return choice.backend


@lru_cache(maxsize=1024)
def _report_once(operator: str, backend: str, reason: str) -> None:
    logger.warning("%s: passing over backend %s: %s", operator, backend, reason)


@lru_cache(maxsize=1)
def _environment() -> dict[str, str]:
    chosen: dict[str, str] = {}
    text = os.environ.get(ENVIRONMENT, "")
    try:
        pairs = [part.strip().rpartition("=") for part in text.split(",") if part.strip()]
        for _, sign, backend in pairs:
            if not sign:
                if backend not in ("auto", *BACKENDS):
                    raise UnsupportedError(f"unknown backend {backend!r}: choose one of auto, {', '.join(BACKENDS)}")
                chosen.update({name: backend for name in operators() if backend in ("auto", *backends(name))})
        for operator, sign, backend in pairs:
            if sign:
                _check(operator.strip(), backend.strip())
                chosen[operator.strip()] = backend.strip()
    except UnsupportedError as error:
        raise UnsupportedError(f"{ENVIRONMENT}={text}: {error}") from None
    return chosen


def _check(operator: str, backend: str) -> None:
    known = backends(operator)
    if backend not in ("auto", *known):
        raise UnsupportedError(f"{operator} has no backend {backend!r}: choose one of auto, {', '.join(known)}")
