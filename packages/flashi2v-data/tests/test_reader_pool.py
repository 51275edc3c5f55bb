import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from flashi2v_data.reader_pool import Lost, ReaderPool, WorkerError
from flashi2v_data.reader_process import Limits

GENEROUS = Limits(timeout_seconds=60, memory_bytes=8 << 30)
HELD = []  # memory that a worker does not let go


def work(task, memory):
    """Do what a task says, in a worker."""
    name, argument = task
    if name == "square":
        memory[:] = argument
        return argument**2
    if name == "late":
        time.sleep(0.4)
    elif name == "hang":
        time.sleep(1000)
    elif name == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif name == "die once":
        with contextlib.suppress(FileExistsError):
            Path(argument).touch(exist_ok=False)
            os.kill(os.getpid(), signal.SIGKILL)
    elif name == "raise":
        raise ValueError(argument)
    elif name == "raise strangely":
        raise OnlyHere(lambda: None)
    elif name == "hold":
        HELD.append(np.ones(argument, np.uint8))
    return os.getpid()


class OnlyHere(Exception):
    """An error that cannot be pickled, for what it holds."""


class Unloadable:
    """Work that ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (3,)


@pytest.fixture
def pool():
    """ReaderPool(...) that is closed in the end."""
    pools = []

    def make(num_workers=1, limits=GENEROUS, memory_bytes=4, work=work):
        pools.append(ReaderPool(work, num_workers, memory_bytes, limits))
        return pools[-1]

    yield make
    for made in pools:
        made.close()


def _outcomes(pool, tasks):
    """Results in order, with as many tasks ahead as there is room for."""
    tasks = iter(tasks)
    pending, found = 0, []
    while True:
        while pool.has_room and (task := next(tasks, None)) is not None:
            pool.submit(task)
            pending += 1
        if not pending:
            return found
        value, memory = pool.result()
        pending -= 1
        found.append((value, memory.tolist()))


def test_results_come_in_order_however_long_tasks_take(pool):
    tasks = [("late", 0) if number % 3 == 0 else ("square", number) for number in range(9)]
    found = _outcomes(pool(2), tasks)
    assert [found[n][0] for n in range(9) if n % 3] == [n**2 for n in range(9) if n % 3]
    assert [found[n][1] for n in range(9) if n % 3] == [[n] * 4 for n in range(9) if n % 3]


def test_a_worker_that_is_killed_loses_nothing(pool, tmp_path, caplog):
    marker = tmp_path / "died"
    tasks = [("square", 1), ("die once", marker), ("square", 2), ("square", 3)]
    found = [value for value, _ in _outcomes(pool(), tasks)]
    assert marker.exists()
    assert (found[0], found[2], found[3]) == (1, 4, 9)
    assert isinstance(found[1], int)
    assert caplog.messages == ["a loader worker has ended (SIGKILL) and is replaced"]


def test_a_task_that_kills_every_worker_is_lost_alone(pool):
    found = _outcomes(pool(2), [("square", 5), ("die", 0), ("square", 6), ("square", 7)])
    assert [value for value, _ in found] == [25, Lost("ended its reader 2 times (SIGKILL)"), 36, 49]


def test_a_task_that_hangs_is_lost_alone_after_its_time(pool):
    limits = GENEROUS._replace(timeout_seconds=0.7)
    found = _outcomes(pool(limits=limits), [("square", 5), ("hang", 0), ("square", 6), ("hang", 0), ("square", 7)])
    lost = Lost("no answer within 0.7 seconds")
    assert [value for value, _ in found] == [25, lost, 36, lost, 49]


def test_a_parent_that_was_away_does_not_count_as_a_hanging_worker(pool):
    made = pool(limits=GENEROUS._replace(timeout_seconds=1.0))
    made.submit(("square", 1))
    assert made.result()[0] == 1
    made.submit(("late", 0))
    made.submit(("square", 3))
    time.sleep(1.6)
    assert isinstance(made.result()[0], int)
    assert made.result()[0] == 9


@pytest.mark.parametrize(
    ("limits", "task"),
    [(GENEROUS._replace(max_tasks=2), ("pid", 0)), (GENEROUS._replace(memory_bytes=300 << 20), ("hold", 200 << 20))],
    ids=["tasks", "memory"],
)
def test_workers_retire_without_losing_a_task(pool, limits, task):
    pids = [value for value, _ in _outcomes(pool(limits=limits), [task] * 6)]
    assert len(pids) == 6
    assert len(set(pids)) >= 3


def test_a_worker_within_its_limits_stays(pool):
    pids = [value for value, _ in _outcomes(pool(limits=GENEROUS._replace(max_tasks=6)), [("pid", 0)] * 6)]
    assert len(set(pids)) == 1


def test_an_error_is_raised_in_its_place_with_the_workers_traceback(pool):
    made = pool()
    for task in (("square", 2), ("raise", "seven")):
        made.submit(task)
    assert made.result()[0] == 4
    with pytest.raises(ValueError, match=r"^seven$") as caught:
        made.result()
    assert isinstance(caught.value.__cause__, WorkerError)
    assert "raise ValueError(argument)" in str(caught.value.__cause__)
    for task in (("raise strangely", 0), ("square", 3)):
        made.submit(task)
    with pytest.raises(RuntimeError, match="OnlyHere"):
        made.result()
    assert made.result()[0] == 9


def test_results_that_nobody_wants_any_more_are_dropped(pool):
    made = pool(2)
    for task in (("late", 0), ("square", 5), ("late", 0)):
        made.submit(task)
    made.forget()
    assert [value for value, _ in _outcomes(made, [("square", 6), ("square", 7), ("square", 8)])] == [36, 49, 64]
    while sum(len(seat.free) for seat in made._seats) < 4:  # also those of tasks that were running
        assert [value for value, _ in _outcomes(made, [("square", 9)])] == [81]


def test_a_task_may_go_first(pool):
    made = pool(2)
    for number in (1, 2, 3):
        made.submit(("square", number))
    assert made.result()[0] == 1
    made.submit(("square", 9), first=True)
    assert [made.result()[0] for _ in range(3)] == [81, 4, 9]


def test_an_interrupt_does_not_reach_workers(pool):
    made = pool()
    made.submit(("pid", 0))
    pid, _ = made.result()
    os.kill(pid, signal.SIGINT)
    made.submit(("pid", 0))
    assert made.result()[0] == pid


def test_workers_that_cannot_start_are_an_error(pool):
    made = pool(work=Unloadable())
    made.submit(("square", 1))
    with pytest.raises(RuntimeError, match="3 loader workers in a row ended while starting: exit code 3"):
        made.result()


def _is_running(pid: int) -> bool:
    """Not counting a process that has ended and that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


PARENT = """
import sys, time
from flashi2v_data.reader_pool import ReaderPool
from flashi2v_data.reader_process import Limits
from test_reader_pool import work
if __name__ == "__main__":
    pool = ReaderPool(work, 2, 4, Limits(60, 8 << 30))
    for _ in range(2):
        pool.submit(("pid", 0))
    print(pool.result()[0], pool.result()[0], flush=True)
    if sys.argv[1] == "hang":
        for _ in range(2):
            pool.submit(("hang", 0))
        time.sleep(1000)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("end", ["hang", "exit"])
def test_workers_end_with_their_parent(tmp_path, end):
    (tmp_path / "parent.py").write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "parent.py", end], stdout=subprocess.PIPE, text=True, env=environment
    )
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    if end == "hang":
        assert all(map(_is_running, pids))
        parent.kill()
    assert parent.wait() == (-signal.SIGKILL if end == "hang" else 0)
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while any(map(_is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_is_running, pids))
