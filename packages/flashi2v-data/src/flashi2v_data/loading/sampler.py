"""The order of samples: a pure function of seed and position, whatever the number of ranks or workers."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.utils.data import Sampler

from flashi2v_data.errors import InputError
from flashi2v_data.randomness import generator


class SampleKey(NamedTuple):
    """Which sample, in which epoch."""

    epoch: int
    index: int  # type: ignore[assignment]  # a field named like a method that tuples have and nobody needs here


class SamplerState(TypedDict):
    """Where the order stands: how many samples all ranks together have had, and of which order."""

    consumed_samples: int
    seed: int
    num_samples: int


class StatefulDistributedSampler(Sampler[SampleKey]):
    """An endless stream of samples, of which this rank takes its share.

    Position p of the stream is sample `permutation(seed, epoch)[p % num_samples]` of epoch `p // num_samples`; of R
    ranks, rank r takes positions c + r, c + r + R, ... where c samples were consumed before. So batch number k, taken
    over all ranks, holds the same samples however many ranks share it, and nothing is dropped or repeated where one
    epoch flows into the next. Samples are numbered from 0, or by `indices` where there are such.

    Attributes:
        consumed_samples: positions that all ranks together have taken from the stream.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        rank: int = 0,
        num_replicas: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        consumed_samples: int = 0,
        indices: Sequence[int] | None = None,
    ) -> None:
        if num_samples < 1:
            raise InputError("there are no samples to draw from")
        if not 0 <= rank < num_replicas:
            raise InputError(f"rank must be in 0 ... num_replicas - 1, got {rank} of {num_replicas}")
        self.num_samples = num_samples
        self.rank = rank
        self.num_replicas = num_replicas
        self.shuffle = shuffle
        self.seed = seed
        self.consumed_samples = consumed_samples
        self.indices = range(num_samples) if indices is None else indices
        assert len(self.indices) == num_samples

    def __iter__(self) -> Iterator[SampleKey]:
        """Yield this rank's samples from where the stream stands, without end."""
        epoch, order = -1, torch.empty(0, dtype=torch.int64)
        while True:
            now, offset = divmod(self.consumed_samples + self.rank, self.num_samples)
            if now != epoch:
                epoch, order = now, self._permutation(now)
            self.consumed_samples += self.num_replicas
            yield SampleKey(epoch, self.indices[int(order[offset])])

    def _permutation(self, epoch: int) -> Tensor:
        if not self.shuffle:
            return torch.arange(self.num_samples)
        return torch.randperm(self.num_samples, generator=generator(self.seed, "order", epoch, 0))

    def state_dict(self) -> SamplerState:
        """Return where the stream stands."""
        return {"consumed_samples": self.consumed_samples, "seed": self.seed, "num_samples": self.num_samples}

    def load_state_dict(self, state: SamplerState) -> None:
        """Continue from a state, on any number of ranks.

        Raises:
            InputError: it belongs to another order (other data or another seed).
        """
        given: Mapping[str, Any] = state  # states of earlier versions say "consumed"
        if "consumed_batches" in given:
            raise InputError("the saved run had buckets: resume with the same, or start a new run")
        check_same_order(state, seed=self.seed, num_samples=self.num_samples)
        self.consumed_samples = given["consumed_samples"] if "consumed_samples" in given else given["consumed"]

    def advance(self, state: SamplerState, num_samples: int) -> None:
        """Move a state on by samples that this process was given, as were all others."""
        state["consumed_samples"] += num_samples * self.num_replicas


def check_same_order(state: Mapping[str, Any], *, seed: int, num_samples: int) -> None:
    """Refuse a state that belongs to another order of samples.

    Raises:
        InputError: other data, or another seed.
    """
    if state["num_samples"] != num_samples:
        raise InputError(
            f"the saved run drew from {state['num_samples']} samples, the data now holds {num_samples}: "
            "resume with the same data, or start a new run"
        )
    if state["seed"] != seed:
        raise InputError(f"the saved run used seed {state['seed']}, this one {seed}: set the same seed")
