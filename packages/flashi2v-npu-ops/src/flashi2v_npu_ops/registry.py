"""Which implementation serves an operator: chosen by name, or the best one that can serve the call.

A backend is `reference` (plain torch, the specification), `torch` (PyTorch's own fused paths), `ascend` or `cuda`.
Nothing falls back in silence: a backend asked for by name serves the call or raises, and where "auto" has to pass
over the backend that it prefers on a device, it says so once.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

logger = logging.getLogger(__name__)

BACKENDS = ("ascend", "cuda", "torch", "reference")  # in the order in which "auto" tries them


class UnsupportedError(ValueError):
    """A backend was asked for that is unknown, or that cannot serve this call on this device."""


@dataclass(frozen=True)
class Implementation:
    """One backend's version of one operator.

    `obstacle` takes the device and then the operator's own arguments, and returns why this call cannot be served,
    or None.
    """

    operator: str
    backend: str
    call: Callable[..., Any]
    obstacle: Callable[..., str | None]


_implementations: dict[str, dict[str, Implementation]] = {}
_chosen: dict[str, str] = {}


def _no_obstacle(device: torch.device, *args: Any, **kwargs: Any) -> str | None:
    return None


def register(
    operator: str, backend: str, *, obstacle: Callable[..., str | None] = _no_obstacle
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a function as `backend`'s version of `operator`."""
    assert backend in BACKENDS, backend

    def add(call: Callable[..., Any]) -> Callable[..., Any]:
        _implementations.setdefault(operator, {})[backend] = Implementation(operator, backend, call, obstacle)
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
    """Make `backend` the one that "auto" stands for in this process; "auto" restores the choice by device.

    Raises:
        UnsupportedError: the operator or its backend is unknown.
    """
    if backend == "auto":
        _chosen.pop(operator, None)
        return
    _find(operator, backend)
    _chosen[operator] = backend


def dispatch(operator: str, backend: str, device: torch.device, *args: Any, **kwargs: Any) -> Any:
    """Run `operator` on `backend`, or on the first one that can serve the call.

    Raises:
        UnsupportedError: the named backend is unknown or cannot serve this call.
    """
    if backend == "auto":
        backend = _chosen.get(operator, "auto")
    if backend != "auto":
        implementation = _find(operator, backend)
        reason = implementation.obstacle(device, *args, **kwargs)
        if reason is not None:
            raise UnsupportedError(f"{operator}: backend {backend!r} cannot serve this call: {reason}")
        return implementation.call(*args, **kwargs)
    for implementation in _in_order(operator):
        reason = implementation.obstacle(device, *args, **kwargs)
        if reason is None:
            return implementation.call(*args, **kwargs)
        _report_once(operator, implementation.backend, reason)
    raise AssertionError(f"{operator} has no reference backend")


def _in_order(operator: str) -> list[Implementation]:
    return [_implementations[operator][name] for name in backends(operator)]


def _find(operator: str, backend: str) -> Implementation:
    known = backends(operator)
    if backend not in known:
        raise UnsupportedError(f"{operator} has no backend {backend!r}: choose one of auto, {', '.join(known)}")
    return _implementations[operator][backend]


@cache
def _report_once(operator: str, backend: str, reason: str) -> None:
    logger.info("%s: passing over backend %s: %s", operator, backend, reason)
