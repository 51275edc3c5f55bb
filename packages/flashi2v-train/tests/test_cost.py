"""What is worked out ahead against what the real modules have, compute and keep."""

import itertools
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flashi2v_data.errors import InputError
from flashi2v_data.loading.buckets import BucketTable, Shape, propose_buckets
from flashi2v_data.loading.composer import Composer
from flashi2v_data.loading.config import Bucket
from flashi2v_train import launcher
from flashi2v_train.buckets import Cost, compose, exponent, waits
from flashi2v_train.config import RunConfig, read_run_config
from flashi2v_train.cost import (
    build_stage,
    count_parameters,
    count_recomputed,
    in_flight,
    num_tokens,
    operations_of,
    predict,
)
from flashi2v_train.dry_run import missing_files
from flashi2v_train.engines import make_schedule
from flashi2v_train.lora import plan_adapters
from flashi2v_train.options import TrainOptions
from flashi2v_train.parallelise import build_stages
from flashi2v_train.splits import best_split, bubble, suggest_split
from flashi2v_train.world import join_world

RELEASES = {
    "1.3B": {},
    "14B": {"hidden_size": 5120, "num_heads": 40, "num_layers": 40, "ffn_dim": 13824},
}


def read(workspace, changes=None, **options) -> RunConfig:
    return read_run_config(TrainOptions(**workspace.files(changes), device="cpu", **options))


def _total(config: RunConfig) -> int:
    return sum(count_parameters(config).values())


def full_size(workspace, name, **options) -> RunConfig:
    """A release at 49 x 480 x 832."""
    predictor = {"model_id": "flashi2vdit", "dtype": "bf16", **RELEASES[name]}
    predictor |= {"from_pretrained": str(workspace.directory)} if "lora_rank" in options else {}
    data = {"sample_height": 480, "sample_width": 832, "sample_num_frames": 49, "tokenizer_max_length": 512}
    pipeline = json.loads(json.dumps(workspace.data["dataset_param"]["transform_pipeline"]))
    pipeline["video"][0]["param"]["transform_size"] = [480, 832]
    changes = {"model.predictor": predictor, "data.dataset_param.transform_pipeline": pipeline}
    changes |= {f"data.dataset_param.{key}": value for key, value in data.items()}
    return read(workspace, changes, **options)


def inputs(config: RunConfig, batch: int) -> list[torch.Tensor]:
    channels, _, height, width = config.latent_shape
    predictor = config.model.predictor
    return [
        torch.randn(batch, *config.latent_shape),
        1000 * torch.rand(batch),
        torch.randn(batch, predictor.text_len, predictor.text_dim),
        torch.randn(batch, channels, 1, height, width),
        torch.rand(batch),
    ]


@pytest.mark.parametrize("changes", [{}, {"model.predictor.conv3x3x3_proj": False}], ids=["3x3x3", "1x3x3"])
def test_operations_are_those_that_torch_counts(workspace, changes):
    changes |= {"model.predictor.hidden_size": 96, "model.predictor.ffn_dim": 256}
    config = read(workspace, changes)
    operations = operations_of(config)
    with join_world("cpu", config.parallel_dims(1)) as world:
        (stage,) = build_stages(config, world, weights=False, adapters=plan_adapters(config))
        arguments = inputs(config, 1)
        # The counter does not know the CPU's fused attention.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            stage(*arguments)
        assert operations.forward == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("lora", [{}, {"lora_rank": 32}], ids=["all weights", "lora"])
def test_a_training_step_of_a_release_has_the_operations_that_torch_counts(workspace, lora):
    config = full_size(workspace, "1.3B", bf16=False, **lora)
    few = config.model.predictor.model_copy(update={"num_layers": 3})  # of all, as they are alike
    config = replace(config, model=config.model.model_copy(update={"predictor": few}))
    stage = build_stage(config, config.parallel_dims(1), 0)
    arguments = [tensor.to("meta") for tensor in inputs(config, 1)]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        stage(*arguments).sum().backward()
    operations = operations_of(config)
    # Nothing is behind the first layer's input to have a gradient, which counts among three layers.
    assert operations.training == pytest.approx(counter.get_total_flops(), rel=0.05 if lora else 0.01)


MIXTURE = Path(__file__).parents[1] / "bench/mixture.json"  # frames, height, width, and how many clips are so


def bucketed(workspace, name: str, buckets: Sequence[Bucket], **options) -> RunConfig:
    """A release, over buckets."""
    config = full_size(workspace, name, **options)
    few = config.model.predictor.model_copy(update={"num_layers": 2})  # of all, as they are alike
    param = config.data.dataset_param.model_copy(update={"buckets": [*buckets]})
    data = config.data.model_copy(update={"dataset_param": param})
    return replace(config, data=data, model=config.model.model_copy(update={"predictor": few}))


@pytest.mark.parametrize("name", RELEASES)
def test_eight_ranks_wait_for_each_other_a_tenth_of_a_step_at_most(workspace, name):
    shapes = [Shape(*shape) for *shape, number in json.loads(MIXTURE.read_text()) for _ in range(number)]
    assert len(shapes) == 20_000
    table = BucketTable(shapes, propose_buckets(shapes, Bucket(49, 480, 832)), "the mixture")
    config = bucketed(workspace, name, table.buckets)
    composer = compose(config, table, range(20_000), 8)
    shares = waits(composer, 8, composer.packs_per_epoch // 8)
    assert sum(shares) / len(shares) < 0.01
    assert sum(share > 0.1 for share in shares) <= 2  # where dear and cheap clips meet, once an epoch
    alone = Composer(table.number_of, [1] * len(config.costs), [1.0] * len(config.costs), 8, seed=0)
    alone.costs = composer.costs
    fixed = waits(alone, 8, alone.packs_per_epoch // 8)
    assert sum(fixed) / len(fixed) > 0.3  # of batches that know of no cost


def test_no_micro_batch_costs_more_or_needs_more_memory_than_so_many_of_the_dearest(workspace):
    buckets = [Bucket(49, 480, 832), Bucket(25, 832, 480), Bucket(13, 624, 624), Bucket(1, 512, 768)]
    config = bucketed(workspace, "1.3B", buckets, micro_batch_size=2)
    costs = config.costs
    most = Cost(*(max(getattr(cost, name) for cost in costs) for name in ("tokens", "operations")), 2)
    for cost in costs:
        for name in ("tokens", "operations"):
            assert cost.clips * getattr(cost, name) <= 2 * getattr(most, name)
        assert (cost.clips + 1) * (cost.tokens + 512) > 2 * (most.tokens + 512)
    kept = {}
    for kind, cost in zip(config.kinds, costs):
        if cost.tokens in (min(cost.tokens for cost in costs), most.tokens):
            options = kind.options.model_copy(update={"micro_batch_size": cost.clips})
            kept[cost.tokens] = predict(replace(kind, options=options), kind.parallel_dims(1))[0].memory.activations
    assert len(kept) == 2
    assert kept[min(kept)] < kept[most.tokens]
    assert exponent(costs) == pytest.approx(1.3, abs=0.1)  # between 1, of the matrices, and 2, of attention


@pytest.mark.parametrize(
    "options",
    [
        {"recompute_method": "uniform", "recompute_num_layers": 2},
        {"recompute_method": "block", "recompute_num_layers": 1},
        {
            "recompute_method": "block",
            "recompute_num_layers": 1,
            "recompute_skip_core_attention": True,
            "recompute_num_layers_skip_core_attention": 2,
        },
    ],
    ids=["uniform", "block", "skip"],
)
def test_what_is_computed_again_is_what_torch_counts_more(workspace, options):
    changes = {"model.predictor.num_layers": 4}
    skips = options.get("recompute_skip_core_attention", False)

    def count(config) -> int:
        with join_world("cpu", config.parallel_dims(1)) as world:
            (stage,) = build_stages(config, world, weights=False, adapters=plan_adapters(config))
            # The counter knows the plain attention only, and what is skipped is the fused one.
            attention = nullcontext() if skips else sdpa_kernel(SDPBackend.MATH)
            with FlopCounterMode(display=False) as counter, attention:
                stage(*inputs(config, 1)).sum().backward()
        return counter.get_total_flops()

    config = read(workspace, changes, recompute_granularity="full", **options)
    more = count(config) - count(read(workspace, changes))
    expected = count_recomputed(config, config.parallel_dims(1))
    if skips:  # the layer that is computed again as a whole attends twice, unseen by the counter
        expected -= operations_of(config).attention
    assert more == pytest.approx(expected, rel=0.02)


def test_attention_that_is_computed_again_counts_in_all_layers(workspace):
    config = read(workspace, {"model.predictor.num_layers": 4}, recompute_granularity="selective")
    tokens, text, dim = num_tokens(config), 16, 48
    assert count_recomputed(config, config.parallel_dims(1)) == 4 * 4 * tokens * (tokens + text) * dim


def test_the_releases_have_their_sizes(workspace):
    config = full_size(workspace, "1.3B")
    assert num_tokens(config) == 13 * 30 * 52
    assert _total(config) == pytest.approx(1.42e9, rel=0.01)
    assert _total(full_size(workspace, "14B")) == pytest.approx(14.3e9, rel=0.01)
    parts = count_parameters(config)
    block = 6 * 1536 + 2 * (4 * (1536**2 + 1536) + 2 * 1536) + 2 * 1536 + 2 * 1536 * 8960 + 8960 + 1536
    assert parts["layers"] == 30 * block
    assert parts["latent shift"] == 2 * 16 * 64 * 27 + 64 + 16
    assert parts["head"] == 1536 * 64 + 64 + 2 * 1536


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2},
        {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
        {"lora_rank": 4, "lora_also": ["learnable_proj"]},
    ],
    ids=["none", "uniform", "block", "lora"],
)
def test_activations_are_those_that_autograd_keeps(workspace, options):
    changes = {"model.predictor.num_layers": 4}
    changes |= {"model.predictor.from_pretrained": str(workspace.base(changes))}
    config = read(workspace, changes, micro_batch_size=2, **options)
    predicted = predict(config, config.parallel_dims(1))[0]
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with join_world("cpu", config.parallel_dims(1)) as world:
        (stage,) = build_stages(config, world, weights=False, adapters=plan_adapters(config))
        own = {parameter.untyped_storage().data_ptr() for parameter in stage.parameters()}
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            stage(*inputs(config, 2))
    measured = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in own)
    assert predicted.memory.activations == pytest.approx(measured, rel=0.1)
    assert predicted.parameters == sum(parameter.numel() for parameter in stage.parameters())
    assert predicted.memory.weights == sum(parameter.nbytes for parameter in stage.parameters())
    assert predicted.memory.gradients == sum(p.nbytes for p in stage.parameters() if p.requires_grad)


def test_layers_that_are_computed_again_are_kept_in_the_meantime(workspace):
    changes = {"model.predictor.num_layers": 4}
    plan = {"recompute_granularity": "full", "recompute_method": "uniform"}
    plain = predict(read(workspace, changes), read(workspace, changes).parallel_dims(1))[0].memory
    assert plain.recomputed == 0
    for group in (1, 2):
        config = read(workspace, changes, **plan, recompute_num_layers=group)
        memory = predict(config, config.parallel_dims(1))[0].memory
        assert memory.activations + 4 / group * memory.recomputed == pytest.approx(plain.activations, rel=0.1)
        assert memory.activations + memory.recomputed < plain.activations


def test_what_is_offloaded_is_not_on_the_device(workspace):
    config = full_size(workspace, "1.3B", fsdp_cpu_offload=True)
    memory = predict(config, config.parallel_dims(1))[0].memory
    assert memory.weights == memory.gradients == memory.optimizer == memory.average == 0
    assert memory.gathered > 0
    assert memory.activations > 0


def test_sharding_divides_what_it_should(workspace):
    alone, shared = (full_size(workspace, "1.3B", nproc_per_node=n) for n in (1, 8))
    one, eight = predict(alone, alone.parallel_dims(1))[0].memory, predict(shared, shared.parallel_dims(8))[0].memory
    for part in ("weights", "gradients", "optimizer", "average"):
        assert getattr(eight, part) == pytest.approx(getattr(one, part) / 8)
    assert eight.activations == one.activations
    assert one.weights == pytest.approx(4 * 1.42e9, rel=0.01)


def test_stages_hold_what_is_theirs(workspace):
    config = full_size(workspace, "1.3B", pipeline_model_parallel_size=4, global_batch_size=16, nproc_per_node=4)
    costs = predict(config, config.parallel_dims(4))
    assert sum(cost.parameters for cost in costs) == _total(config)
    assert costs[0].memory.activations > costs[3].memory.activations


class PlannedStage:
    """As much of a stage as a schedule needs to plan."""

    def __init__(self, number: int, num_stages: int, num_processes: int) -> None:
        self.stage_index, self.num_stages = number, num_stages
        self.is_first, self.is_last = number == 0, number == num_stages - 1
        self.group_size, self.group_rank, self.has_backward = num_processes, 0, True
        self.submod = torch.nn.Identity()


@pytest.mark.parametrize(
    ("schedule", "num_processes", "virtual", "num_micro_batches"),
    [
        ("interleaved", 2, 2, 4),
        ("interleaved", 4, 2, 16),
        ("interleaved", 4, 2, 6),
        ("zero-bubble", 4, 1, 8),
        ("zero-bubble", 2, 2, 4),
    ],
)
def test_as_many_micro_batches_are_in_flight_as_the_schedule_plans(
    workspace, schedule, num_processes, virtual, num_micro_batches
):
    num_stages = num_processes * virtual
    config = read(
        workspace,
        {"model.predictor.num_layers": num_stages},
        pipeline_model_parallel_size=num_processes,
        virtual_pipeline_model_parallel_size=virtual,
        pipeline_schedule=schedule,
        global_batch_size=num_micro_batches,
    )
    stages = [PlannedStage(number, num_stages, num_processes) for number in range(0, num_stages, num_processes)]
    plan = make_schedule(schedule, stages, num_micro_batches, torch.nn.functional.mse_loss).pipeline_order
    for rank in range(num_processes):
        kept, most = 0, 0
        for action in plan[rank]:
            kind = "nothing" if action is None else action.computation_type.name
            kept += {"FORWARD": 1, "FULL_BACKWARD": -1, "BACKWARD_WEIGHT": -1}.get(kind, 0)
            most = max(most, kept)
        assert in_flight(config, config.parallel_dims(num_processes), rank) == most


def test_one_forward_one_backward_keeps_as_many_micro_batches_as_there_are_stages_ahead(workspace):
    config = read(
        workspace,
        {"model.predictor.num_layers": 4},
        pipeline_model_parallel_size=4,
        global_batch_size=16,
    )
    assert [in_flight(config, config.parallel_dims(4), rank) for rank in range(4)] == [4, 3, 2, 1]


@pytest.mark.parametrize("costs", [(1.0, 0.0, 0.0), (1.0, 1.7, 0.4), (0.3, 2.0, 1.0), (1.0, 0.0, 5.0)])
@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_no_split_has_a_faster_slowest_stage(costs, num_stages):
    layer, first, last = costs

    def slowest(split):
        stages = [n * layer for n in split]
        stages[0] += first
        stages[-1] += last
        return max(stages)

    every = [split for split in itertools.product(range(1, 11), repeat=num_stages) if sum(split) == 10]
    best = best_split(10, num_stages, layer=layer, first=first, last=last)
    assert sum(best) == 10
    assert slowest(best) == pytest.approx(min(map(slowest, every)))


def test_no_split_into_virtual_stages_has_a_faster_slowest_process():
    for layer, first, last in ((1.0, 1.5, 0.5), (1.0, 4.0, 0.0), (0.5, 0.2, 3.0)):

        def slowest(split):
            processes = [(split[0] + split[2]) * layer + first, (split[1] + split[3]) * layer + last]  # noqa: B023
            return max(processes)

        every = [split for split in itertools.product(range(1, 8), repeat=4) if sum(split) == 10]
        best = best_split(10, 2, 2, layer=layer, first=first, last=last)
        assert slowest(best) == pytest.approx(min(map(slowest, every)))


def test_more_stages_than_layers_are_refused():
    with pytest.raises(InputError, match="3 layers cannot be split into 4 pipeline stages"):
        best_split(3, 4, layer=1.0, first=0.0, last=0.0)


def test_virtual_stages_even_out_what_processes_do():
    split = best_split(12, 2, 2, layer=1.0, first=2.0, last=0.0)
    assert sum(split) == 12
    assert split[0] + split[2] + 2.0 == split[1] + split[3]


def test_the_bubble_is_that_of_the_literature():
    assert bubble(4, 16) == pytest.approx(3 / 19)
    assert bubble(4, 16, 2) == pytest.approx(3 / 35)
    assert bubble(1, 16) == 0


def test_a_dry_run_says_what_would_happen_and_leaves_nothing(workspace, monkeypatch, capsys):
    options = {"pipeline_model_parallel_size": 2, "nproc_per_node": 2, "global_batch_size": 4}
    arguments = [*workspace.arguments(**options), "--dry-run"]
    monkeypatch.setattr("sys.argv", ["flashi2v-train", *arguments])
    with pytest.raises(SystemExit) as stop:
        launcher.main()
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "pipeline 2; layers per stage [1, 1]; 2 processes" in out
    assert "samples per step: 4 = 1 (data parallel) x 4 (micro batches) x 1" in out
    assert "stage 1" in out
    assert "GiB" in out
    assert '"global_batch_size": 4' in out
    assert not (workspace.directory / "run").exists()


def test_a_dry_run_needs_no_files_but_names_all_that_are_missing(workspace, monkeypatch, capsys):
    changes = {
        "model.ae.from_pretrained": "/absent/vae",
        "model.text_encoder.from_pretrained": "/absent/text_encoder",
        "model.predictor.from_pretrained": "absent.pt",
        "data.dataset_param.text_tokenizer_path": "absent/tokenizer",
        "data.dataset_param.metafile_or_dir_path": "absent.lmdb",
    }
    for words in ([*workspace.arguments(changes), "--dry-run"], workspace.arguments(changes)):
        monkeypatch.setattr("sys.argv", ["flashi2v-train", *words])
        with pytest.raises(SystemExit) as stop:
            launcher.main()
        told = capsys.readouterr()
        assert stop.value.code == 2
        assert told.err.splitlines()[-1].startswith("flashi2v-train: --dry-run")
        if "--dry-run" not in words:
            assert told.out == ""
            continue
        plan, missing = told.out.split("missing      5 ")
        assert "GiB per process" in plan
        assert all(f" = {path}\n" in missing for path in changes.values())
        assert missing.count("    from: ") == 5
        assert "in bf16" in missing
    assert not (workspace.directory / "run").exists()


def test_a_dry_run_of_the_reference_says_where_its_weights_come_from(workspace, monkeypatch, capsys):
    config = full_size(workspace, "1.3B")
    ae = config.model.ae.model_copy(update={"from_pretrained": "/absent/Wan/vae"})
    predictor = config.model.predictor.model_copy(update={"from_pretrained": "absent.pt", "text_dim": 4096})
    config = replace(config, model=config.model.model_copy(update={"ae": ae, "predictor": predictor}))
    told = missing_files(config)
    assert "Wan2.1's VAE, 0.5 GB" in told
    assert "hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers --include 'vae/*' --local-dir /absent/Wan" in told
    assert "weights of the transformer (1.3B), 2.8" in told
    assert "hf download yunyangge/FlashI2V-1.3B" in told


def test_a_split_is_suggested_as_it_is_to_be_written(workspace):
    config = full_size(workspace, "1.3B", pipeline_model_parallel_size=4, global_batch_size=8, nproc_per_node=4)
    text = suggest_split(config, config.parallel_dims(4))
    split = json.loads("{" + text.splitlines()[0] + "}")["pipeline_num_layers"]
    assert sum(split) == 30
    assert split[0] <= min(split[1:3])
