import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from flashi2v_data.loading.shared_memory import SharedArray
from flashi2v_data.start_methods import quick_start
from flashi2v_data.workers import Limits, WorkerError, WorkerLost, WorkerPool

GENEROUS = Limits(timeout_seconds=1000, memory_bytes=8 << 30)
LARGE = bytes(5_000_000)  # more than any connection holds
HELD = []  # memory that a worker does not let go


def work(task):
    """Do what a task says, in a worker."""
    name, argument = task
    if name == "square":
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
    elif name == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif name == "stop while answering":
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGSTOP)).start()
        return LARGE
    elif name == "repeat":
        return argument
    elif name == "hold":
        HELD.append(np.ones(argument, np.uint8))
    return os.getpid()


class OnlyHere(Exception):
    """An error that cannot be pickled, for what it holds."""


class Unloadable:
    """Work that ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (3,)


class Mark:
    """Leaves numbers in shared memory."""

    def __init__(self, memory):
        self.memory = memory

    def __call__(self, number):
        self.memory.array[number % len(self.memory.array)] = number


@pytest.fixture(params=["fork", "spawn"])
def pool(request):
    """WorkerPool(...) that is closed in the end."""
    if request.param == "fork" and sys.platform != "linux":
        pytest.skip("processes are not forked here")
    pools = []

    def make(jobs=1, limits=GENEROUS, work=work, on_result=None):
        pools.append(WorkerPool(work, jobs, limits, start=request.param, depth=2, on_result=on_result))
        return pools[-1]

    yield make
    for made in pools:
        made.close()


def _outcomes(pool, tasks):
    """Results, or why there is none, in the order of the tasks."""
    found = []
    for task in [pool.submit(task) for task in tasks]:
        try:
            found.append(pool.result(task))
        except WorkerLost as error:
            found.append(str(error))
    return found


def test_results_come_in_order_however_long_tasks_take(pool):
    tasks = [("late", 0) if number % 3 == 0 else ("square", number) for number in range(9)]
    found = _outcomes(pool(2), tasks)
    assert [found[n] for n in range(9) if n % 3] == [n**2 for n in range(9) if n % 3]


def test_neither_side_waits_for_the_other_to_take_in_what_it_sends(pool):
    tasks = [("repeat", LARGE + bytes([number])) for number in range(6)]
    assert _outcomes(pool(2), tasks) == [argument for _, argument in tasks]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_process_that_stops_in_the_midst_of_an_answer_or_before_a_large_task_costs_one_task(pool):
    made = pool(limits=GENEROUS._replace(timeout_seconds=2))
    lost = "no answer within 2 seconds"
    assert _outcomes(made, [("stop", 0), ("repeat", LARGE)]) == [lost, LARGE]
    pid = made.result(made.submit(("pid", 0)))
    task = made.submit(("stop while answering", 0))
    while _state(pid) != "T":  # without a look at what has arrived
        time.sleep(0.05)
    with pytest.raises(WorkerLost, match=lost):
        made.result(task)
    assert made.result(made.submit(("square", 2))) == 4


def test_a_parent_that_was_away_while_a_large_task_was_on_its_way_loses_nothing(pool):
    made = pool(limits=GENEROUS._replace(timeout_seconds=0.5))
    assert made.result(made.submit(("square", 1))) == 1
    task = made.submit(("repeat", LARGE))
    time.sleep(0.8)
    assert made.result(task) == LARGE


def test_results_are_heard_of_before_they_are_asked_for(pool):
    heard = []
    made = pool(on_result=lambda task: heard.append((task.argument[0], task.result)))
    *_, last = [made.submit(task) for task in (("square", 2), ("raise", "no result"), ("square", 3))]
    made.result(last)
    assert heard == [("square", 4), ("square", 9)]


def test_what_workers_leave_in_shared_memory_is_seen(pool):
    memory = SharedArray((4, 3))
    made = pool(2, work=Mark(memory))
    for first in (0, 4):
        assert _outcomes(made, range(first, first + 4)) == [None] * 4
        assert memory.array.tolist() == [[number] * 3 for number in range(first, first + 4)]
    assert SharedArray((2, 0)).array.shape == (2, 0)


def test_a_worker_that_is_killed_loses_nothing(pool, tmp_path, caplog):
    marker = tmp_path / "died"
    tasks = [("square", 1), ("die once", marker), ("square", 2), ("square", 3)]
    found = _outcomes(pool(), tasks)
    assert marker.exists()
    assert (found[0], found[2], found[3]) == (1, 4, 9)
    assert isinstance(found[1], int)
    assert caplog.messages == ["a worker has ended (SIGKILL) and is replaced"]


def test_a_task_that_kills_every_worker_is_lost_alone(pool):
    found = _outcomes(pool(2), [("square", 5), ("die", 0), ("square", 6), ("square", 7)])
    assert found == [25, "ended the process that read it 2 times (SIGKILL)", 36, 49]


def test_a_task_that_hangs_is_lost_alone_after_its_time(pool):
    limits = GENEROUS._replace(timeout_seconds=3.0)
    found = _outcomes(pool(limits=limits), [("square", 5), ("hang", 0), ("square", 6), ("square", 7)])
    assert found == [25, "no answer within 3 seconds", 36, 49]


def test_a_parent_that_was_away_does_not_count_as_a_hanging_worker(pool):
    made = pool(limits=GENEROUS._replace(timeout_seconds=1.0))
    assert made.result(made.submit(("square", 1))) == 1
    late, quick = made.submit(("late", 0)), made.submit(("square", 3))
    time.sleep(1.6)
    assert isinstance(made.result(late), int)
    assert made.result(quick) == 9


@pytest.mark.parametrize(
    ("limits", "task"),
    [(GENEROUS._replace(max_tasks=2), ("pid", 0)), (GENEROUS._replace(memory_bytes=300 << 20), ("hold", 200 << 20))],
    ids=["tasks", "memory"],
)
def test_workers_retire_without_losing_a_task(pool, limits, task):
    pids = _outcomes(pool(limits=limits), [task] * 6)
    assert len(pids) == 6
    assert len(set(pids)) >= 3


def test_a_worker_within_its_limits_stays(pool):
    pids = _outcomes(pool(limits=GENEROUS._replace(max_tasks=6)), [("pid", 0)] * 6)
    assert len(set(pids)) == 1


def test_an_error_is_raised_in_its_place_with_the_workers_traceback(pool):
    made = pool()
    first, second = made.submit(("square", 2)), made.submit(("raise", "seven"))
    assert made.result(first) == 4
    with pytest.raises(ValueError, match=r"^seven$") as caught:
        made.result(second)
    assert isinstance(caught.value.__cause__, WorkerError)
    assert "raise ValueError(argument)" in str(caught.value.__cause__)
    third, fourth = made.submit(("raise strangely", 0)), made.submit(("square", 3))
    with pytest.raises(RuntimeError, match="OnlyHere"):
        made.result(third)
    assert made.result(fourth) == 9


def test_tasks_that_nobody_wants_any_more_are_dropped(pool):
    made = pool()
    assert made.result(made.submit(("square", 1))) == 1
    tasks = [made.submit(task) for task in (("late", 0), ("square", 5), ("hang", 0))]
    made.forget()
    assert [task.done for task in tasks] == [True, True, False]  # the last was with no worker yet
    assert _outcomes(made, [("square", 6), ("square", 7)]) == [36, 49]


def test_an_interrupt_does_not_reach_workers(pool):
    made = pool()
    pid = made.result(made.submit(("pid", 0)))
    os.kill(pid, signal.SIGINT)
    assert made.result(made.submit(("pid", 0))) == pid


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is forked")
@pytest.mark.parametrize(
    ("beside", "method"),
    [("", "fork"), ("import _thread; _thread.start_new_thread(lambda: sleep(60), ())", "forkserver")],
)
def test_a_process_is_forked_only_while_no_other_thread_could_hold_a_lock(beside, method):
    """Threads that `threading` knows nothing of count, too."""
    imports = "from time import sleep\nfrom flashi2v_data.start_methods import quick_start"
    code = f"{imports}\n{beside}\nsleep(0.2)\nprint(quick_start())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == method


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is forked")
def test_garbage_does_not_hang_the_choice_how_to_start():
    """Collected while threads are counted, a `threading.local` of a ring waited for a lock that the count held."""
    code = """
import gc, threading
from flashi2v_data.start_methods import quick_start

class Ring:
    def __init__(self):
        self.ring, self.local = self, threading.local()
        self.local.value = 1

gc.disable()
for _ in range(2000):
    Ring()
assert quick_start() == "fork" and not gc.isenabled()
[{} for _ in range(80)].clear()  # kept for the next dicts, so that the first to be made anew is a frame
gc.enable()
assert quick_start() == "fork" and gc.isenabled()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_a_pool_that_is_collected_ends_its_workers():
    made = WorkerPool(work, 1, start=quick_start())
    pid = made.result(made.submit(("pid", 0)))
    del made
    gc.collect()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_workers_that_cannot_start_are_an_error():
    made = WorkerPool(Unloadable(), 1)
    task = made.submit(("square", 1))
    with pytest.raises(RuntimeError, match=r"3 workers in a row ended while starting \(exit code 3\)"):
        made.result(task)


SCRIPT = """
from functools import partial
from flashi2v_data.start_methods import clean_start
from flashi2v_data.workers import WorkerPool
def own(number):
    return number
if {guard}:
    for start in {starts}:
        pool = WorkerPool({function}, 1, start=start)
        print(start, pool.result(pool.submit(-1)), flush=True)
        pool.close()
"""


def _last_words(*arguments: str, script: str = "") -> str:
    """Run Python on a script from standard input; return the last line of output and errors."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, input=script, capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).splitlines()[-1]


def test_a_script_from_standard_input_has_workers_like_any_other():
    guarded = {"guard": "__name__ == '__main__'"}
    script = SCRIPT.format(function="abs", starts="('spawn', clean_start())", **guarded)
    assert _last_words("-", script=script) == "forkserver 1"
    said = _last_words("-", script=SCRIPT.format(function="own", starts="['spawn']", **guarded))
    assert said.endswith("(this one came from stdin, say): what they are given must come from a module")


@pytest.mark.parametrize("num_bytes", [0, 10_000_000], ids=["small", "large"])
def test_a_script_without_a_guard_is_told_of_it(tmp_path, num_bytes):
    function = f"partial(max, bytes({num_bytes}))"
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(function=function, starts="[clean_start()]", guard="True"))
    assert _last_words(str(path)).endswith("scripts need `if __name__ == '__main__':` around their calls")


def _state(pid: int) -> str:
    """Return the letter that /proc gives a process; "" where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return ""


def _is_running(pid: int) -> bool:
    """Not counting a process that has ended and that nobody has waited for."""
    return _state(pid) not in ("", "Z")


PARENT = """
import sys, time
from flashi2v_data.workers import WorkerPool
from test_workers import work
if __name__ == "__main__":
    pool = WorkerPool(work, 2, start=sys.argv[2])
    pool.start()
    print(*[worker.process.pid for worker in pool._workers], flush=True)
    for task in [pool.submit(("late", 0)) for _ in range(2)]:
        pool.result(task)
    if sys.argv[1] == "hang":
        for _ in range(2):
            pool.submit(("hang", 0))
        time.sleep(1000)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("start", ["fork", "forkserver"])
@pytest.mark.parametrize("end", ["hang", "exit"])
def test_workers_end_with_their_parent(tmp_path, end, start):
    (tmp_path / "parent.py").write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "parent.py", end, start], stdout=subprocess.PIPE, text=True, env=environment
    )
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    if end == "hang":
        assert all(map(_is_running, pids))
        parent.kill()
    assert parent.wait() == (-signal.SIGKILL if end == "hang" else 0)
    parent.stdout.close()
    while any(map(_is_running, pids)):
        time.sleep(0.05)
