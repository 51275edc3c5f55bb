"""What stays the same over the steps of a sampling run, computed once.

The transformer fills a cache in the first call that is given it, not ahead of the run: only inside a call are weights
at hand that are offloaded or sharded in between.

S steps, B batch, F H W token grid, L text tokens, D width, K heads, d head size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")


class Store:
    """Values by name, each computed once. No dict, as the hooks of offloading would hand on a copy of one."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}

    def get(self, name: str, compute: Callable[[], T]) -> T:
        """Return what stands under a name, computing it the first time."""
        if name not in self._values:
            self._values[name] = compute()
        value: T = self._values[name]
        return value


def remembered(store: Store | None, name: str, compute: Callable[[], T]) -> T:
    """Return what stands under a name of the store; without a store, compute it."""
    return compute() if store is None else store.get(name, compute)


@dataclass(frozen=True)
class CachedStep:
    """One call of the transformer within a run.

    Attributes:
        step: number of the step, from 0.
        timesteps: (S,), of all steps.
        video: what depends on neither step nor prompt: the embedded Fourier features (B, D, F, H, W), and time (S, D)
            with its modulation (S, 6, D) for all steps.
        prompt: what depends on the prompt: the embedded text (B, L, D), and a store for every block, for keys and
            values (B, L, K, d) of its cross attention.
    """

    step: int
    timesteps: Tensor
    video: Store
    prompt: Store

    def of_block(self, number: int) -> Store:
        """Return the store of a block."""
        return self.prompt.get(f"block {number}", Store)


class SamplingCache:
    """What the steps of a run with one first frame and one prompt for every video have in common.

    Args:
        timesteps: (S,), of all steps.
        video: of another cache of the same run, for another prompt (the second branch of guidance).
    """

    def __init__(self, timesteps: Tensor, video: Store | None = None) -> None:
        self._timesteps = timesteps
        self._video = Store() if video is None else video
        self._prompt = Store()

    def other_prompt(self) -> "SamplingCache":
        """Return a cache for the same run with other prompts."""
        return SamplingCache(self._timesteps, self._video)

    def at(self, step: int) -> CachedStep:
        """Return what the transformer's `cache` takes in this step."""
        return CachedStep(step, self._timesteps, self._video, self._prompt)
