from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashi2v_data.errors import InputError
from flashi2v_data.loading.sampler import SampleKey, StatefulDistributedSampler
from flashi2v_data.randomness import generator

SIZES = st.integers(1, 40)
RANKS = st.integers(1, 8)
SEEDS = st.integers(0, 2**40)


@given(SIZES, SEEDS, st.booleans())
def test_every_epoch_holds_every_sample_once(num_samples, seed, shuffle):
    sampler = StatefulDistributedSampler(num_samples, seed=seed, shuffle=shuffle)
    keys = list(islice(sampler, 3 * num_samples))
    for epoch in range(3):
        part = keys[epoch * num_samples : (epoch + 1) * num_samples]
        assert {key.epoch for key in part} == {epoch}
        assert sorted(key.index for key in part) == list(range(num_samples))


@given(SIZES, SEEDS, RANKS, st.integers(0, 200), st.integers(1, 30))
def test_ranks_share_the_stream_of_one(num_samples, seed, num_replicas, consumed_samples, length):
    def stream(rank, replicas, count):
        sampler = StatefulDistributedSampler(
            num_samples, rank=rank, num_replicas=replicas, seed=seed, consumed_samples=consumed_samples
        )
        return list(islice(sampler, count))

    shared = [stream(rank, num_replicas, length) for rank in range(num_replicas)]
    interleaved = [key for turn in zip(*shared) for key in turn]
    assert interleaved == stream(0, 1, length * num_replicas)


@given(SIZES, SEEDS, RANKS, RANKS, st.integers(0, 60))
def test_a_resumed_stream_continues_on_any_number_of_ranks(num_samples, seed, before, after, steps):
    first = StatefulDistributedSampler(num_samples, num_replicas=before, seed=seed)
    list(islice(first, steps))
    state = first.state_dict()
    assert state == {"consumed_samples": steps * before, "seed": seed, "num_samples": num_samples}
    resumed = StatefulDistributedSampler(num_samples, rank=after - 1, num_replicas=after, seed=seed)
    resumed.load_state_dict(state)
    whole = islice(StatefulDistributedSampler(num_samples, seed=seed), 1000)
    expected = list(whole)[steps * before + after - 1 :: after]
    assert list(islice(resumed, 5)) == expected[:5]


@given(SIZES, SEEDS, st.lists(st.tuples(RANKS, st.integers(0, 15)), min_size=1, max_size=5))
def test_no_sample_is_lost_or_repeated_however_often_ranks_change(num_samples, seed, runs):
    """Every run resumes from the one before with another number of ranks, across ends of epochs."""
    state = StatefulDistributedSampler(num_samples, seed=seed).state_dict()
    seen = []
    for num_replicas, steps in runs:
        samplers = [
            StatefulDistributedSampler(num_samples, rank=rank, num_replicas=num_replicas, seed=seed)
            for rank in range(num_replicas)
        ]
        for sampler in samplers:
            sampler.load_state_dict(state)
        seen += [key for turn in zip(*(list(islice(sampler, steps)) for sampler in samplers)) for key in turn]
        assert len({sampler.state_dict()["consumed_samples"] for sampler in samplers}) == 1
        state = samplers[0].state_dict()
    assert seen == list(islice(StatefulDistributedSampler(num_samples, seed=seed), len(seen)))
    assert len(set(seen)) == len(seen)
    for epoch in range(len(seen) // num_samples):
        whole = seen[epoch * num_samples : (epoch + 1) * num_samples]
        assert sorted(key.index for key in whole) == list(range(num_samples))


def test_epochs_and_seeds_are_shuffled_differently():
    def order(seed, epoch):
        keys = islice(StatefulDistributedSampler(50, seed=seed, consumed_samples=50 * epoch), 50)
        return [key.index for key in keys]

    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    assert order(0, 0) != list(range(50))


def test_without_shuffle_the_order_is_that_of_the_store():
    keys = list(islice(StatefulDistributedSampler(3, shuffle=False), 4))
    assert keys == [SampleKey(0, 0), SampleKey(0, 1), SampleKey(0, 2), SampleKey(1, 0)]


def test_a_part_of_a_set_has_the_order_of_its_places():
    whole, part = ([*islice(StatefulDistributedSampler(3, seed=5, indices=i), 7)] for i in (None, [4, 6, 9]))
    assert [(key.epoch, [4, 6, 9][key.index]) for key in whole] == part


def test_a_state_of_other_data_or_another_seed_is_refused():
    state = StatefulDistributedSampler(10, seed=1).state_dict()
    with pytest.raises(InputError, match="drew from 10 samples, the data now holds 11"):
        StatefulDistributedSampler(11, seed=1).load_state_dict(state)
    with pytest.raises(InputError, match="used seed 1, this one 2"):
        StatefulDistributedSampler(10, seed=2).load_state_dict(state)


@pytest.mark.parametrize("arguments", [{"num_samples": 0}, {"num_samples": 5, "rank": 2, "num_replicas": 2}])
def test_impossible_arguments_are_refused(arguments):
    with pytest.raises(InputError):
        StatefulDistributedSampler(**arguments)


def test_generators_depend_on_each_of_their_arguments():
    keys = [(0, "a", 0, 0), (1, "a", 0, 0), (0, "b", 0, 0), (0, "a", 1, 0), (0, "a", 0, 1), (0, "a/0", 0, 0)]
    seeds = [generator(*key).initial_seed() for key in keys]
    assert len(set(seeds)) == len(keys)
    assert seeds == [generator(*key).initial_seed() for key in keys]
    # A change of this number would change every run that is resumed.
    assert generator(0, "noise", 3, 5).initial_seed() == 6901436871053172442


def test_a_state_of_an_earlier_version_is_continued():
    sampler = StatefulDistributedSampler(50, seed=1)
    sampler.load_state_dict({"consumed": 12, "seed": 1, "num_samples": 50})
    assert sampler.state_dict() == {"consumed_samples": 12, "seed": 1, "num_samples": 50}
