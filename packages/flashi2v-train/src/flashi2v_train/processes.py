"""Processes of a run: how many there are, who starts them, what they inherit, how they are stopped.

Three may have started this process: torchrun (RANK is set), Slurm's srun, or the user; then `start` makes the others.
torch is imported only to start them, so that a wrong option is reported at once.
"""

import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from flashi2v_data.console import machine_fault, told_as
from flashi2v_data.errors import InputError, StorageError
from flashi2v_data.locking import hold
from flashi2v_data.start_methods import clean_start
from flashi2v_train.options import LaunchOptions, flag

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig

logger = logging.getLogger(__name__)

# Slurm sends SIGUSR1 (`--signal=USR1@600`) before time is up, and SIGTERM with every end.
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))

# Ascend's documentation; the launcher of Megatron also sets CUDA_DEVICE_MAX_CONNECTIONS, which only Megatron reads.
ASCEND_ENVIRONMENT = {
    "ASCEND_SLOG_PRINT_TO_STDOUT": "0",
    "ASCEND_GLOBAL_LOG_LEVEL": "3",  # errors
    "TASK_QUEUE_ENABLE": "2",  # asynchronous dispatch, of work in workspaces too
    "COMBINED_ENABLE": "1",  # pairs of operators on non-contiguous tensors
    "CPU_AFFINITY_CONF": "1",  # processes are bound to cores
    "HCCL_CONNECT_TIMEOUT": "1200",  # seconds; the default of 120 is short for many machines
    "HCCL_OP_EXPANSION_MODE": "AIV",  # collectives are laid out by vector cores, not by the host
    "MULTI_STREAM_MEMORY_REUSE": "2",  # what FSDP2 gathers on one stream is free again as events tell
    "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",
}


class RunError(RuntimeError):
    """The run cannot continue; the message is one line that says why, and names the process if it is that of one."""

    exit_code = 1


class ReportedError(RuntimeError):
    """What a process ends with that is no bug, on its way to the launcher: its exit code and its line, as JSON."""


class StopSignal:
    """Notes a request to stop, so that the step can end and be saved; before and after, such a signal ends the process.

    Use it as a context, in the main thread.

    Attributes:
        received: whether there was one.
    """

    def __init__(self) -> None:
        self.received = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignal":
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True


def is_started() -> bool:
    """Whether torchrun, or `adopt_slurm`, has made this process one of several."""
    return "RANK" in os.environ


def is_first() -> bool:
    """Whether this process says what all would say alike."""
    return os.environ.get("RANK", "0") == "0"


def is_restarted() -> bool:
    """Whether the run failed before, and was started again by --max-restarts."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


@contextmanager
def hold_directory(directory: Path, option: str, group: "dist.ProcessGroup | None" = None) -> Iterator[None]:
    """Let no other run write to a directory while the block runs; called by all processes of a run.

    The first process makes the directory and holds its lock for all; one that is empty at the end goes again.

    Args:
        directory: the same on all processes.
        option: that names it.
        group: of all processes, on CPUs; None where there is one process.

    Raises:
        InputError: another run holds it; all processes come to know.
        StorageError: it cannot be made or written.
    """
    with ExitStack() as stack:
        failure: list[Exception | None] = [None]
        if is_first():
            try:
                if not directory.exists():
                    directory.mkdir(parents=True)
                    stack.callback(_remove_if_empty, directory)
                stack.enter_context(hold(directory / ".lock", f"{option} {directory}"))
            except InputError as error:
                failure = [error]
            except OSError as error:
                failure = [StorageError(f"{option}: {machine_fault(error)}")]
        if group is not None:
            import torch.distributed as dist

            dist.broadcast_object_list(failure, 0, group)
        if failure[0] is not None:
            raise failure[0]
        yield


def _remove_if_empty(directory: Path) -> None:
    with suppress(OSError):
        directory.rmdir()


def world_sizes(options: LaunchOptions) -> list[int]:
    """Return the numbers of processes that the run may have: one, except with `--nnodes MIN:MAX`.

    Raises:
        InputError: --nnodes is not a number of machines.
    """
    if is_started():
        return [int(os.environ["WORLD_SIZE"])]
    least, most = _machines(options)
    return [machines * options.nproc_per_node for machines in range(least, most + 1)]


def _machines(options: LaunchOptions) -> tuple[int, int]:
    words = options.nnodes.split(":")
    least, most = int(words[0]), int(words[-1])
    if not 1 <= least <= most:
        raise InputError(f"--nnodes {options.nnodes}: machines are counted from 1, and MIN must not exceed MAX")
    return least, most


def check_started(options: LaunchOptions) -> None:
    """Refuse options that contradict those who started this process.

    Raises:
        InputError: the message names the option.
    """
    given, environment = options.model_fields_set, os.environ
    for name in ("max_restarts", "rdzv_backend", "rdzv_endpoint", "rdzv_id"):
        if name in given and getattr(options, name):
            raise InputError(f"{flag(name)} belongs to torchrun, which has started this process: leave it out here")
    size, local_size = int(environment["WORLD_SIZE"]), int(environment.get("LOCAL_WORLD_SIZE", 1))
    facts = {
        "nproc_per_node": str(local_size),
        "nnodes": str(size // local_size),
        "node_rank": environment.get("GROUP_RANK"),
        "master_addr": environment.get("MASTER_ADDR"),
        "master_port": environment.get("MASTER_PORT"),
    }
    for name, fact in facts.items():
        if name in given and fact is not None and str(getattr(options, name)) != fact:
            raise InputError(
                f"{flag(name)} {getattr(options, name)} contradicts torchrun or srun, which has started this process "
                f"with {fact}: leave the option out"
            )


# Slurm


def adopt_slurm(options: LaunchOptions) -> str | None:
    """Tell this process, one of several tasks of srun, what torchrun would have told it.

    With `--nnodes`, a task is not a process of the run but a launcher of some, and nothing happens.

    Returns:
        what was found, in one line, or None.

    Raises:
        InputError: Slurm does not say where the first process is.
    """
    environment = os.environ
    # A batch script has SLURM_NTASKS, too; the number of a step's tasks only srun sets.
    tasks = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS", "1")
    if is_started() or "SLURM_PROCID" not in environment or int(tasks) == 1 or options.nnodes != "1":
        return None
    node = int(environment.get("SLURM_NODEID", 0))
    spread = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE") or tasks
    port = options.master_port or 20000 + int(environment.get("SLURM_JOB_ID", 0)) % 10000
    found = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": str(tasks_per_node(spread)[node]),
        "GROUP_RANK": str(node),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or _slurm_master(options),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(port),
    }
    environment.update(found)
    return "started by Slurm: " + " ".join(f"{name}={value}" for name, value in found.items())


def _slurm_master(options: LaunchOptions) -> str:
    if "master_addr" in options.model_fields_set:
        return options.master_addr
    # Not SLURM_LAUNCH_NODE_IPADDR first: srun may run on a machine that has no task.
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"):
        if name in os.environ:
            return first_host(os.environ[name])
    if "SLURM_LAUNCH_NODE_IPADDR" in os.environ:
        return os.environ["SLURM_LAUNCH_NODE_IPADDR"]
    raise InputError("Slurm set no SLURM_JOB_NODELIST: name the machine of the first process with --master-addr")


def first_host(node_list: str) -> str:
    """Return the first machine of a list such as `node[03-05,9],gpu1`.

    Raises:
        InputError: it is written in another way, and Slurm's own `scontrol` is not there to read it.
    """
    if shutil.which("scontrol"):
        command = ["scontrol", "show", "hostnames", node_list]
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        return names[0]
    match = re.match(r"([^\[\],]+)(?:\[(\d+)[^\]]*\])?(?:,|$)", node_list)
    if match is None:
        raise InputError(f"node list {node_list!r} is not understood: name the first machine with --master-addr")
    return match[1] + (match[2] or "")


def tasks_per_node(text: str) -> list[int]:
    """Read Slurm's `2(x3),1`: [2, 2, 2, 1]."""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(number) for number, times in parts for _ in range(int(times or 1))]


# Ascend


def set_ascend_environment(device: str) -> str | None:
    """Set what Ascend's training scripts set, where the device is an NPU; what the user exported stays.

    Args:
        device: as of `flashi2v_npu_ops.device.resolve_device`; no device is touched.

    Returns:
        the variables in one line, or None on other devices.
    """
    if not (device.startswith("npu") or (device == "auto" and any(Path("/dev").glob("davinci[0-9]*")))):
        return None
    words = []
    for name, value in ASCEND_ENVIRONMENT.items():
        yours = name in os.environ
        os.environ.setdefault(name, value)
        words.append(f"{name}={os.environ[name]}" + (" (yours)" if yours else ""))
    return "Ascend environment: " + " ".join(words)


# Starting


def needs_launch(options: LaunchOptions) -> bool:
    """Whether this process has to start those of the run, be it one that is to be restarted."""
    several = options.nproc_per_node > 1 or options.nnodes != "1"
    return not is_started() and (several or options.max_restarts > 0 or options.rdzv_endpoint != "")


def launch_config(options: LaunchOptions, log_dir: Path) -> "LaunchConfig":
    """Return what torch's elastic launch is to do.

    Args:
        options: of the command line.
        log_dir: where processes leave the errors that end them.

    Raises:
        InputError: options that do not go together.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    least, most = _machines(options)
    backend = options.rdzv_backend or ("c10d" if options.rdzv_endpoint else "static")
    endpoint, rdzv_configs, run_id = options.rdzv_endpoint, {}, options.rdzv_id or uuid.uuid4().hex
    if backend == "static":
        if options.rdzv_endpoint:
            raise InputError("--rdzv-backend static reads --master-addr and --master-port: leave --rdzv-endpoint out")
        if least != most:
            raise InputError(f"--nnodes {options.nnodes} needs --rdzv-backend c10d and --rdzv-endpoint HOST:PORT")
        if options.node_rank >= most:
            raise InputError(f"--node-rank {options.node_rank} must be less than --nnodes {options.nnodes}")
        if most == 1 and not options.master_port:
            backend, endpoint = "c10d", "localhost:0"  # finds a free port by itself
        elif not options.master_port:
            raise InputError("--nnodes above 1 needs --master-port: a free port on the machine of --master-addr")
        else:
            endpoint, rdzv_configs = f"{options.master_addr}:{options.master_port}", {"rank": options.node_rank}
            run_id = options.rdzv_id or "flashi2v-train"  # the same on all machines
    elif not options.rdzv_endpoint:
        raise InputError(f"--rdzv-backend {backend} needs --rdzv-endpoint HOST:PORT")
    elif most > 1 and not options.rdzv_id:
        raise InputError("--rdzv-endpoint with several machines needs --rdzv-id: any name, the same on all of them")
    config = LaunchConfig(
        min_nodes=least,
        max_nodes=most,
        nproc_per_node=options.nproc_per_node,
        run_id=run_id,
        rdzv_backend=backend,
        rdzv_endpoint=endpoint,
        rdzv_configs=rdzv_configs,
        max_restarts=options.max_restarts,
        start_method="spawn",
        logs_specs=DefaultLogsSpecs(log_dir=str(log_dir)),
    )
    if "signals_to_handle" in {field.name for field in fields(LaunchConfig)}:
        # Those of a stop are ours (below): torch would end the processes, however far the saving is.
        config.signals_to_handle = "SIGINT,SIGHUP,SIGQUIT"
    else:
        logger.warning("this PyTorch is too old for a SIGTERM that saves: upgrade it, or stop only after a save")
    return config


def start(
    function: Callable[..., Any], arguments: tuple[Any, ...], options: LaunchOptions, preload: str | None = None
) -> None:
    """Run a function in all processes of this machine, and hand on to them what asks to stop.

    Args:
        function: of a module, so that new processes find it.
        arguments: of the function; they travel pickled.
        options: of the command line.
        preload: a module that is imported once for all processes, where that is safe.

    Raises:
        InputError: options that do not go together, or what is the user's to put right in a process.
        RunError: a process failed; if by a bug, its traceback has been logged.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    if not options.max_restarts:  # else the only account of what was restarted
        logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
        logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="flashi2v-train-") as directory:
        config = launch_config(options, Path(directory))
        if preload is not None:
            config.start_method = _prepare_start(preload)
        before = {number: signal.signal(number, _hand_on) for number in STOP_SIGNALS}
        try:
            elastic_launch(config, _run)(function, *arguments)
        except ChildFailedError as error:
            _raise_failure(error, Path(directory))
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _prepare_start(preload: str) -> str:
    """Return how processes start: forked from one that has imported a module, or afresh.

    Afresh where there is torch_npu: CANN may start threads when it is loaded, and a fork has none of them.
    """
    method = "spawn" if find_spec("torch_npu") else clean_start(preload)
    if method == "forkserver":
        from multiprocessing import forkserver  # Windows has none

        # What asks all processes of a job to stop must not end this one, behind which the others would be killed.
        before = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
        forkserver.ensure_running()
        for number, handler in before.items():
            signal.signal(number, handler)
    return method


def _run(function: Callable[..., Any], *arguments: Any) -> None:
    """Run a function in a process of the run; what it raises that is no bug travels with its exit code."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)  # which it was forked ignoring
    try:
        function(*arguments)
    except Exception as error:
        told = told_as(error)
        if told is None:
            raise
        raise ReportedError(json.dumps(told)) from error


def _hand_on(number: int, frame: FrameType | None) -> None:
    """Let the processes of this one end by themselves; then torch's launcher returns as after any other end."""
    processes = multiprocessing.active_children()
    if not processes:
        raise KeyboardInterrupt(f"{signal.Signals(number).name} came before the processes were started")
    for process in processes:
        assert process.pid is not None
        os.kill(process.pid, number)


def _raise_failure(error: "ChildFailedError", log_dir: Path) -> NoReturn:
    """Raise what ended the run: of all processes' last words those that explain the others'."""
    rank, failure = error.get_first_failure()
    if failure.exitcode < 0:  # killed; what the others say is of lost connections
        raise RunError(f"{_name(rank)} was ended by {failure.signal_name()}: out of memory, or by someone") from None
    # torch keeps one process's words; here are those of all: <run>/attempt_<number>/<local rank>/error.json
    reports = sorted(log_dir.glob("*/attempt_*/*/error.json"), key=lambda path: path.stat().st_mtime_ns)
    last_attempt = max((path.parent.parent for path in reports), key=_attempt, default=None)
    words = {
        rank - failure.local_rank + int(path.parent.name): json.loads(path.read_text())["message"]
        for path in reports
        if path.parent.parent == last_attempt
    }
    for speaker, word in words.items():
        kind, _, message = word["message"].partition(": ")
        if kind == ReportedError.__name__:
            code, line = json.loads(message)
            raise (InputError if code == InputError.exit_code else RunError)(f"{line} ({_name(speaker)})") from None
    if not words:  # os._exit
        raise RunError(f"{_name(rank)} ended with code {failure.exitcode}: the last lines above say why") from None
    speaker, word = next(iter(words.items()))
    logger.error("%s:\n%s", _name(speaker), word["extraInfo"]["py_callstack"])
    raise RunError(f"{_name(speaker)} failed before the others: {word['message']}") from None


def _attempt(directory: Path) -> int:
    return int(directory.name.removeprefix("attempt_"))


def _name(rank: int) -> str:
    return f"process {rank} on {socket.gethostname()}"
