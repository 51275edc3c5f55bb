"""A worker: the process of one device, which samples one job after the other by the library's own commands.

Several processes share each video where torchrun's variables say so; the first of them speaks with the queue, and tells
the others. A job is cancelled between two steps, or between two layers of the VAE.
"""

import contextlib
import gc
import logging
import math
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from diffusers.callbacks import PipelineCallback
from torch import Tensor
from tqdm import tqdm

from flashi2v_data.atomic import atomic_file
from flashi2v_data.console import configure_logging, one_line, told_as
from flashi2v_data.errors import InputError
from flashi2v_infer.commands.batch import read_one
from flashi2v_infer.commands.run import sample_jobs
from flashi2v_infer.execution import Execution, Settled
from flashi2v_infer.load import ModelDirectory, rescheduled
from flashi2v_infer.pipeline import FlashI2VPipeline
from flashi2v_infer.processes import Processes, join_processes
from flashi2v_infer.web.jobs import Job, Jobs
from flashi2v_infer.web.schema import Served, request_of
from flashi2v_model.adapter_choice import AdapterChoice
from flashi2v_model.config import SchedulerName
from flashi2v_model.weights.libraries import quieten
from flashi2v_npu_ops.faults import device_faults_told

logger = logging.getLogger(__name__)
T = TypeVar("T")

READY = b"ready"
_CHECK_SECONDS = 0.2  # between two looks at whether a job was cancelled, within a step
_WRITE_SECONDS = 0.1  # between two notes of progress
_PREVIEW_SHARE = 0.02  # of the time goes into previews, at most
_PREVIEW_FRAMES, _PREVIEW_QUALITY = 8, 70


@dataclass(frozen=True)
class Setup:
    """What all workers of a server are told.

    Attributes:
        data: the directory of the queue, absolute.
        served: the model, and its adapters.
        execution: how to compute.
        scheduler: the sampler; None is the model's own.
    """

    data: Path
    served: Served
    execution: Execution
    scheduler: SchedulerName | None = None

    def model(self, lora: tuple[AdapterChoice, ...] = ()) -> ModelDirectory:
        """Return the model with some adapters; nothing is read yet."""
        return ModelDirectory(self.served.source, self.execution, self.scheduler, lora)


def work(setup: Setup, name: str, connection: Connection, environment: dict[str, str]) -> None:
    """Be one process of a worker, until the server ends.

    Args:
        setup: of the server.
        name: of the worker.
        connection: to the server, which sends something whenever there is news; `READY` goes back once.
        environment: what torchrun would set.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server ends its workers
    os.environ.update(environment)
    os.chdir(setup.data)  # records name images relative to it
    gc.freeze()  # nothing that is imported is garbage: nobody looks for it after each job
    news = threading.Event()
    threading.Thread(target=_listen, args=(connection, news), daemon=True).start()
    is_first = environment.get("RANK", "0") == "0"
    configure_logging(logging.INFO if is_first else logging.ERROR)
    quieten()
    tqdm.set_lock(threading.RLock())  # its own is shared with other processes, and outlives this one
    try:
        model = setup.model()
        with join_processes(model.device_name, setup.execution) as processes:
            settled = model.settle(processes.device)
            worker = _Worker(setup, settled, processes)
            connection.send_bytes(READY)
            jobs = Jobs(Path())
            while True:
                job = worker.shared(_patiently(lambda: jobs.claim(name)) if is_first else None)
                if job is None:
                    if is_first:
                        news.wait(1)  # the others wait for the first
                        news.clear()
                else:
                    worker.sample(jobs, job)
    except Exception as error:
        told = told_as(error)
        if told is None:
            raise
        logger.error("worker %s: %s", name, one_line(told[1]))
        os._exit(told[0])


def _listen(connection: Connection, news: threading.Event) -> None:
    """End this process at once, whatever it does, when the server has gone or asks for it by closing the connection."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            connection.recv_bytes()
            news.set()
    os._exit(0)


class Cancelled(Exception):
    """The job is to stop."""


class _Worker:
    def __init__(self, setup: Setup, settled: Settled, processes: Processes) -> None:
        self._setup, self._settled, self._processes = setup, settled, processes
        self.is_first = processes.is_first
        # What the processes tell each other of jobs goes between CPUs, where waiting takes no power.
        several = processes.per_video > 1
        self._group = dist.new_group(backend="gloo", timeout=timedelta(days=7)) if several else None
        self._check: Callable[[], None] = lambda: None
        self._pipeline: FlashI2VPipeline | None = None
        self._load(())

    def _load(self, lora: tuple[AdapterChoice, ...]) -> None:
        self._pipeline = None  # there may be no room for two
        gc.collect()
        self._model, self._lora = self._setup.model(lora), lora
        self._pipeline = self._model.load(self._settled, self._processes)
        self._scheduler = self._pipeline.scheduler
        if self._group is None:  # within the VAE others would wait for this process's tiles
            for module in self._pipeline.vae.modules():
                module.register_forward_pre_hook(lambda module, inputs: self._check())

    def shared(self, value: T) -> T:
        """Return what the first process has."""
        if self._group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self._group, group_src=0)
        return box[0]

    def sample(self, jobs: Jobs, job: Job) -> None:
        """Sample a job, and say how it ended.

        Raises:
            Exception: a bug; what it leaves on the device is unknown, so the process should end.
        """
        watcher = _Watcher(self, jobs, job)
        try:
            with _noting(job.notes), device_faults_told("fewer frames or a smaller size"):
                lora = self._setup.served.choices(job.request["lora"])
                if self._pipeline is None or lora != self._lora:
                    self._load(lora)
                assert self._pipeline is not None
                self._pipeline.scheduler = rescheduled(self._scheduler, None, job.request["flow_shift"])
                video = jobs.video(job)
                batch = read_one(request_of(job), str(video), video.with_suffix(".png"))
                self._check = watcher.check
                sample_jobs(self._pipeline, self._model, batch.jobs, self._processes, watcher, is_one=True)
        except Cancelled:
            ending: dict[str, Any] = {"state": "cancelled"}
        except Exception as error:
            told = told_as(error)
            code = {1: "failed", 2: "invalid_request"}[told[0]] if told else "internal_error"
            words = one_line(told[1]) if told else f"a bug, {type(error).__name__}: the server's log says more"
            ending = {"state": "failed", "code": code, "error": words}
            if told is None:
                if self.is_first:
                    _patiently(lambda: jobs.end(job, **ending))
                raise
            logger.error("%s: %s", job.id, words)
        else:
            ending = {"state": "done"}
        finally:
            self._check = lambda: None
        if self.is_first:
            jobs.preview(job).unlink(missing_ok=True)
            _patiently(lambda: jobs.end(job, **ending))


@contextlib.contextmanager
def _noting(notes: list[str]) -> Iterator[None]:
    """Collect what the library warns of."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.name.startswith("flashi2v") and len(notes) < 20:
                notes.append(one_line(record.getMessage()))

    handler = Handler(logging.WARNING)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


def _patiently(write: Callable[[], T]) -> T:
    """Write into the queue, as soon as the disk has room for it."""
    told = False
    while True:
        try:
            return write()
        except sqlite3.OperationalError as error:
            if not told:
                logger.error("cannot write the queue (%s): trying again each second", error)
            told = True
            time.sleep(1)


class _Watcher(PipelineCallback):
    """Watches a job: its progress, previews, and whether it is to stop, which the first process tells the others."""

    tensor_inputs = ["denoised"]  # noqa: RUF012 (diffusers declares it so)

    def __init__(self, worker: _Worker, jobs: Jobs, job: Job) -> None:
        super().__init__()
        self._worker, self._jobs, self._job = worker, jobs, job
        self._began = self._checked = self._noted = 0.0
        self._next_preview = 0.0

    def callback_fn(
        self, pipeline: FlashI2VPipeline, step: int, timestep: Any, tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Look at a step that was done."""
        now, num_steps = time.monotonic(), pipeline.num_timesteps
        if self._worker.shared(self._worker.is_first and self._jobs.is_cancelled(self._job)):
            raise Cancelled
        if not self._worker.is_first:
            return {}
        if not step:
            self._began = now
        if now - self._noted >= _WRITE_SECONDS or step + 1 == num_steps:
            self._noted = now
            per_step = (now - self._began) / step if step else 0.0
            with contextlib.suppress(sqlite3.OperationalError):  # a full disk: this is not worth a job
                self._jobs.progress(self._job, step + 1, num_steps, per_step * (num_steps - step - 1))
        if now >= self._next_preview and step + 1 < num_steps:
            before = time.thread_time()
            self._preview(pipeline, tensors["denoised"])
            self._next_preview = max(self._next_preview, now + (time.thread_time() - before) / _PREVIEW_SHARE)
        return {}

    def check(self) -> None:
        """Stop within the VAE."""
        now = time.monotonic()
        if self._worker.is_first and now - self._checked >= _CHECK_SECONDS:
            self._checked = now
            if self._jobs.is_cancelled(self._job):
                raise Cancelled

    def _preview(self, pipeline: FlashI2VPipeline, latents: Tensor) -> None:
        try:
            stride = math.ceil(latents.shape[2] / _PREVIEW_FRAMES)
            first, *others = pipeline.preview(latents[:, :, ::stride])[0]
            with atomic_file(self._jobs.preview(self._job)) as file:
                # Each latent frame but the first stands for four of the video.
                duration = round(4000 * stride / self._job.request["fps"])
                options = {"duration": duration, "loop": 0, "method": 0, "quality": _PREVIEW_QUALITY}
                first.save(file, save_all=True, append_images=others, **options)
        except InputError as error:  # of a VAE that nothing is known of
            self._next_preview = float("inf")
            logger.warning("%s", error)
        except OSError:  # a full disk
            pass
