"""Checkpoints of a run: DCP directories whose keys are global parameter names, visible only when whole.

A run's directory holds `iter_0000100/` and so on, and a file that names the newest. What begins with a dot is being
written or deleted, and is removed when a run starts.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future as TorchFuture

from flashi2v_data.atomic import atomic_file
from flashi2v_data.errors import InputError, StorageError
from flashi2v_model.errors import DamagedError
from flashi2v_model.weights.checkpoint import (
    ADAPTERS,
    LATEST,
    SafeReader,
    cause_of,
    checkpoints_of,
    is_checkpoint,
    missing_part,
    newest_checkpoint,
)
from flashi2v_model.weights.checksums import CHECKSUMS, FileSums, HashingFiles, describe, sums_of, warn_unverified
from flashi2v_train.ema import EMA
from flashi2v_train.world import World

logger = logging.getLogger(__name__)

_OPTIMIZER = "optimizer."
PROGRESS, _CONFIG = "progress.json", "config.json"
# A process that dies is noticed at once; this is for one that waits while others write to a slow disk.
_WRITE_TIMEOUT = timedelta(hours=2)
_PATIENCE_SECONDS = 5.0

T = TypeVar("T")


def run_state(
    parameters: Iterable[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer | None, ema: EMA | None
) -> dict[str, Tensor]:
    """Return everything with a shape that this process holds, by name: saving reads it, loading writes into it.

    The tensors are views that stay live. Make them once, after sharding: between a forward and its backward, sharded
    parameters may be replaced by gathered ones.

    Args:
        parameters: (name, parameter) pairs, named as in the whole transformer.
        optimizer: of these parameters, or None to leave its state out.
        ema: of these parameters.
    """
    state = {}
    for name, parameter in parameters:
        state[f"model.{name}"] = parameter.detach()
        if optimizer is not None:
            own = optimizer.state.get(parameter, {})
            state |= {f"{_OPTIMIZER}{name}.{key}": value for key, value in own.items()}
    if ema is not None:
        state |= {f"ema.{name}": shadow for name, shadow in ema.shadows.items()}
    return state


class Checkpoints:
    """The checkpoints of a run, written by all processes together, while training continues if that is wanted.

    All methods but `poll` are called by all processes at the same step. As a context manager it waits at its end for
    what is being written.

    Args:
        run: directory of the run, the same on all processes; made, and rid of what killed processes left.
        world: this process among all.
        keep: how many of the newest checkpoints to keep; None: all.
        asynchronous: write in the background, from a copy in the host's memory.
        start: the checkpoint of this run that it resumes from; None: the newest.
        on_wait: called now and then while a checkpoint that is being written is waited for.

    Attributes:
        latest: the newest checkpoint that is whole, as far as this process knows.
        stalled_seconds: how long training was held up, over all calls.

    Raises:
        StorageError: leftovers cannot be removed.
        InputError: the run names a checkpoint that is not there.
    """

    def __init__(
        self,
        run: Path,
        world: World,
        *,
        keep: int | None,
        asynchronous: bool,
        start: Path | None = None,
        on_wait: Callable[[], None] = lambda: None,
    ) -> None:
        self._run, self._world, self._keep, self._asynchronous = run, world, keep, asynchronous
        self._on_wait = on_wait
        # A group of its own: its messages must not mix with those of the run.
        self._group = dist.new_group(backend="gloo", timeout=_WRITE_TIMEOUT)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[Path] | None = None
        self._staged: dict[str, Tensor] = {}
        self.stalled_seconds = 0.0
        try:
            self.latest = self._by_first(lambda: self._open(start))
        except OSError as error:
            raise StorageError(f"--save {run}: {_reason(error)}") from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.wait()
            if error is None and self.latest is not None and self._world.is_first:
                self._delete_before(self.latest)  # what a run left that was killed before it came to this
        except RuntimeError as failure:
            if error is None:
                raise
            logger.error("the checkpoint that was being written is lost: %s", failure)  # the run ends for the other
        finally:
            self._thread.shutdown()

    def save(
        self, iteration: int, state: Mapping[str, Tensor], progress: dict[str, Any], config: dict[str, Any]
    ) -> None:
        """Write `iter_0000100/` and point to it; the state may change as soon as this returns.

        A checkpoint that is being written is waited for. That of the iteration that the run resumed from, or saved
        last, is there already and stays.

        Args:
            iteration: number of steps done.
            state: this process's part, of `run_state`, with the same keys in every call.
            progress: what else it takes to go on, the same on all processes.
            config: of the whole transformer.

        Raises:
            StorageError: this one or the one before could not be written; older checkpoints are as they were.
        """
        started = time.perf_counter()
        self.wait()
        final = self._run / f"iter_{iteration:07d}"
        if final == self.latest:
            return
        texts = {name: json.dumps(value, indent=2) + "\n" for name, value in ((PROGRESS, progress), (_CONFIG, config))}
        if self._asynchronous:
            self._pending = self._thread.submit(self._write, final, self._stage(state), texts)
        else:
            self.latest = self._write(final, state, texts)
        self.stalled_seconds += time.perf_counter() - started

    def poll(self) -> None:
        """Notice that a checkpoint is written; cheap, and without a word to other processes.

        Raises:
            StorageError: it could not be written. All processes come to know, though not all at the same step.
        """
        if self._pending is not None and self._pending.done():
            self._settle(self._pending)

    def wait(self) -> None:
        """Wait for the checkpoint that is being written, if one is.

        Raises:
            StorageError: it could not be written.
        """
        if self._pending is not None:
            while wait([self._pending], _PATIENCE_SECONDS).not_done:
                self._on_wait()
            self._settle(self._pending)

    def _settle(self, done: "Future[Path]") -> None:
        self._pending = None
        self.latest = done.result()

    @torch.no_grad()
    def _stage(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Copy the state to memory that is kept for the next time: to allocate it anew takes longer than to copy."""
        for key, value in state.items():
            if key not in self._staged:
                self._staged[key] = torch.empty_like(value, device="cpu")
            _local(self._staged[key]).copy_(_local(value))
        return self._staged

    def _write(self, final: Path, state: Mapping[str, Tensor], texts: dict[str, str]) -> Path:
        partial = _hidden(final, "incomplete")
        try:
            # Without its parents: where the run's directory has vanished, so may have the disk that it was on.
            self._by_first(partial.mkdir)
            writer = _Writer(partial)
            save_tensors(dict(state), storage_writer=writer, process_group=self._group)
            everyones: list[Any] = [None] * self._world.size
            dist.all_gather_object(everyones, writer.fs.sums, group=self._group)
            sums: dict[str, FileSums] = {name: found for one in everyones for name, found in one.items()}
            sums |= {name: sums_of(text.encode()) for name, text in texts.items()}
            texts = {**texts, CHECKSUMS: describe(sums)}
            self._by_first(lambda: self._complete(partial, final, texts))
        except (OSError, CheckpointException) as error:
            cause_of(error)  # raises an interrupt, which is no fault of the disk
            last = "there is none before it" if self.latest is None else f"{self.latest} is the last whole one"
            raise StorageError(
                f"{final} could not be written: {_reason(error)}; {last}: make room there, or fix what is wrong, and "
                "start the same command again"
            ) from error
        finally:
            if self._world.is_first:
                shutil.rmtree(partial, ignore_errors=True)  # what is left then goes when the run starts again
        return final

    def _by_first(self, work: Callable[[], T]) -> T:
        """Have the first process do something, and let all have the result, or its OSError or ValueError."""
        outcome: list[Any] = [None, None]
        if self._world.is_first:
            try:
                outcome[0] = work()
            except (OSError, ValueError) as error:  # an InputError is a ValueError, in every package
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        result, failure = outcome
        if failure is not None:
            raise failure
        return cast(T, result)

    def _open(self, start: Path | None) -> Path | None:
        self._run.mkdir(parents=True, exist_ok=True)
        for leftover in self._run.glob(".iter_*"):
            shutil.rmtree(leftover)
        for leftover in self._run.glob(f".{LATEST}.*"):
            shutil.rmtree(leftover)
        return start or newest_checkpoint(self._run)

    def _complete(self, partial: Path, final: Path, texts: dict[str, str]) -> None:
        """After DCP: add our files, show the checkpoint, point to it, delete old ones, in this order."""
        for name, text in texts.items():
            with open(partial / name, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        if final.exists():  # the run was resumed from before it, so nothing points to it
            _delete(final)
        partial.rename(final)
        with atomic_file(self._run / LATEST) as pointer:
            pointer.write_text(f"{int(final.name.removeprefix('iter_'))}\n")
        self._delete_before(final)

    def _delete_before(self, newest: Path) -> None:
        for old in self._outdated(newest):
            try:
                _delete(old)
            except OSError as error:
                logger.warning("%s could not be deleted: %s", old, _reason(error))

    def _outdated(self, newest: Path) -> list[Path]:
        """Return those that are too many.

        Later ones than the newest are of a run that was set back; they do not count, and go when they are reached.
        """
        if self._keep is None:
            return []
        older = sorted(path for path in self._run.glob("iter_" + 7 * "[0-9]") if path.name < newest.name)
        return older[: max(0, len(older) + 1 - self._keep)]


class _Writer(FileSystemWriter):
    """DCP's writer, for a directory that is there already and that all processes must see; it hashes what it writes."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.fs: HashingFiles = HashingFiles()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        if not Path(self.path).is_dir():
            raise FileNotFoundError("the directory is not to be seen there: --save must be on a disk that nodes share")
        return super().prepare_local_plan(plan)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            # On a full disk torch speaks of its file format first.
            if isinstance(error.__context__, OSError):
                raise OSError(*error.__context__.args) from error
            raise


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _hidden(directory: Path, state: str) -> Path:
    return directory.with_name(f".{directory.name}.{state}")


def _delete(directory: Path) -> None:
    """Delete a checkpoint; one that is half deleted is never to be seen."""
    hidden = _hidden(directory, "deleted")
    directory.rename(hidden)
    shutil.rmtree(hidden)


def _reason(error: BaseException) -> str:
    """Return what an error says, as one phrase."""
    if isinstance(error, CheckpointException):
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"process {rank}: {_reason(cause)}"
    return " ".join(str(error).split())[:300]


def find_checkpoint(save: Path, load: Path | None, iteration: int | None, world: World) -> Path | None:
    """Return the checkpoint that a run resumes from, None where it begins; called by all processes.

    It is what the first process sees: a shared disk may show others an older one yet.

    Args:
        save: directory of the run.
        load: of the run to resume, where this one has no checkpoint of its own.
        iteration: number of the checkpoint, instead of the newest.
        world: this process among all.

    Raises:
        InputError: there is no such checkpoint.
    """
    found = [_find(save, load, iteration) if world.is_first else None]
    dist.broadcast_object_list(found, 0, world.control)
    return found[0]


def _find(save: Path, load: Path | None, iteration: int | None) -> Path | None:
    runs = [save]
    # Megatron's scripts name one directory twice; it is empty at the first start.
    if load is not None and load.resolve() != save.resolve():
        runs.append(load)
    if iteration is not None:
        for run in runs:
            if is_checkpoint(run / f"iter_{iteration:07d}"):
                return run / f"iter_{iteration:07d}"
        there = ", ".join(str(int(path.name[5:])) for run in runs for path in checkpoints_of(run)[:10])
        raise InputError(f"--load-iteration {iteration}: there is no such checkpoint, only {there or 'none'}")
    for run in runs:
        directory = newest_checkpoint(run)
        if directory is not None:
            later = checkpoints_of(run)[0]
            if later.name > directory.name:
                logger.warning("%s is later than the one that %s names, and is not used", later, run / LATEST)
            return directory
    if len(runs) > 1:
        raise InputError(f"--load {load}: holds no checkpoint ({LATEST} is not there)")
    return None


def load(directory: Path, state: Mapping[str, Tensor], config: Mapping[str, Any], world: World) -> dict[str, Any]:
    """Load a checkpoint into a run's state, however it was spread; called by all processes.

    Args:
        directory: the checkpoint.
        state: of `run_state`, this process's part. Where no process has state of an optimizer, the checkpoint's is
            not read.
        config: of the whole transformer.
        world: this process among all.

    Returns:
        the checkpoint's progress.

    Raises:
        InputError: the checkpoint is damaged, or of another model or another kind of run.
    """
    try:
        return _load(directory, state, config, world)
    except DamagedError as error:
        raise InputError(f"{error}: {_way_out(directory)}") from error


def _load(directory: Path, state: Mapping[str, Tensor], config: Mapping[str, Any], world: World) -> dict[str, Any]:
    reader = SafeReader(directory)
    if world.is_first:
        warn_unverified(directory)
    everyones: list[set[str]] = [set()] * world.size
    dist.all_gather_object(everyones, set(state), group=world.control)
    contents = reader.read_metadata().state_dict_metadata
    # Whatever is no tensor would be unpickled.
    ours, theirs = set().union(*everyones), {k for k, v in contents.items() if isinstance(v, TensorStorageMetadata)}
    if not _optimizer_keys(ours):
        theirs -= _optimizer_keys(theirs)
    elif not _optimizer_keys(theirs):
        raise InputError(
            f"{directory} holds no state of the optimizer (it was saved with --no-save-optim): pass --no-load-optim "
            "to start the optimizer anew"
        )
    if ours != theirs:
        only = [f"the run alone has {key}" for key in sorted(ours - theirs)]
        only += [f"the checkpoint alone has {key}" for key in sorted(theirs - ours)]
        raise InputError(f"{directory} is of another model, --use-ema, --freeze or LoRA: {'; '.join(only)[:300]}")
    try:
        saved_config, progress = (dict(json.loads(reader.fs.read(directory / name))) for name in (_CONFIG, PROGRESS))
    except DamagedError:
        raise
    except (ValueError, TypeError, RecursionError, OSError) as error:
        raise DamagedError(f"{directory} is damaged: {_reason(error)}") from error
    ours_said, said = ({**values, **values.get(ADAPTERS, {})} for values in (config, saved_config))
    for key, value in ours_said.items():
        if (key == "_class_name" or not key.startswith("_")) and said.get(key) != value:
            raise InputError(f"{directory} was trained with {key} {said.get(key)}, this run has {value}")
    try:
        load_tensors(dict(state), storage_reader=reader, process_group=world.control)
    except (CheckpointException, RuntimeError, ValueError, OSError) as error:
        if isinstance(cause := cause_of(error), DamagedError):
            raise cause from error
        raise InputError(f"{directory} is damaged or of another model: {_reason(error)}") from error
    return progress


def _way_out(damaged: Path) -> str:
    """Say how to continue a run whose checkpoint is damaged."""
    for directory in checkpoints_of(damaged.parent):
        if directory.name < damaged.name and not missing_part(directory):
            return f"--load-iteration {int(directory.name.removeprefix('iter_'))} goes on from the checkpoint before it"
    return "there is no checkpoint before it: start anew, with another --save"


def _optimizer_keys(keys: Iterable[str]) -> set[str]:
    return {key for key in keys if key.startswith(_OPTIMIZER)}
