import json
import os
import signal
import subprocess
import sys

import pytest

from flashi2v_data.atomic import atomic_directory, atomic_file
from flashi2v_data.errors import InputError
from flashi2v_data.locking import hold

HOLDS = """
import os, sys
from flashi2v_data.locking import hold
with hold(sys.argv[1], "runs/first"):
    if os.fork() == 0:  # a child, as judges and loaders are, outlives its parent
        sys.stdin.read()
        os._exit(0)
    print("held", flush=True)
    sys.stdin.read()
"""
WRITES = """
import os, sys
from flashi2v_data.atomic import atomic_file
with atomic_file(sys.argv[1]) as path:
    path.write_text("half")
    print("writing", flush=True)
    sys.stdin.read()
"""


def _start(program: str, path) -> subprocess.Popen:
    command = [sys.executable, "-c", program, str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    return process


def test_a_second_holder_is_told_host_process_and_age_and_may_go_on_right_after_a_kill(tmp_path):
    lock = tmp_path / ".lock"
    holder = _start(HOLDS, lock)
    with (
        pytest.raises(InputError, match=rf"runs/first is in use .*process {holder.pid} on .*, 0 h 0 min ago"),
        hold(lock, "runs/first"),
    ):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with hold(lock, "runs/first"):  # while its child still lives
        assert json.loads(lock.read_text())["process"] == os.getpid()
        with pytest.raises(InputError, match="this process already"), hold(lock, "runs/first"):
            pass
    assert not lock.exists()
    holder.stdin.close()


def test_what_a_killed_process_left_in_hiding_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    path = tmp_path / "report.json"
    # Of another name: a run that was killed behind its last file need not write that one again.
    killed, living = _start(WRITES, tmp_path / "video_0.json"), _start(WRITES, path)
    killed.kill()
    killed.wait()
    assert len(list(tmp_path.iterdir())) == 2
    with atomic_file(path) as temporary, atomic_file(path) as inner:
        temporary.write_text("whole")
        inner.write_text("also whole")
    (hidden,) = (entry for entry in tmp_path.iterdir() if entry != path)
    assert (hidden / path.name).read_text() == "half"
    living.communicate()
    assert os.listdir(tmp_path) == [path.name]
    with pytest.raises(ZeroDivisionError), atomic_directory(tmp_path / "store"):
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == [path.name]
