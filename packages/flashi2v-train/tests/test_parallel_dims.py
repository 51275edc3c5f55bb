"""Degrees of parallelism: what fits together, and what is said where it does not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashi2v_data.errors import InputError
from flashi2v_train.options import ParallelOptions
from flashi2v_train.parallel_dims import even_split, plan_parallel_dims


def plan(world_size=1, split=None, **options):
    return plan_parallel_dims(ParallelOptions(**options), world_size, num_layers=30, num_heads=12, split=split)


def test_data_parallelism_takes_what_the_others_leave():
    layout = plan(48, tensor_model_parallel_size=2, context_parallel_size=3, pipeline_model_parallel_size=4)
    assert (layout.tensor, layout.context, layout.pipeline, layout.data) == (2, 3, 4, 2)
    assert layout.replicas == 1
    assert layout.describe() == "data 2 x pipeline 4 x context 3 x tensor 2; layers per stage [7, 8, 8, 7]"


def test_weights_are_replicated_wholly_or_in_groups():
    assert plan(8, use_distributed_optimizer=False).replicas == 8
    assert plan(8, num_distributed_optimizer_instances=2).replicas == 2


def test_megatrons_list_of_layers_is_taken_as_it_is():
    layout = plan(4, [8, 8, 8, 6], pipeline_model_parallel_size=4)
    assert layout.layers == (8, 8, 8, 6)
    assert [layout.layers_of(stage) for stage in layout.stages_of(2)] == [range(16, 24)]


def test_a_list_of_lists_makes_virtual_stages():
    layout = plan(2, [[7, 8], [9, 6]], pipeline_model_parallel_size=2)
    assert layout.layers == (7, 8, 9, 6)
    assert [layout.layers_of(stage) for stage in layout.stages_of(1)] == [range(7, 15), range(24, 30)]
    assert layout == plan(2, [7, 8, 9, 6], pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)


@given(st.integers(1, 200), st.integers(1, 20))
def test_an_even_split_is_even(num_layers, num_stages):
    if num_stages > num_layers:
        with pytest.raises(InputError, match="cannot be split"):
            even_split(num_layers, num_stages)
        return
    split = even_split(num_layers, num_stages)
    assert sum(split) == num_layers
    assert max(split) - min(split) <= 1
    assert split == split[::-1] or num_layers % num_stages


@pytest.mark.parametrize(
    ("options", "ulysses", "ring", "words"),
    [
        ({}, 4, 2, "context 8 (Ulysses 4 x ring 2)"),
        ({"context_parallel_algo": "ulysses_cp_algo"}, 8, 1, "context 8"),
        ({"context_parallel_algo": "megatron_cp_algo"}, 1, 8, "context 8 (Ulysses 1 x ring 8)"),
        ({"context_parallel_algo": "hybrid_cp_algo"}, 4, 2, "context 8 (Ulysses 4 x ring 2)"),
        (
            {"context_parallel_algo": "hybrid_cp_algo", "ulysses_degree_in_cp": 2},
            *(2, 4, "context 8 (Ulysses 2 x ring 4)"),
        ),
    ],
)
def test_any_number_of_processes_shares_the_tokens_of_a_video(options, ulysses, ring, words):
    layout = plan(8, context_parallel_size=8, **options)
    assert (layout.context, layout.ulysses, layout.ring) == (8, ulysses, ring)
    assert layout.describe() == words


def test_tensor_parallel_processes_have_fewer_heads_to_exchange():
    assert plan(8, context_parallel_size=4, tensor_model_parallel_size=2).ulysses == 2  # of 6 heads


CP16 = {"context_parallel_size": 16}
PP2 = {"pipeline_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("world_size", "split", "options", "words"),
    [
        (6, None, {"tensor_model_parallel_size": 4}, "= 4 must divide the 6 processes"),
        (8, None, {"tensor_model_parallel_size": 8}, "must divide the 12 attention heads"),
        (16, None, CP16 | {"context_parallel_algo": "ulysses_cp_algo"}, "--context-parallel-size 16: .* at most 12"),
        (16, None, CP16 | {"context_parallel_algo": "hybrid_cp_algo", "ulysses_degree_in_cp": 3}, "ring of 5 x"),
        (16, None, CP16 | {"ulysses_degree_in_cp": 4}, "has no effect without"),
        (4, None, {"num_distributed_optimizer_instances": 3}, "must divide the 4 data parallel"),
        (4, None, {"num_distributed_optimizer_instances": 2, "use_distributed_optimizer": False}, "has no effect"),
        (1, None, {"virtual_pipeline_model_parallel_size": 2}, "without --pipeline-model-parallel-size"),
        (1, None, {"pipeline_schedule": "gpipe"}, "without --pipeline-model-parallel-size"),
        (2, [10, 10, 10], PP2, "has 3 numbers, there are 2 stages"),
        (2, [10, 10], PP2, "sums to 20, num_layers is 30"),
        (2, [[10, 5], [15]], PP2, "one number for each of the 2 processes"),
        (2, [[10, 5], [8, 7]], PP2 | {"virtual_pipeline_model_parallel_size": 3}, "make them equal"),
        (2, [30, 0], PP2, "at least one layer"),
        (2, [[8, 7], [8, 7]], PP2 | {"pipeline_schedule": "1f1b"}, "leave virtual stages out"),
        (2, [15, 15], PP2 | {"pipeline_schedule": "interleaved"}, "needs virtual stages"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(world_size, split, options, words):
    with pytest.raises(InputError, match=words):
        plan(world_size, split, **options)
