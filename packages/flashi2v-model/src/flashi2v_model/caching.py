"""What stays the same over the steps of a sampling run, computed once.

The transformer fills a cache in the first call that is given it, not ahead of the run: only inside a call are weights
at hand that are offloaded or sharded in between.

S steps, B batch, F H W token grid, L text tokens, D width, K heads, d head size.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

T = TypeVar("T")
Store = dict[str, Any]


class CachedStep(NamedTuple):
    """One call of the transformer within a run.

    Attributes:
        step: number of the step, from 0.
        timesteps: (S,), of all steps.
        video: what depends on neither step nor prompt: the embedded Fourier features (B, D, F, H, W), and time (S, D)
            with its modulation (S, 6, D) for all steps.
        prompt: what depends on the prompt: the embedded text (B, L, D).
        blocks: of every block, keys and values (B, L, K, d) of the cross attention.
    """

    step: int
    timesteps: Tensor
    video: Store
    prompt: Store
    blocks: defaultdict[int, Store]


class SamplingCache:
    """What the steps of a run with one first frame and one prompt for every video have in common.

    Args:
        timesteps: (S,), of all steps.
        video: of another cache of the same run, for another prompt (the second branch of guidance).
    """

    def __init__(self, timesteps: Tensor, video: Store | None = None) -> None:
        self._timesteps = timesteps
        self._video: Store = {} if video is None else video
        self._prompt: Store = {}
        self._blocks: defaultdict[int, Store] = defaultdict(dict)

    def other_prompt(self) -> "SamplingCache":
        """Return a cache for the same run with other prompts."""
        return SamplingCache(self._timesteps, self._video)

    def at(self, step: int) -> CachedStep:
        """Return what the transformer's `cache` takes in this step."""
        return CachedStep(step, self._timesteps, self._video, self._prompt, self._blocks)


def remembered(store: Store | None, name: str, compute: Callable[[], T]) -> T:
    """Return what stands under a name, computing it the first time; always, where there is no store."""
    if store is None:
        return compute()
    if name not in store:
        store[name] = compute()
    value: T = store[name]
    return value
