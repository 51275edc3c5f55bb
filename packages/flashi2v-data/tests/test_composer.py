"""Batches of several shapes, as a pure function of seed and number."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashi2v_data.errors import InputError
from flashi2v_data.loading.composer import ComposedSampler, Composer, deal
from flashi2v_data.loading.sampler import StatefulDistributedSampler

# Bucket of every clip (-1: none); clips that fit into a pack and cost of one, for every bucket.
SETS = st.integers(1, 4).flatmap(
    lambda num: st.tuples(
        st.tuples(
            st.lists(st.integers(0, num - 1), min_size=24, max_size=60), st.lists(st.just(-1), max_size=5)
        ).flatmap(lambda parts: st.permutations(parts[0] + parts[1])),
        st.lists(st.tuples(st.integers(1, 4), st.floats(0.1, 10)), min_size=num, max_size=num),
    )
)
PACKS = 6
RANKS = st.sampled_from([1, 2, 3, 6])


def composer(bucket_of, buckets, num_packs=PACKS, **options):
    capacity, costs = zip(*buckets)
    return Composer(np.array(bucket_of), capacity, costs, num_packs, **{"seed": 3, **options})


@given(SETS, st.integers(1, 5), st.booleans())
def test_every_epoch_holds_every_clip_once_and_packs_hold_one_bucket(clips, num_packs, shuffle):
    bucket_of, buckets = clips
    composed = composer(bucket_of, buckets, num_packs, shuffle=shuffle)
    batches = [composed.batch(number) for number in range(3 * composed.packs_per_epoch // num_packs)]
    assert {len(batch) for batch in batches} == {num_packs}
    seen = [key for batch in batches for pack in batch for key in pack.keys]
    assert len(set(seen)) == len(seen)
    wanted = [index for index, bucket in enumerate(bucket_of) if bucket >= 0]
    for epoch in range(len(batches) * num_packs // composed.packs_per_epoch):
        assert sorted(key.index for key in seen if key.epoch == epoch) == wanted
    for pack in (pack for batch in batches for pack in batch):
        assert {bucket_of[key.index] for key in pack.keys} == {pack.bucket}
        assert len(pack.keys) <= buckets[pack.bucket][0]


@given(SETS, RANKS)
def test_ranks_share_the_batches_of_one(clips, num_ranks):
    composed = composer(*clips)
    for number in range(4):
        batch = composed.batch(number)
        shares = [deal(batch, rank, num_ranks) for rank in range(num_ranks)]
        assert {len(share) for share in shares} == {PACKS // num_ranks}
        assert sorted(pack for share in shares for pack in share) == sorted(batch)


@given(SETS, st.lists(st.tuples(RANKS, st.integers(1, 3), st.integers(0, 3)), min_size=1, max_size=4))
def test_no_clip_is_lost_or_repeated_however_often_ranks_and_peers_change(clips, runs):
    """Every run resumes from the one before in another world, and stops after some rounds of its peers."""
    composed = composer(*clips)
    state, seen = ComposedSampler(composed).state_dict(), []
    for num_ranks, num_peers, rounds in runs:
        begin = state["consumed_batches"]
        batches = range(begin, begin + rounds * num_peers)
        for rank, peer in ((rank, peer) for rank in range(num_ranks) for peer in range(num_peers)):
            sampler = ComposedSampler(composed, rank=rank, num_replicas=num_ranks, peer=peer, num_peers=num_peers)
            sampler.load_state_dict(state)
            after, own = sampler.state_dict(), 0
            for first in batches[::num_peers]:
                own += len(
                    [k for n in range(first, first + num_peers) for p in sampler.share(n) for k in p.keys][
                        peer::num_peers
                    ]
                )
            seen += islice(sampler, own)
            sampler.advance(after, own)
            assert after == {**state, "consumed_batches": batches.stop}
        state = {**state, "consumed_batches": batches.stop}
    whole = [key for number in range(state["consumed_batches"]) for pack in composed.batch(number) for key in pack.keys]
    assert sorted(seen) == sorted(whole)


def test_an_interrupted_share_goes_on_where_it_was():
    composed = composer([0, 1] * 40, [(3, 1.0), (1, 2.0)])
    whole = list(islice(ComposedSampler(composed, rank=1, num_replicas=2), 100))
    for consumed in (1, 17, 63):
        sampler = ComposedSampler(composed, rank=1, num_replicas=2)
        state = sampler.state_dict()
        for _ in range(consumed):
            sampler.advance(state, 1)
        sampler.load_state_dict(state)
        assert list(islice(sampler, 30)) == whole[consumed : consumed + 30]


def test_packs_of_a_batch_cost_alike():
    random = np.random.default_rng(0)
    composed = composer(random.integers(0, 3, 3000), [(13, 0.075), (4, 0.24), (1, 0.55)], 8)
    spreads = []
    for number in range(composed.packs_per_epoch // 8):
        costs = [composed.cost(pack) for pack in composed.batch(number)]
        spreads.append(1 - min(costs) / max(costs))
    # All but those at the border of two levels, of which there are two.
    assert sum(spread > 0.05 for spread in spreads) <= 2
    mixed = [{pack.bucket for pack in composed.batch(number)} for number in range(20)]
    assert {0, 1} in mixed  # 13 x 0.075 and 4 x 0.24 are alike


def test_epochs_and_seeds_are_drawn_differently():
    bucket_of = [0, 1] * 20

    def epoch(number, **options):
        composed = composer(bucket_of, [(2, 1.0), (2, 2.0)], 4, **options)
        return [composed.batch(batch) for batch in range(number * 5, number * 5 + 5)]

    def indices(batches):
        return [[key.index for key in pack.keys] for batch in batches for pack in batch]

    assert indices(epoch(0)) != indices(epoch(1))
    assert indices(epoch(0)) != indices(epoch(0, seed=4))
    assert indices(epoch(0, shuffle=False)) == indices(epoch(1, shuffle=False))


def test_a_state_of_another_stream_is_refused():
    bucket_of, buckets = [0, 1] * 20, [(2, 1.0), (2, 2.0)]
    state = ComposedSampler(composer(bucket_of, buckets, 4)).state_dict()

    def resume(*arguments, **options):
        ComposedSampler(composer(*arguments, **options)).load_state_dict(state)

    resume(bucket_of, buckets, 4)
    for message, arguments, options in (
        ("seed 3, this one 4", (bucket_of, buckets, 4), {"seed": 4}),
        ("40 samples, the data now holds 42", ([*bucket_of, 0, 0], buckets, 4), {}),
        ("packs 4, this one 5: set the same --global-batch-size", (bucket_of, buckets, 5), {}),
        ("--micro-batch-size", (bucket_of, [(2, 1.0), (3, 2.0)], 4), {}),
        ("composed other batches", (bucket_of[::-1], buckets, 4), {}),
        ("composed other batches", (bucket_of, [(2, 1.0), (2, 1.0)], 4), {}),
        ("composed other batches", (bucket_of, buckets, 4), {"shuffle": False}),
    ):
        with pytest.raises(InputError, match=message):
            resume(*arguments, **options)
    with pytest.raises(InputError, match="had no buckets"):
        ComposedSampler(composer(bucket_of, buckets, 4)).load_state_dict(StatefulDistributedSampler(40).state_dict())
    with pytest.raises(InputError, match="had buckets"):
        StatefulDistributedSampler(40, seed=3).load_state_dict(state)


def test_too_few_clips_and_uneven_ranks_are_refused():
    with pytest.raises(InputError, match=r"5 clips in 1 buckets make 3 micro batches, fewer than the 4"):
        Composer(np.zeros(5, np.int64), [2], [1.0], 4, seed=0)
    with pytest.raises(InputError, match="cannot be shared by 3 ranks"):
        ComposedSampler(composer([0] * 9, [(1, 1.0)], 4), num_replicas=3)


def test_any_batch_is_composed_at_once():
    composed = composer([0, 0, 1] * 30, [(2, 1.0), (1, 1.5)], 7)
    late = [composed.batch(number) for number in (1_002, 1_000, 1_001)]
    other = composer([0, 0, 1] * 30, [(2, 1.0), (1, 1.5)], 7)
    in_order = [other.batch(number) for number in range(1_003)]
    assert late == [in_order[number] for number in (1_002, 1_000, 1_001)]
