"""The same run on every layout: losses, gradients and checkpoints against those of one process.

Four processes are started once and run the whole table, each case in as many of them as it needs.
"""

import json
import math
import os
import shutil
import traceback
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import forked
import pytest
import torch
from safetensors.torch import save_file

from flashi2v_data.store.reader import LmdbStore, open_store, write_store
from flashi2v_model.weights import read_state_dict
from flashi2v_train import encode
from flashi2v_train.clip import AdaptiveClip, scale_gradients, share_of_square
from flashi2v_train.config import read_run_config
from flashi2v_train.cost import count_parameters
from flashi2v_train.options import TrainOptions
from flashi2v_train.processes import StopSignal
from flashi2v_train.trainer import Trainer
from flashi2v_train.world import join_world

pytestmark = pytest.mark.slow

# A loss shows the weights before its step: those of the first step are saved, the second updates by what the optimizer
# remembers of it, and the third sees whether it did so rightly.
NUM_PROCESSES, STEPS, SAVED_AT = 4, 3, 1
TWO_AT_ONCE = {"micro_batch_size": 2}  # where a step costs most: its batch of four is accumulated all the same
PIPELINE = {"pipeline_model_parallel_size": 2}
CONTEXT_3 = {"context_parallel_size": 3, "context_parallel_algo": "ulysses_cp_algo"}
RING_2 = {"context_parallel_size": 2, "context_parallel_algo": "megatron_cp_algo"}
HYBRID_4 = {"context_parallel_size": 4, "context_parallel_algo": "hybrid_cp_algo", "ulysses_degree_in_cp": 2}
# Norms before and after adaptive clipping, of the public NPU release; see test_parts.
CLIP_TRACE = ((0.8, 0.8), (1.2, 0.999999), (0.9, 0.9), (0.7, 0.7), (1.1, 1.0896), (0.95, 0.95), (6.0, 1.089669))
CLIP_TRACE += ((0.85, 0.85), (0.9, 0.9), (30.0, 0.0), (0.8, 0.8), (1.0, 1.0))
# Processes, options, layers per stage.
LAYOUTS = {
    "one": (1, {}, None),
    "data 2, replicated": (2, {"use_distributed_optimizer": False}, None),
    "data 2, sharded": (2, {}, None),
    "data 4, two replicas of shards": (4, {"num_distributed_optimizer_instances": 2}, None),
    "data 2, never resharded": (2, {"reshard_after_forward": "never"}, None),
    "data 2, shards on the CPU": (2, {"fsdp_cpu_offload": True}, None),
    "tensor 2": (2, TWO_AT_ONCE | {"tensor_model_parallel_size": 2}, None),
    "context 2": (2, TWO_AT_ONCE | {"context_parallel_size": 2}, None),
    "context 3, uneven heads": (3, TWO_AT_ONCE | CONTEXT_3, None),
    "ring 2": (2, TWO_AT_ONCE | RING_2, None),
    "ring 2, attention again": (2, TWO_AT_ONCE | RING_2 | {"recompute_granularity": "selective"}, None),
    "ulysses 2 x ring 2": (4, TWO_AT_ONCE | HYBRID_4, None),
    "tensor 2 x context 2": (4, TWO_AT_ONCE | {"tensor_model_parallel_size": 2, "context_parallel_size": 2}, None),
    "tensor 2 x data 2": (4, {"tensor_model_parallel_size": 2}, None),
    "pipeline 2": (2, PIPELINE, [3, 3]),
    "pipeline 2, gpipe": (2, PIPELINE | {"pipeline_schedule": "gpipe"}, [2, 4]),
    "pipeline 4": (4, {"pipeline_model_parallel_size": 4}, [1, 2, 2, 1]),
    "pipeline 4, zero-bubble": (
        4,
        {"pipeline_model_parallel_size": 4, "pipeline_schedule": "zero-bubble"},
        [1, 2, 2, 1],
    ),
    "pipeline 2, interleaved": (2, PIPELINE, [[1, 2], [2, 1]]),
    "pipeline 2 x data 2": (4, PIPELINE, [3, 3]),
    "pipeline 2 x context 2": (4, PIPELINE | TWO_AT_ONCE | {"context_parallel_size": 2}, [3, 3]),
    "pipeline 2 x ring 2": (4, PIPELINE | TWO_AT_ONCE | RING_2, [3, 3]),
    "pipeline 2 x tensor 2": (4, PIPELINE | TWO_AT_ONCE | {"tensor_model_parallel_size": 2}, [3, 3]),
    "pipeline 2, zero-bubble x data 2": (
        4,
        PIPELINE | {"pipeline_schedule": "zero-bubble"},
        [3, 3],
    ),
}
# What a process of a pipeline holds may all be frozen.
FROZEN = {
    "freeze": ["patch_embedding*", "fourier_*", "learnable_*", "condition_*", *(f"blocks.{n}.*" for n in range(3))]
}
LAYOUTS |= {"frozen half": (1, FROZEN, None), "frozen half, pipeline 2": (2, PIPELINE | FROZEN, [3, 3])}
# Adapters that go on from a file, and two parts that are trained whole beside them.
LORA = TWO_AT_ONCE | {"lora_also": ["learnable_proj", "fourier_embedding"]}
LAYOUTS |= {
    "lora": (1, LORA, None),
    "lora, data 2": (2, LORA, None),
    "lora, tensor 2": (2, LORA | {"tensor_model_parallel_size": 2}, None),
    "lora, context 2": (2, LORA | {"context_parallel_size": 2}, None),
    "lora, pipeline 2": (2, LORA | PIPELINE, [3, 3]),
    "lora, tensor 2 x data 2": (4, LORA | {"tensor_model_parallel_size": 2}, None),
    "lora, pipeline 2 x tensor 2": (4, LORA | PIPELINE | {"tensor_model_parallel_size": 2}, [3, 3]),
}
# `nox -s quantized` has torchao, and runs these alone.
INT8 = LORA | {"lora_quantize": "int8"}
if find_spec("torchao"):
    LAYOUTS |= {
        "int8 lora": (1, INT8, None),
        "int8 lora, data 2": (2, INT8, None),
        "int8 lora, tensor 2 x context 2": (
            4,
            INT8 | {"tensor_model_parallel_size": 2, "context_parallel_size": 2},
            None,
        ),
        "int8 lora, pipeline 2": (2, INT8 | PIPELINE, [3, 3]),
    }
# What others are compared with.
REFERENCES = ("frozen half", "int8 lora", "lora", "buckets", "one")
# Four micro batches over all ranks, of clips of three shapes, one of them images.
BUCKETED = TWO_AT_ONCE | {"global_batch_size": 8}
LAYOUTS |= {
    "buckets": (1, BUCKETED, None),
    "buckets, from pixels": (1, BUCKETED, None),
    "buckets, data 4": (4, BUCKETED, None),
    "buckets, data 2 x context 2": (4, BUCKETED | {"context_parallel_size": 2}, None),
    "buckets, pipeline 2 x data 2": (4, BUCKETED | PIPELINE, [3, 3]),
    "buckets, pipeline 2, interleaved": (2, BUCKETED | PIPELINE, [[1, 2], [2, 1]]),
    "buckets, pipeline 2, zero-bubble": (2, BUCKETED | PIPELINE | {"pipeline_schedule": "zero-bubble"}, [3, 3]),
}
# A run saved on one layout goes on as another one.
RELAYOUTS = [
    ("data 4, two replicas of shards", "data 2, sharded"),
    ("pipeline 4", "pipeline 2"),
    ("tensor 2 x data 2", "data 2, sharded"),
    ("pipeline 2 x data 2", "one"),
    ("one", "pipeline 2, interleaved"),
    ("context 2", "pipeline 2 x tensor 2"),
    ("pipeline 4", "pipeline 4"),
    ("data 2, sharded", "data 2, sharded"),
    ("lora, tensor 2 x data 2", "lora"),
    ("lora", "lora, pipeline 2"),
    ("lora, data 2", "lora, data 2"),
    ("buckets, data 4", "buckets, pipeline 2, interleaved"),
    ("buckets, data 2 x context 2", "buckets, data 2 x context 2"),
]
RESUMED = {f"{old} -> {new}": (old, new) for old, new in RELAYOUTS}


SIZES = {"model.predictor.num_layers": 6, "model.predictor.num_heads": 4}


def bucketed(root: Path) -> dict[str, Any]:
    """Changes for a run on clips of several shapes."""
    return {
        "data.dataset_param.metafile_or_dir_path": str(root / "mixed.lmdb"),
        "data.dataset_param.buckets": [[5, 32, 32], [5, 32, 16], [1, 32, 32]],
    }


def make_options(workspace, name: str, save: Path, root: Path) -> TrainOptions:
    _, options, split = LAYOUTS[name]
    features = str(root / ("mixed" if "buckets" in name else "features"))
    changes = {
        **({} if "pixels" in name else workspace.loaded | {"data.dataset_param.features_path": features}),
        **(bucketed(root) if "buckets" in name else {}),
        **SIZES,
        "model.predictor.pipeline_num_layers": split,
    }
    if "lora" in name:
        changes["model.predictor.from_pretrained"] = str(root / "base")
        options = options | {"lora_from": str(root / "lora.safetensors")}
    return TrainOptions(
        **workspace.files(changes),
        save=save,
        device="cpu",
        train_iters=STEPS,
        lr=1e-3,
        ema_decay=0.9,
        clip_grad_ema_decay=0.99,
        save_interval=SAVED_AT,
        **{"global_batch_size": 4, **options},
    )


class Recorded(Trainer):
    """Keeps the first step's gradients, whole."""

    gradients: dict[str, torch.Tensor] | None = None

    def update(self, norm):
        if self.gradients is None:
            self.gradients = {}
            for name, parameter in self.parameters.items():
                gradient = parameter.grad
                if gradient is None:  # frozen
                    continue
                whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
                self.gradients[name] = whole.clone()
        return super().update(norm)


class Case(NamedTuple):
    name: str
    num_processes: int
    port: int
    options: TrainOptions
    start: Path | None  # the run that it goes on with


def run_case(rank: int, case: Case) -> dict[str, torch.Tensor]:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(case.num_processes),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(case.num_processes),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(case.port),
    }
    config = read_run_config(case.options)
    with join_world("cpu", config.parallel_dims(case.num_processes)) as world:
        trainer = Recorded(config, world)
        trainer.run(StopSignal())
        trace = {} if case.options.trains_adapters else {"clipped norms": clip_trace(trainer)}
    return {**(trainer.gradients or {}), **trace}


def clip_trace(trainer: Trainer) -> torch.Tensor:
    """Clip gradients of known norms; return their norms after it, as all processes together find them."""
    world, clip = trainer.world, AdaptiveClip(1.0, 0.99)
    num_parameters = sum(count_parameters(trainer.config).values())
    holders = world.size // world.dims.pipeline

    def norm() -> float:
        share = share_of_square(trainer.parameters.values(), holders, world.device)
        return world.sum(share[None]).sqrt().item()

    clipped = []
    for wanted, _ in CLIP_TRACE:
        for parameter in trainer.parameters.values():
            parameter.grad = torch.full_like(parameter, wanted / math.sqrt(num_parameters))
        found = norm()
        assert found == pytest.approx(wanted, rel=1e-5)
        scale_gradients(trainer.parameters.values(), clip.factor(found))
        clipped.append(norm())
    return torch.tensor(clipped)


def work(rank: int, cases: list[Case], directory: Path) -> None:
    torch.set_num_threads(1)
    for number, case in enumerate(cases):
        if rank >= case.num_processes:
            continue
        if rank == 0 and case.start:
            go_back(case.start, case.options.save)  # the others wait to be joined
        try:
            result = run_case(rank, case)
        except Exception as error:
            raise RuntimeError(f"{case.name}: {traceback.format_exc()}") from error
        torch.save(result, directory / f"{number}-{rank}.pt")


def go_back(old: Path, new: Path) -> None:
    """Copy a run as it was when it was first saved."""
    shutil.copytree(old, new)
    (new / "latest_checkpointed_iteration.txt").write_text(f"{SAVED_AT}\n")
    for step in range(SAVED_AT + 1, STEPS + 1):
        shutil.rmtree(new / f"iter_{step:07d}")


def make_mixed(store: LmdbStore, path: Path) -> None:
    """Write a store that has every clip whole, its left half, and its first frame alone."""
    clips = [store[index] for index in range(len(store))]
    halves = [clip | {"crop": [0, 16, 0, 32]} for clip in clips]
    write_store(path, [*clips, *halves[1:], *(clip | {"num_frames": 1} for clip in clips[2:])], store.config)


def make_adapter(base: Path, file: Path) -> None:
    """Write an adapter of all matrices of a model's blocks."""
    generator, adapter = torch.Generator().manual_seed(0), {}
    for key, weight in read_state_dict(base, device="meta").items():
        layer = key.removesuffix(".weight")
        if key.startswith("blocks.") and layer != key and weight.ndim == 2:
            adapter[f"{layer}.lora_A.weight"] = 0.1 * torch.randn(3, weight.shape[1], generator=generator)
            adapter[f"{layer}.lora_B.weight"] = 0.1 * torch.randn(weight.shape[0], 3, generator=generator)
            adapter[f"{layer}.alpha"] = torch.tensor(6.0 if ".ffn." in key else 2.0)
    save_file(adapter, file)


def reference(name: str) -> str:
    return next((reference for reference in REFERENCES if reference in name), "one")


def needed(items: list[pytest.Item]) -> dict[str, tuple[str | None, str]]:
    """Return what the tests that were chosen compare: where from, and the layout."""
    chosen = {item.callspec.params["name"] for item in items if item.path == Path(__file__)}
    chosen |= {layout for name in chosen & RESUMED.keys() for layout in RESUMED[name]}
    chosen |= {reference(name) for name in chosen & LAYOUTS.keys()}
    every = {**{name: (None, name) for name in LAYOUTS}, **RESUMED}
    return {name: case for name, case in every.items() if name in chosen}


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory, new_workspace, free_ports) -> dict[str, tuple[Path, dict[str, torch.Tensor]]]:
    """Directory and first gradients of every case."""
    root = tmp_path_factory.mktemp("layouts")
    names = needed(request.session.items)
    places = {name: root / str(number) for number, name in enumerate(names)}
    make_mixed(open_store(new_workspace(root).data["dataset_param"]["metafile_or_dir_path"]), root / "mixed.lmdb")
    # Made by one process; who encodes what on a layout is test_features' matter.
    for name, changes in {"features": {}, "mixed": bucketed(root)}.items():
        files = new_workspace(root).files(changes)
        encode.launch(options=encode.EncodeOptions(**files, output=root / name, device="cpu"))
    make_adapter(new_workspace(root).base(SIZES), root / "lora.safetensors")
    cases = []
    for port, (name, (old, layout)) in zip(free_ports(len(names)), names.items()):
        places[name].mkdir()
        options = make_options(new_workspace(places[name]), layout, places[name] / "run", root)
        cases.append(Case(name, LAYOUTS[layout][0], port, options, places[old] / "run" if old else None))
    forked.call("flashi2v-train", NUM_PROCESSES, work, cases, root)
    return {
        case.name: (case.options.save, collect(root, number, case.num_processes)) for number, case in enumerate(cases)
    }


def collect(root: Path, number: int, num_processes: int) -> dict[str, torch.Tensor]:
    gradients: dict[str, torch.Tensor] = {}
    for rank in range(num_processes):
        for name, gradient in torch.load(root / f"{number}-{rank}.pt").items():
            torch.testing.assert_close(gradient, gradients.setdefault(name, gradient), atol=1e-6, rtol=1e-5)
    return gradients


def metrics(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def column(directory: Path, key: str) -> list[float]:
    return [line[key] for line in metrics(directory)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_computes_what_one_process_computes(runs, name):
    (one, expected), (several, gradients) = runs[reference(name)], runs[name]
    assert len(column(several, "loss")) == STEPS
    assert column(several, "loss") == pytest.approx(column(one, "loss"), rel=1e-5)
    assert column(several, "grad_norm") == pytest.approx(column(one, "grad_norm"), rel=1e-4)
    if "lora" not in name:
        assert gradients["clipped norms"].tolist() == pytest.approx([after for _, after in CLIP_TRACE], abs=2e-5)
    assert gradients.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(gradients[key], gradient, rtol=1e-4, atol=1e-5, msg=f"{name}: {key}")


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_resumes_on_another_layout(runs, name):
    """To rounding; on the same layout bit for bit."""
    old, new = RESUMED[name]
    resumed, expected = column(runs[name][0], "loss"), column(runs[new][0], "loss")
    assert resumed[:SAVED_AT] == column(runs[old][0], "loss")[:SAVED_AT]
    if old == new:
        assert resumed == expected
    assert resumed == pytest.approx(expected, rel=1e-5)
