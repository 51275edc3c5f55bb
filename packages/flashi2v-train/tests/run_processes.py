"""Real processes for test_launcher.py and test_watchdog.py: run_processes.py WORK DIRECTORY, with WORK one of below."""

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from flashi2v_data.console import configure_logging
from flashi2v_data.errors import InputError, StorageError
from flashi2v_train.options import LaunchOptions
from flashi2v_train.parallel_dims import ParallelDims
from flashi2v_train.processes import StopSignal, adopt_slurm, start


def steps_until_stopped(directory: Path) -> None:
    """Steps of 0.1 s; a stop is agreed on, saved slowly, and the process ends as after its last step."""
    dist.init_process_group("gloo", timeout=timedelta(minutes=20))
    with StopSignal() as stop:
        (directory / f"running_{dist.get_rank()}").touch()
        while True:
            time.sleep(0.1)
            stops = torch.tensor(float(stop.received))
            dist.all_reduce(stops)
            if stops:
                break
        time.sleep(1)
        (directory / f"saved_{dist.get_rank()}").touch()
    dist.destroy_process_group()


def fails_in_the_second(directory: Path, error: Exception) -> None:
    dist.init_process_group("gloo", timeout=timedelta(minutes=20))
    if dist.get_rank() == 1:
        raise error
    dist.barrier()


def is_killed(directory: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(minutes=20))
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def fails_once(directory: Path) -> None:
    done = directory / f"attempt_{os.environ['TORCHELASTIC_RESTART_COUNT']}_rank_{os.environ['RANK']}"
    done.touch()
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
        raise RuntimeError("once")


def hangs(directory: Path, how: str) -> None:
    from flashi2v_train.watchdog import Watchdog
    from flashi2v_train.world import join_world  # imports the model, which takes seconds

    configure_logging()
    (directory / f"pid_{os.environ['RANK']}").write_text(str(os.getpid()))
    size = int(os.environ["WORLD_SIZE"])
    layout = ParallelDims(tensor=1, context=1, pipeline=1, data=size, replicas=1, layers=(1,))
    with join_world("cpu", layout) as world:
        watchdog = Watchdog(world.rank, world.size, world.control, timeout_seconds=3)
        with watchdog:
            pass  # as where a run is resumed
        with watchdog:
            for step in range(1, 4):
                # As in a pipeline: only some read, and the others are ahead at once.
                watchdog.beat(step, "reading and encoding" if world.rank == 2 else "forward and backward")
                time.sleep(0.4)  # so that it is published
                if how == "sleeps" and world.rank == 2 and step == 2:
                    time.sleep(60)
                if (how, world.rank, step) in (("second stops", 1, 3), ("first stops", 0, 3)):
                    os.kill(os.getpid(), signal.SIGSTOP)
                world.barrier()
            for step in range(4, 8 if how == "is slow" else 4):  # together longer than the limit
                watchdog.beat(step, "saving")
                time.sleep(1.5)
        world.barrier()


WORK = {
    "stop": (steps_until_stopped, (), {}),
    "input error": (fails_in_the_second, (InputError("the data is wrong"),), {}),
    "storage error": (fails_in_the_second, (StorageError("the disk is full"),), {}),
    "other error": (fails_in_the_second, (KeyError("what"),), {}),
    "killed": (is_killed, (), {}),
    "restart": (fails_once, (), {"max_restarts": 1}),
    # These import the model, which takes seconds.
    **{
        how: (hangs, (how,), {"nproc_per_node": 3, "preload": "flashi2v_train.trainer"})
        for how in ("sleeps", "second stops", "first stops", "is slow")
    },
}


def main() -> None:
    configure_logging()
    name, directory, *options = sys.argv[1:]  # options as nnodes=2
    if name == "slurm":
        print(adopt_slurm(LaunchOptions()))
        steps_until_stopped(Path(directory))
        return
    function, arguments, given = WORK[name]
    given = {"nproc_per_node": 2, **given, **dict(option.split("=") for option in options)}
    preload = given.pop("preload", None)
    try:
        start(function, (Path(directory), *arguments), LaunchOptions(**given), preload)
    except (InputError, StorageError, RuntimeError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
