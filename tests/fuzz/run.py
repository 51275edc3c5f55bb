"""Read inputs that are nearly valid, and see that nothing but declared errors comes of them.

`nox -s fuzz` runs this; README.md beside it says how.
"""

import argparse
import ctypes
import json
import mmap
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).parent))
from targets import CANARY, TARGETS, Target

GUARD = Path(__file__).with_name("guard.c")
CPU_SECONDS = 10
# For one that waits without computing; the machine may be slow.
WALL_SECONDS = 120
MEMORY_BYTES = 2 << 30
# Allocations that would go far beyond it fail at once, and are told by the MemoryError.
ADDRESS_BYTES = 4 << 30
MAX_WORDS = 2000  # of an error's text, before a command cuts it to one line

# What reading has no business with: (event, what it means).
FORBIDDEN = {
    "subprocess.Popen": "started a program",
    "os.system": "started a program",
    "os.exec": "started a program",
    "os.posix_spawn": "started a program",
    "socket.connect": "opened a connection",
    "socket.bind": "opened a port",
    "socket.getaddrinfo": "looked a host up",
    "urllib.Request": "asked for a URL",
    "builtins.input": "asked on the terminal",
}


class Forbidden(BaseException):
    """An input made the process do something else than read."""


def watch(folder: Path) -> None:
    """Refuse, in this process from now on, what no input may cause."""
    below = str(folder)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in FORBIDDEN:
            raise Forbidden(f"{FORBIDDEN[event]}: {arguments!r:.200}")
        if event == "exec" and getattr(arguments[0], "co_filename", "").startswith(below):
            raise Forbidden(f"ran code of the input: {arguments[0].co_filename}")
        if event == "import" and isinstance(arguments[1], str) and arguments[1].startswith(below):
            raise Forbidden(f"imported {arguments[1]}")

    sys.addaudithook(hook)
    guard = getattr(ctypes.CDLL(None), "guard_arm", None) if "FUZZ_BUILT" in os.environ else None
    if guard is not None:
        guard()


def fault(target: Target, number: int, path: Path) -> str | None:
    """Read one input; return what is wrong with how that ended."""
    try:
        target.read(path)
    except Exception as error:
        found = _fault_of(error)
    except Forbidden as error:
        found = f"the input {error}"
    else:
        found = "was read, where it must be refused" if target.must_refuse(number) else None
    if Path(CANARY).exists() or (path.parent / CANARY).exists():
        return "code of the input was run"
    return found


def _fault_of(error: Exception) -> str | None:
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    text = str(error)
    if any(isinstance(link, MemoryError) for link in chain):
        return f"asked for more than {ADDRESS_BYTES >> 30} GiB: {text[:200]}"
    if not isinstance(getattr(error, "exit_code", None), int):
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} escaped, from {Path(last.filename).name}:{last.lineno}: {text[:200]}"
    if not text.strip() or len(text) > MAX_WORDS:
        return f"an error of {len(text)} characters: {text[:100]}"
    return None


# ---- workers ------------------------------------------------------------------------------------------------------


def work(
    target: Target, valid: dict[str, Any], begin: int, end: int, until: float, options: Any, state: Any
) -> NoReturn:
    """Be the process that reads inputs begin ... end - 1; `state` holds the number at hand and a message."""
    home = Path(tempfile.mkdtemp(prefix="fuzz-", dir=options.work))
    limit = _address_space() + ADDRESS_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    quiet = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(quiet, descriptor)
    watch(home)
    for number in range(begin, end):
        if time.monotonic() > until:
            break
        folder = home / str(number)
        folder.mkdir()
        os.chdir(folder)
        path = target.write(valid, number, random.Random(f"{options.seed} {target.name} {number}"), folder)
        state[0:8] = number.to_bytes(8, "little")
        Path("/proc/self/clear_refs").write_text("5")  # the peak is this input's
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # whose signal ends the process
        before = _memory("VmRSS")
        found = fault(target, number, path)
        signal.setitimer(signal.ITIMER_PROF, 0)
        taken = _memory("VmHWM") - before
        if found is None and taken > MEMORY_BYTES:
            found = f"took {taken >> 20} MiB"
        if found is not None:
            os.write(options.pipe, (json.dumps([target.name, number, found]) + "\n").encode())
        os.chdir("/")
        shutil.rmtree(folder, ignore_errors=True)
    state[0:8] = (number if time.monotonic() > until else end).to_bytes(8, "little")
    shutil.rmtree(home, ignore_errors=True)
    os._exit(0)


def _memory(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return 1024 * int(line.split()[1])
    return 0


def _address_space() -> int:
    return _memory("VmSize")


class Job:
    """A target's inputs, read by one process after the other, as those end that an input ends."""

    def __init__(self, target: Target, valid: dict[str, Any], numbers: range, options: Any) -> None:
        self.target, self.valid, self.numbers, self.options = target, valid, numbers, options
        self.next = numbers.start
        self.seconds = 0.0
        self.state = mmap.mmap(-1, 8)
        self.until = float("inf")

    def start(self) -> None:
        self.began = self.changed = time.monotonic()
        self.last = -1
        self.state[0:8] = self.next.to_bytes(8, "little")
        self.process = os.fork()
        if self.process == 0:
            try:
                work(self.target, self.valid, self.next, self.numbers.stop, self.until, self.options, self.state)
            except BaseException:
                os.write(
                    self.options.pipe, (json.dumps([self.target.name, self.at, traceback.format_exc()]) + "\n").encode()
                )
            finally:
                os._exit(3)

    @property
    def at(self) -> int:
        return int.from_bytes(self.state[0:8], "little")

    def poll(self) -> tuple[bool, str | None]:
        """Return whether the process has ended, and what is wrong with how."""
        ended, status = os.waitpid(self.process, os.WNOHANG)
        if not ended:
            if self.at != self.last:
                self.last, self.changed = self.at, time.monotonic()
            if time.monotonic() - self.changed < WALL_SECONDS:
                return False, None
            os.kill(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)
        self.seconds += time.monotonic() - self.began
        code = os.waitstatus_to_exitcode(status) if ended else None
        if code == 0:
            self.next = self.numbers.stop if self.at >= self.numbers.stop else self.at
            return True, None
        number, self.next = self.at, self.at + 1
        reason = {None: f"hung for {WALL_SECONDS} s", -signal.SIGPROF: f"computed for {CPU_SECONDS} s"}.get(
            code, "started a program or a connection" if code == -signal.SIGUSR2 else f"ended the process ({code})"
        )
        os.write(self.options.pipe, (json.dumps([self.target.name, number, reason]) + "\n").encode())
        return True, reason


# ---- the session --------------------------------------------------------------------------------------------------


def run_jobs(jobs: list[Job], num_processes: int) -> Iterator[Job]:
    """Run jobs, some at a time; yield each when it is done."""
    waiting, running = list(reversed(jobs)), []
    while waiting or running:
        while waiting and len(running) < num_processes:
            running.append(waiting.pop())
            running[-1].until = time.monotonic() + running[-1].options.share
            running[-1].start()
        for job in list(running):
            has_ended, reason = job.poll()
            if has_ended:
                if reason is not None and job.next < job.numbers.stop and time.monotonic() < job.until:
                    job.start()
                else:
                    running.remove(job)
                    yield job
        time.sleep(0.01)


def build_guard(folder: Path) -> None:
    """Build and preload the guard where that can be; elsewhere Python's own audit events must do."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if sys.platform.startswith("linux") and compiler is not None:
        library = folder / "guard.so"
        subprocess.run(
            [compiler, "-O2", "-Wall", "-shared", "-fPIC", str(GUARD), "-o", str(library), "-ldl"], check=True
        )
        os.environ.update(LD_PRELOAD=str(library), FUZZ_BUILT="1")


def import_all() -> None:
    for name in (
        "flashi2v_data.curation.filter",
        "flashi2v_data.curation.inspection",
        "flashi2v_train.trainer",
        "flashi2v_train.encoding",
    ):
        import_module(name)
    for name in (
        "flashi2v_infer.commands.run",
        "flashi2v_model.cli",
        "flashi2v_infer.files.export",
        "diffusers",
        "transformers",
    ):
        import_module(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="nox -s fuzz --")
    parser.add_argument("--seed", type=int, default=0, help="of all inputs")
    parser.add_argument("--minutes", type=float, help="read inputs for so long, instead of a fixed number of them")
    parser.add_argument("--target", action="append", help=f"only this one: {', '.join(TARGETS)}")
    parser.add_argument("--number", type=int, help="this input alone, with its traceback")
    parser.add_argument("--keep", type=Path, help="a directory in which this input stays")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    options = parser.parse_args()
    if not sys.platform.startswith("linux"):
        sys.exit("fuzz: needs Linux, whose limits it uses: nothing was read")
    options.work = tempfile.mkdtemp(prefix="fuzz-")
    try:
        if "FUZZ_ENVIRONMENT" not in os.environ:
            build_guard(Path(options.work))
            os.environ.update(FUZZ_ENVIRONMENT="1", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
            sys.exit(subprocess.run([sys.executable, __file__, *sys.argv[1:]]).returncode)
        sys.exit(session(options))
    finally:
        shutil.rmtree(options.work, ignore_errors=True)


def session(options: argparse.Namespace) -> int:
    import_all()
    targets = [TARGETS[name]() for name in options.target or TARGETS]
    valid = {target.name: prepared(target, Path(options.work)) for target in targets}
    if options.number is not None:
        return replay(targets[0], valid[targets[0].name], options)
    reading, options.pipe = os.pipe()
    os.set_blocking(reading, False)
    options.share = float("inf")
    if options.minutes:
        options.share = 60 * options.minutes * options.jobs / len(targets)
    jobs = [
        Job(target, valid[target.name], range(1 << 40 if options.minutes else target.short), options)
        for target in targets
    ]
    rows, faults, told, text = [], [], set(), b""
    for job in run_jobs(jobs, options.jobs):
        rows.append((job.target.name, min(job.next, job.numbers.stop), job.seconds))
        while True:
            try:
                text += os.read(reading, 1 << 16)
            except BlockingIOError:
                break
        *lines, text = text.split(b"\n")
        for line in lines:
            name, number, found = json.loads(line)
            faults.append(name)
            alike = (name, re.sub(r"\d+", "", found.partition(": ")[0]))
            if alike in told:
                continue
            told.add(alike)
            print(f"FOUND {name}, input {number}: {found}", flush=True)
            print(f"      again: nox -s fuzz -- --seed {options.seed} --target '{name}' --number {number}", flush=True)
    print("\n| reader | inputs | seconds | found |\n|---|---|---|---|")
    for name, number, seconds in rows:
        print(f"| {name} | {number} | {seconds:.1f} | {faults.count(name)} |")
    print(f"{sum(row[1] for row in rows)} inputs read, {len(faults)} faults found", flush=True)
    return int(bool(faults))


def prepared(target: Target, work: Path) -> dict[str, Any]:
    """Make a target's valid inputs, in a fork, so that this process stays as it is."""
    inputs = Path(tempfile.mkdtemp(prefix="valid-", dir=work))
    pipe, theirs = os.pipe()
    process = os.fork()
    if process == 0:
        import pickle

        try:
            with os.fdopen(theirs, "wb") as answer:
                pickle.dump(target.prepare(inputs), answer)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(theirs)
    with os.fdopen(pipe, "rb") as answer:
        import pickle

        valid: dict[str, Any] = pickle.load(answer)
    os.waitpid(process, 0)
    return valid


def replay(target: Target, valid: dict[str, Any], options: argparse.Namespace) -> int:
    folder = options.keep or Path(tempfile.mkdtemp(dir=options.work))
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    chance = random.Random(f"{options.seed} {target.name} {options.number}")
    path = target.write(valid, options.number, chance, folder.resolve())
    print(f"input: {path}", flush=True)
    watch(folder.resolve())
    try:
        result = target.read(path)
    except BaseException:
        traceback.print_exc()
        return 1
    print(f"read: {result!r:.300}")
    return 0


if __name__ == "__main__":
    main()
