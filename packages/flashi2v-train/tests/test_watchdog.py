"""Real processes that hang: the run ends, and its last words name the one at fault."""

import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flashi2v_train.parallel_dims import ParallelDims
from flashi2v_train.watchdog import Watchdog
from flashi2v_train.world import join_world

SCRIPT = Path(__file__).parent / "run_processes.py"


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def run(directory: Path, how: str, code: int) -> str:
    done = subprocess.run([sys.executable, SCRIPT, how, directory], capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stderr
    deadline = time.monotonic() + 60
    for path in directory.glob("pid_*"):
        while is_alive(int(path.read_text())):
            assert time.monotonic() < deadline, f"{path.name} is left behind"
            time.sleep(0.1)
    return done.stderr


FAULTS = {
    "sleeps": r"process 2 \(host \S+\) has been in 'reading and encoding' of step 2 for [3-9] s while all others wait",
    "second stops": r"process 1 \(host \S+\) has stopped: last seen [3-9] s ago in 'forward and backward' of step 3",
    "first stops": r"process 0 \(host \S+\) has not answered for \d s",
}


def assert_named(how: str, stderr: str) -> None:
    spoken = [line for line in stderr.splitlines() if line.startswith("ERROR process")]
    assert len(spoken) == 1, stderr
    assert re.search(FAULTS[how], spoken[0]), spoken
    assert "--distributed-timeout-minutes" in spoken[0]


def test_the_process_that_all_wait_for_is_named_once_and_all_end(tmp_path):
    stderr = run(tmp_path, "sleeps", code=1)
    assert_named("sleeps", stderr)
    assert "in hangs" in stderr  # where it sleeps


@pytest.mark.slow
def test_a_process_that_is_stopped_is_named_once_and_all_end(tmp_path):
    """Two runs at a time, as torch's launcher gives a stopped process half a minute before it kills it."""

    def stop(how: str) -> str:
        (tmp_path / how).mkdir()
        return run(tmp_path / how, how, code=1)

    with ThreadPoolExecutor() as pool:
        for how, stderr in zip(("second stops", "first stops"), pool.map(stop, ("second stops", "first stops"))):
            assert_named(how, stderr)


def test_a_slow_run_whose_phases_follow_each_other_is_left_alone(tmp_path):
    assert "ERROR" not in run(tmp_path, "is slow", code=0)


def test_nothing_is_watched_before_and_after_its_with():
    """So a trainer that was built and is not run, in a notebook say, ends nobody."""
    with join_world("cpu", ParallelDims(tensor=1, context=1, pipeline=1, data=1, replicas=1, layers=(1,))) as world:
        before = set(threading.enumerate())
        watchdog = Watchdog(world.rank, world.size, world.control, timeout_seconds=60)
        for _ in range(2):
            assert not set(threading.enumerate()) - before
            with watchdog:
                threads = set(threading.enumerate()) - before
                assert sorted(thread.name for thread in threads) == ["watchdog_exchange", "watchdog_watch"]
            for thread in threads:
                thread.join(timeout=60)
        assert not set(threading.enumerate()) - before
