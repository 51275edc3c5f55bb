"""Strike commands at single file operations and see that the same command, started again, ends as if nothing was.

`nox -s faults` runs this; README.md beside it says how.
"""

import argparse
import atexit
import contextlib
import gc
import itertools
import json
import os
import platform
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).parent))
from commands import OUT, Command, contents, differences, environment, import_all, prepare, run, warm_up

SHIM = Path(__file__).with_name("shim.c")
# Kills first and most often: after one, nothing in the process can put anything right.
KINDS = ("kill", "ENOSPC", "kill", "interrupt", "kill", "EIO", "kill", "EACCES")
# Against hangs only; a start takes a second.
PATIENCE_SECONDS = 300.0
# Between the end of one of several processes and the end of all, as torchrun gives them.
GRACE_SECONDS = 30.0


@dataclass(frozen=True)
class Strike:
    """What is done to one start of a command: at which operation (0: none), and what."""

    number: int = 0
    kind: str = "kill"


@dataclass
class Ended:
    """How the processes of one start ended."""

    codes: list[int]
    errors: list[str]
    struck: str
    is_late: bool = False

    @property
    def code(self) -> int:
        return next((code for code in self.codes if code), 0)

    @property
    def line(self) -> str:
        """The last words of the first process that failed."""
        texts = [text for code, text in zip(self.codes, self.errors, strict=True) if code] or self.errors
        return (texts[0].strip().splitlines() or [""])[-1]


@dataclass
class Outcome:
    """What became of one try: `faults` is empty where nothing was lost."""

    command: str
    strikes: list[Strike]
    struck: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


# ---- one start ----------------------------------------------------------------------------------------------------


def start(command: Command, folder: Path, strike: Strike, number: int = 0) -> Ended:
    """Run a command in forks of this process, in `folder`, and strike it; this is start `number` there."""
    state = folder / "state"
    with state.open("wb") as file:
        file.truncate(8192)
    port, errors = _free_port(), [folder / f"errors_{number}_{rank}" for rank in range(command.num_processes)]
    processes: list[int] = []
    for rank in range(command.num_processes):
        process = os.fork()
        if process == 0:
            _become(command, folder, strike, environment(command, rank, port), errors[rank], processes)
        os.setpgid(process, processes[0] if processes else process)
        processes.append(process)
    codes, is_late = _wait(processes)
    struck = state.read_bytes()[8:].partition(b"\0")[0].decode(errors="replace")
    return Ended(codes, [path.read_text(errors="replace") for path in errors], struck, is_late)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _become(
    command: Command, folder: Path, strike: Strike, more: dict[str, str], errors: Path, group: list[int]
) -> NoReturn:
    """Be a process of the command, from its first line to its exit code."""
    import ctypes

    os.setpgid(0, group[0] if group else 0)
    os.chdir(folder)
    for name, descriptor in ((os.devnull, 0), ("output", 1), (errors, 2)):
        opened = os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.update(more)
    os.environ["FAULTS_DIRECTORY"] = str(folder / OUT)
    os.environ["FAULTS_STATE"] = str(folder / "state")
    os.environ["FAULTS_TRACE"] = str(folder / "trace")
    os.environ["FAULTS_NUMBER"], os.environ["FAULTS_KIND"] = str(strike.number), strike.kind
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Workers that are started afresh must not import this script as theirs.
    sys.modules["__main__"] = type(sys)("__main__")
    ctypes.CDLL(None).faults_arm()
    code = 1
    try:
        code = run(command)
    except BaseException:
        traceback.print_exc()
    finally:
        # As the interpreter ends, without tearing down libraries that this process only inherited.
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        (folder / "modules").write_text("\n".join(sys.modules))
        os._exit(code)


def _wait(processes: Sequence[int]) -> tuple[list[int], bool]:
    """Wait for all; once one has failed, ask the others to end, and at last end them."""
    codes: dict[int, int] = {}
    deadline, asked = time.monotonic() + PATIENCE_SECONDS, False
    while len(codes) < len(processes):
        for process in processes:
            if process not in codes:
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    codes[process] = os.waitstatus_to_exitcode(status)
        left = [process for process in processes if process not in codes]
        if left and any(codes.values()) and not asked:
            asked, deadline = True, time.monotonic() + GRACE_SECONDS
            for process in left:
                os.kill(process, signal.SIGTERM)
        if left and time.monotonic() > deadline:
            for process in left:
                os.kill(process, signal.SIGKILL)
            for process in left:
                os.waitpid(process, 0)
                codes[process] = -signal.SIGKILL
            return [codes[process] for process in processes], not asked
        time.sleep(0.005)
    return [codes[process] for process in processes], False


# ---- one try ------------------------------------------------------------------------------------------------------


def attempt(command: Command, folder: Path, strikes: list[Strike], expected: dict[str, str]) -> Outcome:
    """Start a command with each strike in turn, then unharmed, and compare what it leaves."""
    outcome = Outcome(command.name, strikes)
    for number, strike in enumerate(strikes):
        ended = start(command, folder, strike, number)
        outcome.struck.append(ended.struck or "nothing")
        outcome.faults += _faults_of_words(ended, strike, command)
        if ended.is_late:
            return outcome
    ended = start(command, folder, Strike(), len(strikes))
    was_done = ended.code == 2 and command.ended and command.ended in ended.line
    if ended.code and not was_done:
        outcome.faults.append(f"started again it exits with {ended.code}: {ended.line}")
    found = differences(contents(folder / OUT), expected)
    outcome.faults += found[:5] + ([f"and {len(found) - 5} more"] if len(found) > 5 else [])
    return outcome


def _faults_of_words(ended: Ended, strike: Strike, command: Command) -> list[str]:
    """What is wrong with how a struck command ended, and with what it said."""
    if ended.is_late:
        return [f"did not end within {PATIENCE_SECONDS:g} s"]
    if strike.kind == "kill" or not ended.struck:  # several processes: what the others say is of lost connections
        return []
    faults = []
    allowed = (0, 130) if strike.kind == "interrupt" else (0, 1, 2)
    if ended.code not in allowed and not (command.num_processes > 1 and ended.code == -signal.SIGTERM):
        faults.append(f"exit code {ended.code}, not one of {allowed}: {ended.line}")
    # A process that lost another to a strike may say so as it likes: the launcher passes on the other's words.
    faults += [
        f"a traceback: {text.strip().splitlines()[-1]}"
        for text in ended.errors
        if "Traceback" in text and not (command.num_processes > 1 and "onnection" in text)
    ]
    if faults:
        return faults
    if ended.code > 0 and not (ended.line.startswith("flashi2v-") and len(ended.line) <= 500 + len("flashi2v-train: ")):
        faults.append(f"no line that says why: {ended.line}")
    return faults


# ---- many tries ---------------------------------------------------------------------------------------------------


def choose(trace: Sequence[str], num_points: int, chance: random.Random, doubles: float) -> Iterator[list[Strike]]:
    """Spread points over a whole run, one in each of as many parts; some get a second strike in the second start.

    A tensor file is written in hundreds of operations that are all alike: of what one file goes through in a row, three
    count, the first, the last and one between.
    """
    places: list[int] = []
    for _, alike in itertools.groupby(range(1, len(trace) + 1), lambda number: trace[number - 1]):
        first, *more = alike
        places += sorted({first, *more[-1:], *([chance.choice(more)] if more else [])})
    kinds = [KINDS[index % len(KINDS)] for index in range(num_points)]
    chance.shuffle(kinds)
    for index, kind in enumerate(kinds):
        begin = index * len(places) // num_points
        part = places[begin : max(begin + 1, (index + 1) * len(places) // num_points)]
        strikes = [Strike(chance.choice(part), kind)]
        if chance.random() < doubles:
            strikes.append(Strike(chance.choice(places), chance.choice(KINDS)))
        yield strikes


def run_all(
    tries: Sequence[tuple[Command, list[Strike], dict[str, str]]], work: Path, jobs: int, until: float
) -> Iterator[Outcome]:
    """Make tries in forks of this process, some at a time, as long as there is time to begin another."""
    waiting, running = list(reversed(tries)), {}
    while waiting or running:
        while waiting and len(running) < jobs and time.monotonic() < until:
            command, strikes, expected = waiting.pop()
            folder = Path(tempfile.mkdtemp(prefix="try-", dir=work))
            process = os.fork()
            if process == 0:
                try:
                    outcome = attempt(command, folder, strikes, expected)
                    (folder / "outcome.json").write_text(json.dumps(asdict(outcome)))
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(0)
            running[process] = folder
        if not running:
            return
        process, _ = os.wait()
        folder = running.pop(process)
        outcome = json.loads((folder / "outcome.json").read_text())
        outcome["strikes"] = [Strike(**strike) for strike in outcome["strikes"]]
        yield Outcome(**outcome)
        if not outcome["faults"]:
            shutil.rmtree(folder)


def prepare_apart(inputs: Path) -> list[Command]:
    """Prepare in a process of its own: this one must stay without threads, as it forks."""
    commands = apart(lambda: [asdict(command) for command in prepare(inputs)])
    return [Command(**command | {"arguments": tuple(command["arguments"])}) for command in commands]


def apart(work: Callable[[], Any]) -> Any:
    """Return what a function returns in a fork, as JSON gives it back."""
    pipe, theirs = os.pipe()
    process = os.fork()
    if process == 0:
        code = 1
        try:
            with os.fdopen(theirs, "w") as answer:
                json.dump(work(), answer)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(theirs)
    with os.fdopen(pipe) as answer:
        text = answer.read()
    if os.waitpid(process, 0)[1]:
        sys.exit("a process of the session itself failed")
    return json.loads(text)


def whole_run(command: Command, work: Path) -> tuple[list[str], dict[str, str]]:
    """Run a command undisturbed; return its operations, one after the other, and what it leaves.

    What it imported is imported here too: the forks that follow then start at once.
    """
    folder = Path(tempfile.mkdtemp(prefix="whole-", dir=work))
    ended = start(command, folder, Strike())
    if ended.code:
        sys.exit(f"{command.name} does not run at all:\n{ended.errors[0]}")
    for name in (folder / "modules").read_text().split():
        with contextlib.suppress(Exception):  # some exist only within another
            import_module(name)
    found = apart(lambda: contents(folder / OUT))
    num_threads = len(os.listdir("/proc/self/task"))
    if num_threads > 1:
        sys.exit(f"importing what {command.name} uses started {num_threads - 1} threads: it cannot be forked safely")
    return (folder / "trace").read_text().splitlines(), found


# ---- the session --------------------------------------------------------------------------------------------------


def build_shim(folder: Path) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not sys.platform.startswith("linux") or compiler is None:
        sys.exit("faults: needs Linux and a C compiler (cc): nothing was tried")
    library = folder / "shim.so"
    subprocess.run(
        [compiler, "-O2", "-Wall", "-Werror", "-shared", "-fPIC", str(SHIM), "-o", str(library), "-ldl"], check=True
    )
    return library


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="nox -s faults --")
    parser.add_argument("--points", type=int, default=10, help="tries per command")
    parser.add_argument("--budget", type=float, default=float("inf"), help="minutes after which none is begun")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of points")
    parser.add_argument("--doubles", type=float, default=0.2, help="share of tries with a second strike")
    parser.add_argument("--jobs", type=int, default=2, help="tries at a time")
    parser.add_argument(
        "--command", action="append", help="only this one: filter, encode, train, 'train by two', infer"
    )
    parser.add_argument("--strike", help="NUMBER:KIND,...: this try alone")
    parser.add_argument("--keep", type=Path, help="a directory to work in, which stays")
    options = parser.parse_args()
    if "FAULTS_BUILT" not in os.environ:
        with tempfile.TemporaryDirectory(prefix="faults-") as folder:
            os.environ.update(LD_PRELOAD=str(build_shim(Path(folder))), FAULTS_BUILT="1", OMP_NUM_THREADS="1")
            os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
            sys.exit(subprocess.run([sys.executable, __file__, *sys.argv[1:]]).returncode)
    work = options.keep or Path(tempfile.mkdtemp(prefix="faults-"))
    try:
        work.mkdir(exist_ok=True)
        sys.exit(session(options, work.resolve()))
    finally:
        if options.keep is None:
            shutil.rmtree(work, ignore_errors=True)


def session(options: argparse.Namespace, work: Path) -> int:
    until = time.monotonic() + 60 * options.budget
    import_all()
    commands = prepare_apart(work / "inputs")
    warm_up(work / "inputs")
    gc.freeze()  # else every fork goes through all that was imported
    if options.command:
        commands = [command for command in commands if command.name in options.command]
    tries, sizes = [], {}
    for command in commands:
        chance = random.Random(f"{options.seed} {command.name}")
        trace, expected = whole_run(command, work)
        sizes[command.name] = len(trace)
        chosen = choose(trace, options.points, chance, options.doubles)
        points = [_parse(options.strike)] if options.strike else chosen
        tries += [(command, strikes, expected) for strikes in points]
    random.Random(options.seed).shuffle(tries)  # so that a budget cuts all commands alike
    outcomes = []
    for outcome in run_all(tries, work, options.jobs, until):
        outcomes.append(outcome)
        words = ", then ".join(
            f"{strike.kind} at {strike.number} ({struck})" for strike, struck in zip(outcome.strikes, outcome.struck)
        )
        if outcome.faults:
            print(f"LOST  {outcome.command}: {words}: {'; '.join(outcome.faults)}", flush=True)
        elif options.strike:
            print(f"whole {outcome.command}: {words}", flush=True)
    print_table(sizes, outcomes)
    return int(any(outcome.faults for outcome in outcomes))


def _parse(text: str) -> list[Strike]:
    return [Strike(int(number), kind) for number, _, kind in (part.partition(":") for part in text.split(","))]


def print_table(sizes: dict[str, int], outcomes: Sequence[Outcome]) -> None:
    """Points tried and survived, by command and kind."""
    kinds = [*dict.fromkeys(KINDS), "twice"]
    print(f"\n{platform.platform()}, {os.cpu_count()} processors, Python {platform.python_version()}")
    print("| command | operations | " + " | ".join(kinds) + " | survived |")
    print("|---|---|" + "---|" * len(kinds) + "---|")
    for name, size in sizes.items():
        own = [outcome for outcome in outcomes if outcome.command == name]
        tried = Counter("twice" if len(outcome.strikes) > 1 else outcome.strikes[0].kind for outcome in own)
        whole = sum(not outcome.faults for outcome in own)
        print(f"| {name} | {size} | " + " | ".join(str(tried[kind]) for kind in kinds) + f" | {whole} of {len(own)} |")
    print(f"{len(outcomes)} points tried, {sum(bool(outcome.faults) for outcome in outcomes)} lost", flush=True)


if __name__ == "__main__":
    main()
