"""Batches of clips of several shapes: composed first, as a pure function, then shared out among ranks.

A batch is made of packs. A pack holds clips of one bucket, as many as the device computes at a time, so nothing is
padded. All batches have equally many packs (G), and those of one batch cost alike: ranks that take equally many of them
finish together. This is how an epoch becomes batches:

1. The epoch's order is drawn, as without buckets.
2. Every bucket's clips, in that order, are cut into packs, whose sizes differ by one at most. A bucket of N clips, n of
   which fit into a pack, makes ceil(N / n) packs in every epoch, so the number of packs (P) is always the same.
3. Packs are ordered by cost, dearest first. Costs within 5 % of the dearest of them count as one level, in which the
   order is drawn: batches mix buckets wherever these cost alike.
4. From this order batches are cut, and their order is drawn.

P is rarely a multiple of G. What an epoch has too many becomes the beginning of a batch that the next epoch completes,
as one epoch flows into the next without buckets too. Both epochs take the packs of that batch from the dearest ones,
and how many each gives follows from P, G and the epoch alone. So the packs of all epochs are one stream without end, of
which batch k is packs kG ... kG + G - 1: every clip is in it once an epoch, and any batch can be composed at once.

Within a batch, packs are dealt to ranks like cards, dearest first, back and forth.
"""

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import count
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler

from flashi2v_data.errors import InputError
from flashi2v_data.loading.sampler import SampleKey, check_same_order
from flashi2v_data.randomness import generator

# Costs that differ by less count as alike.
_ALIKE = 0.05


class Pack(NamedTuple):
    """Clips of one bucket that are computed together."""

    bucket: int
    keys: list[SampleKey]


class Composer:
    """Composes the batches of a set of clips.

    Args:
        bucket_of: (clips,) the number of every clip's bucket; -1 leaves it out.
        capacity: clips that fit into a pack, for every bucket.
        costs: of one clip of every bucket, in any unit.
        num_packs: G, in a batch.
        seed: of all orders.
        shuffle: draw orders; else they are those of the clips.

    Attributes:
        packs_per_epoch: P.

    Raises:
        InputError: there are fewer packs than one batch takes.
    """

    def __init__(
        self,
        bucket_of: NDArray[np.int64],
        capacity: Sequence[int],
        costs: Sequence[float],
        num_packs: int,
        *,
        seed: int,
        shuffle: bool = True,
    ) -> None:
        self.num_packs, self.seed, self.shuffle = num_packs, seed, shuffle
        self.capacity, self.costs = tuple(capacity), tuple(costs)
        self._bucket_of = bucket_of
        buckets, sizes = [], []
        for bucket, limit in enumerate(capacity):
            number = int((bucket_of == bucket).sum())
            parts = -(-number // limit)
            buckets += [bucket] * parts
            sizes += [number // parts + (part < number % parts) for part in range(parts)]
        self.packs_per_epoch = len(sizes)
        self._buckets = np.array(buckets, np.int64)
        self._ends = np.cumsum(sizes)
        pack_costs = [costs[bucket] * size for bucket, size in zip(buckets, sizes)]
        self._levels = _levels_of(pack_costs)
        self._epoch = lru_cache(2)(self._compose)  # a batch lies in one epoch, or in two
        if self.packs_per_epoch < num_packs:
            raise InputError(
                f"{int((bucket_of >= 0).sum())} clips in {len(capacity)} buckets make {self.packs_per_epoch} micro "
                f"batches, fewer than the {num_packs} of one optimizer step: lower --global-batch-size, or take "
                "buckets out"
            )

    def batch(self, number: int) -> list[Pack]:
        """Return the packs of a batch, dearest first."""
        packs = []
        for position in range(number * self.num_packs, (number + 1) * self.num_packs):
            epoch, place = divmod(position, self.packs_per_epoch)
            order, stream = self._epoch(epoch)
            pack = int(stream[place])
            begin, end = int(self._ends[pack - 1]) if pack else 0, int(self._ends[pack])
            keys = [SampleKey(epoch, index) for index in order[begin:end].tolist()]
            packs.append(Pack(int(self._buckets[pack]), keys))
        return sorted(packs, key=lambda pack: (-self.cost(pack), pack.bucket))

    def cost(self, pack: Pack) -> float:
        """Return what a pack costs."""
        return self.costs[pack.bucket] * len(pack.keys)

    def _compose(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the clips of an epoch, bucket by bucket, and its packs in the order of the stream."""
        order = self._permutation("order", epoch, len(self._bucket_of))
        by_bucket = np.argsort(self._bucket_of[order], kind="stable")
        clips = order[by_bucket[int((self._bucket_of < 0).sum()) :]]
        drawn = self._permutation("packs", epoch, self.packs_per_epoch)
        ranked = drawn[np.argsort(self._levels[drawn], kind="stable")]
        head = -epoch * self.packs_per_epoch % self.num_packs  # completes the batch that the epochs before began
        tail = (self.packs_per_epoch - head) % self.num_packs
        whole = ranked[head + tail :].reshape(-1, self.num_packs)
        whole = whole[self._permutation("batches", epoch, len(whole))]
        return clips, np.concatenate((ranked[:head], whole.ravel(), ranked[head : head + tail]))

    def _permutation(self, purpose: str, epoch: int, number: int) -> NDArray[np.int64]:
        if not self.shuffle:
            return np.arange(number)
        drawn: NDArray[np.int64] = torch.randperm(number, generator=generator(self.seed, purpose, epoch, 0)).numpy()
        return drawn

    @property
    def num_samples(self) -> int:
        """Clips, those included that fit no bucket."""
        return len(self._bucket_of)

    def identity(self) -> "Identity":
        """Return what batches depend on beside the seed: a run resumes only with the same."""
        parts = (self._bucket_of.tobytes(), self._levels.tobytes(), bytes(self.shuffle))
        order = hashlib.blake2b(b"".join(parts), digest_size=8).hexdigest()
        return {"packs": self.num_packs, "clips_per_pack": [*self.capacity], "order": order}


def _levels_of(costs: Sequence[float]) -> NDArray[np.int64]:
    """Number the levels of cost, dearest first: each begins at the dearest that is left, and holds what is alike."""
    level, least, levels = -1, float("inf"), dict[float, int]()
    for cost in sorted(set(costs), reverse=True):
        if cost < least:
            level, least = level + 1, (1 - _ALIKE) * cost
        levels[cost] = level
    return np.array([levels[cost] for cost in costs], np.int64)


def deal(packs: Sequence[Pack], rank: int, num_ranks: int) -> list[Pack]:
    """Return a rank's share of a batch's packs: every turn goes through all ranks, and the next one back.

    Args:
        packs: of a batch, dearest first; as many as all ranks can have equally many of.
        rank: of the taker.
        num_ranks: among whom they are dealt.
    """
    turns = range(0, len(packs), num_ranks)
    return [packs[turn + (rank if number % 2 == 0 else num_ranks - 1 - rank)] for number, turn in enumerate(turns)]


class Identity(TypedDict):
    """Which stream it is."""

    packs: int
    clips_per_pack: list[int]
    order: str  # a hash of all else that batches depend on


class ComposedState(Identity):
    """Where the stream stands: how many batches all ranks have had."""

    consumed_batches: int
    consumed_keys: int  # that this process has had of the batches after these
    seed: int
    num_samples: int


class ComposedSampler(Sampler[SampleKey]):
    """The stream of composed batches without end, of which this process takes its share, one sample after the other.

    Several processes may read for one rank in turns: of G such peers, peer g takes every G-th sample of a round of G
    batches, so that all have about equally many.

    Args:
        composer: of the batches.
        rank: among those that see different samples.
        num_replicas: how many those are; they divide the packs of a batch.
        peer: among those that read for this rank.
        num_peers: how many those are, and batches in a round.
    """

    def __init__(
        self, composer: Composer, *, rank: int = 0, num_replicas: int = 1, peer: int = 0, num_peers: int = 1
    ) -> None:
        if composer.num_packs % num_replicas:
            raise InputError(
                f"the {composer.num_packs} packs of a batch cannot be shared by {num_replicas} ranks evenly"
            )
        self.composer, self.num_replicas = composer, num_replicas
        self._rank, self._peer, self._num_peers = rank, peer, num_peers
        self._consumed_batches = self._consumed_keys = 0

    def share(self, number: int) -> list[Pack]:
        """Return the packs that this rank has of a batch."""
        return deal(self.composer.batch(number), self._rank, self.num_replicas)

    def __iter__(self) -> Iterator[SampleKey]:
        """Yield this process's samples from where the stream stands, without end."""
        skipped = self._consumed_keys
        for first in count(self._consumed_batches, self._num_peers):
            yield from self._round(first)[skipped:]
            skipped = 0

    def _round(self, first: int) -> list[SampleKey]:
        batches = range(first, first + self._num_peers)
        keys = [key for number in batches for pack in self.share(number) for key in pack.keys]
        return keys[self._peer :: self._num_peers]

    def state_dict(self) -> ComposedState:
        """Return where the stream stands."""
        return {
            "consumed_batches": self._consumed_batches,
            "consumed_keys": self._consumed_keys,
            "seed": self.composer.seed,
            "num_samples": self.composer.num_samples,
            **self.composer.identity(),
        }

    def load_state_dict(self, state: ComposedState) -> None:
        """Continue from a state, on any number of ranks where it stands between two batches.

        Raises:
            InputError: it belongs to another stream.
        """
        given, ours = dict[str, Any](state), dict[str, Any](self.state_dict())
        if "consumed_batches" not in given:
            raise InputError("the saved run had no buckets: resume without, or start a new run")
        check_same_order(given, seed=ours["seed"], num_samples=ours["num_samples"])
        for key, option in (("packs", "--global-batch-size"), ("clips_per_pack", "--micro-batch-size and buckets")):
            if given[key] != ours[key]:
                words = f"{key.replace('_', ' ')} {given[key]}, this one {ours[key]}"
                raise InputError(f"the saved run had {words}: set the same {option}")
        if given["order"] != ours["order"]:
            raise InputError("the saved run composed other batches: resume with the same data, buckets and model")
        self._consumed_batches, self._consumed_keys = state["consumed_batches"], state["consumed_keys"]

    def advance(self, state: ComposedState, num_samples: int) -> None:
        """Move a state on by samples that this process was given."""
        state["consumed_keys"] += num_samples
        while state["consumed_keys"] >= (size := len(self._round(state["consumed_batches"]))):
            state["consumed_keys"] -= size
            state["consumed_batches"] += self._num_peers
