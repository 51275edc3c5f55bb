"""`flashi2v-train --device npu`, held to the losses of one process of the CPU."""

import json

import pytest
from npu_runs import EMULATED

STEPS = 2 if EMULATED else 20
CLOSE = 1e-5 if EMULATED else 1e-2  # what losses may differ by, as a share
CLOSE_IN_BF16 = 3e-2
SAVED = {"save_interval": STEPS}
ADAPTIVE = {"clip_grad_ema_decay": 0.9}
LAYOUTS = {
    "FSDP2": {},
    "pipeline": {"pipeline_model_parallel_size": 2},
    "tensor parallel": {"tensor_model_parallel_size": 2},
    "context parallel": {"context_parallel_size": 2},
}


@pytest.fixture(scope="module")
def train(make_workspace, runs):
    """Return what trains, in a directory by the run's name, and gives the losses of all steps."""
    workspaces = {}

    def run(name, changes=None, *, device="npu", processes=1, flags=(), **options):
        workspace = workspaces.setdefault(name, make_workspace(name.replace(" ", "_")))
        plan = {"train_iters": STEPS, "global_batch_size": 2, "lr": 1e-3, "ema_decay": 0.9, **options}
        words = workspace.arguments(changes, device=device, **plan)
        runs(f"training: {name}", "flashi2v-train", *words, *flags, processes=processes)
        return losses(workspace.directory / "run")

    def losses(directory):
        return [json.loads(line)["loss"] for line in (directory / "metrics.jsonl").read_text().splitlines()]

    def validation_loss(name):
        first = (workspaces[name].directory / "run/validation.jsonl").read_text().splitlines()[0]
        return json.loads(first)["validation_loss"]

    run.validation_loss = validation_loss
    return run


VALIDATED = {"eval_interval": STEPS, "eval_steps": 1, "eval_videos": 1, "eval_iters": 2}


@pytest.fixture(scope="module")
def on_cpu(train):
    """Return the losses that all others are held to, and one step more than most of them run."""
    return train("CPU", device="cpu", **VALIDATED | {"train_iters": STEPS + 1})


def test_training_is_the_cpus_with_validation_a_resume_and_attention_kept_on_the_host(train, on_cpu, runs):
    offloaded = {"model.predictor.attention_async_offload": True}
    train("one process", offloaded, **VALIDATED, **SAVED)
    resumed = train("one process", offloaded, train_iters=STEPS + 1, recompute_granularity="selective")
    assert resumed == pytest.approx(on_cpu, rel=CLOSE)
    assert train.validation_loss("one process") == pytest.approx(train.validation_loss("CPU"), rel=CLOSE)
    used = runs.used("training: one process")
    assert not EMULATED or used.keys() >= {"npu.npu_fusion_attention_grad", "aten._fused_adamw_"}


def test_recomputed_layers_that_keep_attention_and_clipping_that_adapts(train):
    partly = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1}
    partly["recompute_num_layers_skip_core_attention"] = 1
    expected = train("CPU, adaptive", device="cpu", **ADAPTIVE)
    found = train("recomputed", **partly, **ADAPTIVE, flags=["--recompute-skip-core-attention"])
    assert found == pytest.approx(expected, rel=CLOSE)


def test_groups_of_layers_recomputed_in_bf16_stay_close(train, on_cpu):
    groups = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2}
    assert train("bf16", **groups, flags=["--bf16"]) == pytest.approx(on_cpu[:STEPS], rel=CLOSE_IN_BF16)


@pytest.mark.usefixtures("two_npus")
@pytest.mark.parametrize("name", LAYOUTS)
def test_two_processes_train_as_the_cpu_does(name, train, on_cpu):
    changes = {"model.predictor.pipeline_num_layers": [1, 1]} if name == "pipeline" else {}
    found = train(name, changes, processes=2, **LAYOUTS[name])
    assert found == pytest.approx(on_cpu[:STEPS], rel=CLOSE)


@pytest.mark.usefixtures("two_npus")
def test_sharded_training_in_bf16_resumes_where_it_was(train, on_cpu):
    first = train("FSDP2 in bf16", processes=2, flags=["--bf16"], **SAVED)
    resumed = train("FSDP2 in bf16", processes=2, flags=["--bf16"], train_iters=STEPS + 1)
    assert resumed[:STEPS] == first
    assert resumed == pytest.approx(on_cpu, rel=CLOSE_IN_BF16)
