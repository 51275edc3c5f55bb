"""Checkpoints: of any layout into any other, from state that changes meanwhile, whole whatever happens."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from flashi2v_data.errors import InputError, StorageError
from flashi2v_model import FlashI2VTransformer3DModel
from flashi2v_model.cli import convert
from flashi2v_model.errors import InputError as ModelInputError
from flashi2v_model.weights import read_state_dict
from flashi2v_model.weights.checkpoint import LATEST, SafeReader, newest_checkpoint
from flashi2v_model.weights.checksums import CHECKSUMS
from flashi2v_train import checkpoint
from flashi2v_train.checkpoint import Checkpoints, load, run_state
from flashi2v_train.ema import EMA
from flashi2v_train.options import ParallelOptions
from flashi2v_train.parallel_dims import ParallelDims
from flashi2v_train.parallelise import Stage, keep_layers, shard
from flashi2v_train.world import World, join_world

pytestmark = pytest.mark.slow

SMALL = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 6,
}
LAYOUTS = {
    "one": ParallelDims(1, 1, 1, 1, 1, (6,)),
    "sharded over 2": ParallelDims(1, 1, 1, 2, 1, (6,)),
    "sharded over 4": ParallelDims(1, 1, 1, 4, 1, (6,)),
    "2 replicas of 2 shards": ParallelDims(1, 1, 1, 4, 2, (6,)),
    "pipeline 1 2 2 1": ParallelDims(1, 1, 4, 1, 1, (1, 2, 2, 1)),
    "pipeline 3 3": ParallelDims(1, 1, 2, 1, 1, (3, 3)),
    "sharded pipeline": ParallelDims(1, 1, 2, 2, 1, (2, 4)),
    "tensor parallel": ParallelDims(2, 1, 1, 1, 1, (6,)),
    "sharded tensor parallel": ParallelDims(2, 1, 1, 2, 1, (6,)),
}
# How matrices are shared with tensor parallelism: by rows, by columns; the rest is the same on all.
ROWS, COLUMNS = (".to_q.weight", ".to_q.bias", ".net.0.proj.weight"), (".to_out.0.weight", ".net.2.weight")
PROGRESS = {"iteration": 7, "clip": {"mean": 0.25}}


def _transformer(world: World) -> FlashI2VTransformer3DModel:
    transformer = FlashI2VTransformer3DModel(**SMALL)
    layers = world.dims.layers_of(world.pipeline_rank)
    keep_layers(transformer, layers, embeds=world.embeds, projects=world.projects)
    if world.dims.tensor > 1:
        mesh = world.weights_mesh["tensor"]
        for name, parameter in list(transformer.named_parameters()):
            dim = 0 if name.endswith(ROWS) else 1 if name.endswith(COLUMNS) else None
            if dim is not None:
                owner, _, last = name.rpartition(".")
                shared = distribute_tensor(parameter.detach(), mesh, [Shard(dim)])
                setattr(transformer.get_submodule(owner), last, torch.nn.Parameter(shared))
    shard(Stage(transformer, (16, 1, 4, 4)), transformer, world, ParallelOptions(), bf16=False)
    return transformer


def _state(transformer: FlashI2VTransformer3DModel, *, optimizer: bool = True) -> dict[str, Tensor]:
    """The state of a run, as AdamW makes it at its first step."""
    parameters = dict(transformer.named_parameters())
    adam = torch.optim.AdamW(parameters.values())
    for parameter in parameters.values():
        moments = {key: torch.zeros_like(parameter.detach()) for key in ("exp_avg", "exp_avg_sq")}
        adam.state[parameter] = {"step": torch.zeros(()), **moments}
    return run_state(parameters.items(), adam if optimizer else None, EMA(parameters.items(), 0.9))


def _config(transformer: FlashI2VTransformer3DModel) -> dict:
    return json.loads(transformer.to_json_string())


def _part(key: str, tensor: Tensor) -> tuple[Tensor, Tensor]:
    """What of a tensor is here, and the numbers that belong there: a function of key and place."""
    whole = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
    if not isinstance(tensor, DTensor):
        return tensor, whole
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes))]


def _numbers(value: float) -> dict[str, Tensor]:
    return {f"{part}.{name}": torch.full((50, 40), value) for part in ("model", "ema") for name in "abc"}


def _fill(state: Mapping[str, Tensor]) -> None:
    for key, tensor in state.items():
        here, wanted = _part(key, tensor)
        here.copy_(wanted)


def _wrong(state: Mapping[str, Tensor]) -> list[str]:
    return [key for key, tensor in state.items() if not torch.equal(*_part(key, tensor))]


@contextmanager
def _held_up() -> Iterator[Event]:
    """Nothing is written before the event is set."""
    event, go_on = Event(), checkpoint._Writer.prepare_local_plan

    def held_up(writer, plan):
        event.wait()
        return go_on(writer, plan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint._Writer, "prepare_local_plan", held_up)
        yield event


@contextmanager
def _largest_file(size: int) -> Iterator[None]:
    """Make writing fail as on a full disk."""
    resource = pytest.importorskip("resource")  # of Unix
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# What the processes of a layout do; every function returns something to be compared.


def _save(world: World, run: Path) -> None:
    transformer = _transformer(world)
    state = _state(transformer)
    _fill(state)
    with Checkpoints(run, world, keep=None, asynchronous=True) as checkpoints, _held_up() as event:
        checkpoints.save(7, state, PROGRESS, _config(transformer))
        for tensor in state.values():  # training goes on
            _part("", tensor)[0].fill_(-1)
        event.set()


def _load(world: World, run: Path) -> tuple[dict, list[str]]:
    transformer = _transformer(world)
    state = _state(transformer)
    progress = load(run / "iter_0000007", state, _config(transformer), world)
    return progress, _wrong(state)


def _fail_on_one(world: World, run: Path) -> str:
    resource = pytest.importorskip("resource")  # of Unix
    with Checkpoints(run, world, keep=None, asynchronous=True) as checkpoints:
        checkpoints.save(7, _numbers(1.0), PROGRESS, {})
        checkpoints.wait()
        with _largest_file(100 if world.rank == 2 else resource.RLIM_INFINITY):
            checkpoints.save(8, _numbers(2.0), PROGRESS, {})
            with pytest.raises(StorageError) as failure:
                checkpoints.wait()
    return str(failure.value)


def _average(world: World, run: Path) -> tuple[set[torch.dtype], list[str]]:
    parameters = dict(_transformer(world).named_parameters())
    ema = EMA(parameters.items(), 0.75)
    _fill({name: parameter.detach() for name, parameter in parameters.items()})
    for shadow in ema.shadows.values():
        _part("", shadow)[0].zero_()
    ema.update()
    wrong = [
        name
        for name, shadow in ema.shadows.items()
        if not torch.equal(*_part(name, shadow * 4))  # exact: a power of 2
    ]
    wrong += [name for name, parameter in parameters.items() if type(parameter.data) is not type(ema.shadows[name])]
    return {shadow.dtype for shadow in ema.shadows.values()}, wrong


@contextmanager
def _join(rank: int, layout: str, port: int) -> Iterator[World]:
    """Join a layout as torchrun's processes do."""
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(LAYOUTS[layout].world_size),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    with join_world("cpu", LAYOUTS[layout]) as world:
        yield world


Case = tuple[Callable, str, str]


def _work(rank: int, ports: list[int], directory: Path, cases: list[Case]) -> None:
    results = []
    for port, (job, layout, run) in zip(ports, cases):
        if rank < LAYOUTS[layout].world_size:
            with _join(rank, layout, port) as world:
                results.append((job.__name__, layout, run, job(world, directory / run)))
                world.barrier()
    torch.save(results, directory / f"{rank}.pt")


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["flashi2v_train.checkpoint", "flashi2v_train.parallelise"])


def _start(function: Callable, *arguments: object) -> multiprocessing.Process:
    process = FORKS.Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


SAVED = [name for name in LAYOUTS if name not in ("one", "sharded over 2")]
LOADED = [
    ("sharded over 4", "sharded over 2"),
    ("pipeline 1 2 2 1", "pipeline 3 3"),
    ("tensor parallel", "sharded over 4"),
    ("sharded pipeline", "sharded tensor parallel"),
]


@pytest.fixture(scope="module")
def table(tmp_path_factory, free_ports) -> tuple[Path, list[list]]:
    """Run all cases of several processes in four that are started once; return their directory and results."""
    directory = tmp_path_factory.mktemp("layouts")
    cases = [(_save, name, name) for name in SAVED]
    cases += [(_load, name, saved) for saved, name in LOADED]
    cases += [(_fail_on_one, "sharded over 4", "failed")]
    cases += [(_average, "sharded tensor parallel", "")]
    ports = free_ports(len(cases))
    workers = [_start(_work, rank, ports, directory, cases) for rank in range(4)]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    return directory, [torch.load(directory / f"{rank}.pt") for rank in range(4)]


@pytest.fixture
def alone() -> Iterator[World]:
    with join_world("cpu", LAYOUTS["one"]) as world:
        yield world


@pytest.mark.parametrize(("saved", "layout"), LOADED)
def test_what_one_layout_saved_another_loads_exactly(table, saved, layout):
    results = [result for everything in table[1] for *case, result in everything if case == ["_load", layout, saved]]
    assert results == [(PROGRESS, [])] * LAYOUTS[layout].world_size


@pytest.mark.parametrize("saved", SAVED)
def test_what_any_layout_saved_one_process_loads_exactly(table, alone, saved):
    """Saved in the background while the state was overwritten in place."""
    assert _load(alone, table[0] / saved) == (PROGRESS, [])


def test_the_moving_average_is_sharded_as_the_weights_are(table):
    results = [result for everything in table[1] for name, *_, result in everything if name == "_average"]
    assert results == [({torch.float32}, [])] * 4


def test_a_failure_of_one_process_to_write_is_told_by_all(table):
    directory, results = table
    messages = [result for everything in results for name, *_, result in everything if name == "_fail_on_one"]
    assert len(messages) == 4
    for message in messages:
        assert "process 2: [Errno 27] File too large" in message
        assert "failed/iter_0000007 is the last whole one" in message
    assert sorted(path.name for path in (directory / "failed").iterdir()) == ["iter_0000007", LATEST]


@pytest.mark.parametrize("saved", ["pipeline 1 2 2 1", "2 replicas of 2 shards", "sharded tensor parallel"])
@pytest.mark.parametrize(("kind", "part"), [("ema", "ema"), ("raw", "model")])
def test_a_shared_out_run_converts_to_a_diffusers_directory(table, tmp_path, saved, kind, part):
    convert(table[0] / saved, tmp_path / "model", to="diffusers", weights=kind)
    transformer = FlashI2VTransformer3DModel.from_pretrained(tmp_path / "model")
    state = {f"{part}.{name}": parameter.detach() for name, parameter in transformer.named_parameters()}
    assert len(state) == len([*FlashI2VTransformer3DModel(**SMALL).named_parameters()])
    assert _wrong(state) == []


# One process.


def _names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir() if path.name != LATEST)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_state_may_change_as_soon_as_save_returns(tmp_path, alone, asynchronous):
    state = _numbers(1.0)
    with Checkpoints(tmp_path, alone, keep=None, asynchronous=asynchronous) as checkpoints, _held_up() as event:
        if not asynchronous:
            event.set()
        checkpoints.save(1, state, {"iteration": 1}, {})
        for tensor in state.values():
            tensor.fill_(2.0)
        event.set()
        checkpoints.save(2, state, {"iteration": 2}, {})
        for tensor in state.values():
            tensor.fill_(3.0)
    for iteration in (1, 2):
        found = _numbers(0.0)
        assert load(tmp_path / f"iter_{iteration:07d}", found, {}, alone) == {"iteration": iteration}
        assert all((tensor == iteration).all() for tensor in found.values())
    assert checkpoints.latest == tmp_path / "iter_0000002"


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, alone):
    with Checkpoints(tmp_path, alone, keep=None, asynchronous=True) as checkpoints, _held_up() as event:
        checkpoints.save(1, _numbers(1.0), {}, {})
        checkpoints.poll()
        assert checkpoints.latest is None
        while not _names(tmp_path):  # until the thread that writes has begun
            time.sleep(0.01)
        assert _names(tmp_path) == [".iter_0000001.incomplete"]
        assert newest_checkpoint(tmp_path) is None
        event.set()
        checkpoints.wait()
        assert newest_checkpoint(tmp_path) == checkpoints.latest == tmp_path / "iter_0000001"
        assert checkpoints.stalled_seconds > 0


def test_the_newest_checkpoints_are_kept(tmp_path, alone):
    with Checkpoints(tmp_path, alone, keep=2, asynchronous=True) as checkpoints:
        for iteration in (9, 10, 11, 12):
            checkpoints.save(iteration, _numbers(1.0), {}, {})
    assert _names(tmp_path) == ["iter_0000011", "iter_0000012"]
    assert (tmp_path / LATEST).read_text() == "12\n"

    # Set back by its user, the run goes on from 11; 12 is of another future until it is reached.
    (tmp_path / LATEST).write_text("11\n")
    with Checkpoints(tmp_path, alone, keep=1, asynchronous=False) as checkpoints:
        checkpoints.save(11, _numbers(5.0), {}, {})
        found = _numbers(0.0)
        load(tmp_path / "iter_0000011", found, {}, alone)
        assert found["model.a"].mean() == 1, "the checkpoint that the run resumed from is not written again"
        checkpoints.save(12, _numbers(6.0), {}, {})
        load(tmp_path / "iter_0000012", found, {}, alone)
        assert found["model.a"].mean() == 6
    assert _names(tmp_path) == ["iter_0000012"]

    # Killed between the last checkpoint and the end of the one before it; started again, the run has nothing to save.
    shutil.copytree(tmp_path / "iter_0000012", tmp_path / "iter_0000011")
    with Checkpoints(tmp_path, alone, keep=1, asynchronous=False):
        pass
    assert _names(tmp_path) == ["iter_0000012"]


def test_what_killed_processes_left_is_removed_at_the_next_start(tmp_path, alone):
    for name in (".iter_0000003.incomplete", ".iter_0000001.deleted", f".{LATEST}.x1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_text("")
    (tmp_path / "metrics.jsonl").write_text("")
    with Checkpoints(tmp_path, alone, keep=None, asynchronous=True):
        assert _names(tmp_path) == ["metrics.jsonl"]


@pytest.mark.parametrize("size", [100, 1000, 20_000])
def test_a_full_disk_is_one_clear_line_and_costs_no_checkpoint(tmp_path, alone, size):
    with Checkpoints(tmp_path, alone, keep=1, asynchronous=True) as checkpoints:
        checkpoints.save(1, _numbers(1.0), {"iteration": 1}, {})
        checkpoints.wait()
        with _largest_file(size):
            checkpoints.save(2, _numbers(2.0), {"iteration": 2}, {})
            with pytest.raises(StorageError) as failure:
                checkpoints.wait()
        assert "File too large" in str(failure.value)
        assert f"{tmp_path / 'iter_0000001'} is the last whole one" in str(failure.value)
        assert "\n" not in str(failure.value)
        assert _names(tmp_path) == ["iter_0000001"]
        found = _numbers(0.0)
        assert load(tmp_path / "iter_0000001", found, {}, alone) == {"iteration": 1}
        assert all((tensor == 1).all() for tensor in found.values())
        checkpoints.save(3, _numbers(3.0), {}, {})  # there is room again
    assert _names(tmp_path) == ["iter_0000003"]


def _save_where_nothing_is(run: Path, world: World, error: Exception | None = None) -> None:
    with Checkpoints(run, world, keep=None, asynchronous=True) as checkpoints:
        shutil.rmtree(run)
        checkpoints.save(1, _numbers(1.0), {}, {})
        if error is not None:
            raise error


def test_a_directory_that_vanished_is_not_made_anew(tmp_path, alone):
    with pytest.raises(StorageError, match=r"No such file .* there is none before it"):
        _save_where_nothing_is(tmp_path / "run", alone)
    assert not (tmp_path / "run").exists()


def test_an_error_that_ends_the_run_goes_before_that_of_a_lost_checkpoint(tmp_path, alone, caplog):
    with pytest.raises(ZeroDivisionError):
        _save_where_nothing_is(tmp_path / "run", alone, ZeroDivisionError())
    assert "could not be written" in caplog.text


def test_an_optimizer_that_was_not_saved_must_be_started_anew(tmp_path, alone):
    transformer = _transformer(alone)
    config = _config(transformer)
    with Checkpoints(tmp_path, alone, keep=None, asynchronous=False) as checkpoints:
        weights = _state(transformer, optimizer=False)
        _fill(weights)
        checkpoints.save(7, weights, PROGRESS, config)
        everything = _state(transformer)
        _fill(everything)
        checkpoints.save(8, everything, PROGRESS, config)
    assert not any(key.startswith("optimizer.") for key in weights)
    with pytest.raises(InputError, match=r"iter_0000007 holds no state of the optimizer .* pass --no-load-optim"):
        load(tmp_path / "iter_0000007", _state(transformer), config, alone)
    for iteration in (7, 8):
        found = _state(_transformer(alone), optimizer=False)
        assert load(tmp_path / f"iter_000000{iteration}", found, config, alone) == PROGRESS
        assert _wrong(found) == []


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path, alone):
    state = _numbers(1.0)
    with Checkpoints(tmp_path, alone, keep=None, asynchronous=False) as checkpoints:
        checkpoints.save(1, state, {}, {"num_layers": 40})
    for changed, config, words in (
        ({**state, "model.d": torch.zeros(1)}, {"num_layers": 40}, "the run alone has model.d"),
        ({"model.a": torch.zeros(1)}, {"num_layers": 40}, "the checkpoint alone has ema.a"),
        (state, {"num_layers": 30}, "was trained with num_layers 40, this run has 30"),
        ({**state, "model.a": torch.zeros(7)}, {}, "is damaged or of another model: process 0: .*[sS]ize"),
    ):
        with pytest.raises(InputError, match=words) as failure:
            load(tmp_path / "iter_0000001", changed, config, alone)
        assert "\n" not in str(failure.value)


def _save_two(run: Path, world: World) -> None:
    with Checkpoints(run, world, keep=None, asynchronous=False) as checkpoints:
        for iteration in (1, 2):
            checkpoints.save(iteration, _numbers(float(iteration)), {"iteration": iteration}, {"num_layers": 2})


def test_a_bit_flipped_in_any_file_of_a_checkpoint_is_noticed_and_the_way_out_is_named(tmp_path, alone):
    _save_two(tmp_path, alone)
    files = sorted((tmp_path / "iter_0000002").iterdir())
    assert [file.name for file in files] == [
        ".metadata", "__0_0.distcp", CHECKSUMS, "config.json", "progress.json"
    ]  # fmt: skip
    chance = random.Random(0)
    for file in files:
        whole = file.read_bytes()
        for _ in range(20):
            damaged = bytearray(whole)
            damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
            file.write_bytes(damaged)
            with pytest.raises(InputError, match=r"is damaged.*: --load-iteration 1 goes on"):
                load(file.parent, _numbers(0.0), {"num_layers": 2}, alone)
        file.write_bytes(whole[:-2])  # the last is the end of a line
        with pytest.raises(InputError, match=r"is damaged.*--load-iteration 1 goes on"):
            load(file.parent, _numbers(0.0), {"num_layers": 2}, alone)
        file.write_bytes(whole)
    load(files[0].parent, _numbers(0.0), {"num_layers": 2}, alone)


def test_what_is_not_read_is_not_verified_and_what_is_read_is(tmp_path, alone):
    state = {f"{part}.weight": torch.rand(2048, 1024) for part in ("ema", "model")}
    with Checkpoints(tmp_path, alone, keep=None, asynchronous=False) as checkpoints:
        checkpoints.save(1, state, {}, {})
    [file] = (tmp_path / "iter_0000001").glob("*.distcp")
    place = file.read_bytes().index(state["model.weight"].numpy().tobytes())
    with file.open("r+b") as opened:
        opened.seek(place + 4_200_000)
        opened.write(b"damage")
    assert torch.equal(read_state_dict(tmp_path, ema=True)["weight"], state["ema.weight"])
    with pytest.raises(ModelInputError, match=r"__0_0.distcp is damaged.*take another checkpoint"):
        read_state_dict(tmp_path, ema=False)


def test_a_checkpoint_without_checksums_loads_with_a_word(tmp_path, alone, caplog):
    _save_two(tmp_path, alone)
    (tmp_path / "iter_0000002" / CHECKSUMS).unlink()
    found = _numbers(0.0)
    for _ in range(2):
        load(tmp_path / "iter_0000002", found, {"num_layers": 2}, alone)
    assert found["model.a"].mean() == 2
    assert caplog.text.count("has no checksums") == 1


@pytest.mark.parametrize("with_checksums", [True, False])
def test_without_a_pointer_the_newest_whole_checkpoint_is_taken(tmp_path, alone, caplog, with_checksums):
    _save_two(tmp_path, alone)
    (tmp_path / LATEST).unlink()
    if not with_checksums:
        for file in tmp_path.glob(f"iter_*/{CHECKSUMS}"):
            file.unlink()
    assert newest_checkpoint(tmp_path) == tmp_path / "iter_0000002"
    assert f"{tmp_path / 'iter_0000002'} is the newest whole checkpoint" in caplog.text
    shard = tmp_path / "iter_0000002" / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:1000])  # half copied
    assert newest_checkpoint(tmp_path) == tmp_path / "iter_0000001"
    (tmp_path / "iter_0000001" / "__0_0.distcp").unlink()
    with pytest.raises(ModelInputError, match=r"none is whole \(.*__0_0.distcp has 1000 bytes of"):
        newest_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "pointer", [b"", b"\xff\xfe1\0", b"9" * 5000, b"-1", b"../other/iter_0000001", b"/", b".", b"..", b"1\0"]
)
def test_a_pointer_of_garbage_is_one_line(tmp_path, alone, pointer):
    _save_two(tmp_path / "run", alone)
    (tmp_path / "other").symlink_to(tmp_path / "run")
    (tmp_path / "run" / LATEST).write_bytes(pointer)
    with pytest.raises(ModelInputError, match="which is no checkpoint here: write the number of one") as failure:
        newest_checkpoint(tmp_path / "run")
    assert "\n" not in str(failure.value)
    assert len(str(failure.value)) < 500


def _save_without_end(run: Path) -> None:
    torch.set_num_threads(1)
    with join_world("cpu", LAYOUTS["one"]) as world, Checkpoints(run, world, keep=2, asynchronous=True) as checkpoints:
        newest = checkpoints.latest
        iteration = 0
        if newest is not None:
            iteration = load(newest, _numbers(0.0), {}, world)["iteration"]
        while True:
            iteration += 1
            state = _numbers(float(iteration))
            checkpoints.save(iteration, state, {"iteration": iteration}, {})


def test_killed_at_any_moment_a_run_goes_on_from_a_whole_checkpoint(tmp_path):
    chance = random.Random(0)
    seen = 0
    for _ in range(8):
        process = _start(_save_without_end, tmp_path)
        while (newest := newest_checkpoint(tmp_path)) is None or int(newest.name[5:]) <= seen:
            assert process.is_alive()
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.15))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        newest = newest_checkpoint(tmp_path)
        with join_world("cpu", LAYOUTS["one"]) as world:
            for visible in tmp_path.glob("iter_*"):
                found = _numbers(0.0)
                iteration = load(visible, found, {}, world)["iteration"]
                assert visible.name == f"iter_{iteration:07d}"
                assert all((tensor == iteration).all() for tensor in found.values())
        assert int(newest.name[5:]) > seen
        seen = int(newest.name[5:])
    with join_world("cpu", LAYOUTS["one"]) as world, Checkpoints(tmp_path, world, keep=2, asynchronous=True):
        assert not [name for name in _names(tmp_path) if name.startswith(".")]
        assert len(read_state_dict(tmp_path)) == 3


def _save_twice(rank: int, run: Path, port: int) -> None:
    write = checkpoint._Writer.write_data

    def die(writer, *arguments):
        if rank == 1 and "2" in str(writer.path.name):
            os.kill(os.getpid(), signal.SIGKILL)
        return write(writer, *arguments)

    with _join(rank, "sharded over 2", port) as world, pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint._Writer, "write_data", die)
        with Checkpoints(run, world, keep=1, asynchronous=True) as checkpoints:
            for iteration in (1, 2):
                checkpoints.save(iteration, _numbers(float(iteration)), {"iteration": iteration}, {})
            with pytest.raises(RuntimeError, match="peer"):
                checkpoints.wait()


def test_a_process_that_dies_while_all_save_holds_nobody_up_and_costs_no_checkpoint(tmp_path, alone, free_ports):
    [port] = free_ports(1)
    processes = [_start(_save_twice, rank, tmp_path, port) for rank in range(2)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, -signal.SIGKILL]
    assert _names(tmp_path) == ["iter_0000001"]
    found = _numbers(0.0)
    assert load(newest_checkpoint(tmp_path), found, {}, alone) == {"iteration": 1}
    assert all((tensor == 1).all() for tensor in found.values())


def test_an_interrupt_while_a_checkpoint_is_read_is_an_interrupt(tmp_path, alone, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    _save_two(tmp_path, alone)
    monkeypatch.setattr(SafeReader, "read_data", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(tmp_path / "iter_0000002", _numbers(0.0), {"num_layers": 2}, alone)
    with pytest.raises(KeyboardInterrupt):
        read_state_dict(tmp_path, ema=False)
