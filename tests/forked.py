"""The console commands in real processes, forked from one in which the libraries are imported already.

Importing torch and diffusers takes seconds of every process, forking takes none. A forked command has its own working
directory, environment, signals, limits and exit, as one that a shell starts; what a cold start does, the tests of the
packages' READMEs and of the examples see, which run the installed scripts. All processes of a run of pytest share what
they fork from.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import importlib.metadata
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

if not hasattr(os, "fork"):
    import pytest

    pytest.skip("commands are forked, which this system does not do", allow_module_level=True)

import fcntl

# flashi2v-data has its own process, as it knows no torch until it loads batches.
PRELOADED = {
    "flashi2v-data": tuple(
        f"flashi2v_data.{name}" for name in ("cli", "curation.filter", "curation.inspection", "shapes.scenes")
    ),
    "others": (
        *(f"flashi2v_train.{name}" for name in ("launcher", "encoding", "trainer", "validation")),
        *(f"flashi2v_infer.{name}" for name in ("cli", "commands.run", "commands.sampler")),
        *(f"flashi2v_model.{name}" for name in ("cli", "presets", "weights.conversion")),
        *(f"flashi2v_npu_ops.{name}" for name in ("cli", "doctor")),
        # What commands import on their way.
        *("diffusers.models.autoencoders.autoencoder_kl_wan", "transformers.models.umt5.modeling_umt5"),
        *("torch.distributed.launcher.api", "torch.utils.tensorboard"),
    ),
}
LENGTH_BYTES = 4


class Request(NamedTuple):
    """What a forked process is to be."""

    command: str
    arguments: list[Any]  # of the command, or of the function
    function: Callable[..., object] | None  # to be called instead of the command
    directory: str
    environment: dict[str, str]
    output: str
    errors: str
    prepare: Callable[[], object] | None
    new_session: bool


class Command:
    """A running command, to be used as a `subprocess.Popen`; it is killed where a test leaves it behind."""

    def __init__(
        self,
        command: str,
        *arguments: object,
        cwd: Path | str | None = None,
        env: Mapping[str, str] | None = None,
        function: Callable[..., object] | None = None,
        prepare: Callable[[], object] | None = None,
        new_session: bool = False,
    ) -> None:
        self._directory = tempfile.TemporaryDirectory()
        self._output, self._errors = (Path(self._directory.name) / name for name in ("output", "errors"))
        for path in (self._output, self._errors):
            path.touch()
        words = [*arguments] if function else [str(argument) for argument in arguments]
        where, environment = os.path.abspath(cwd or "."), dict(os.environ if env is None else env)
        outputs = (str(self._output), str(self._errors))
        request = Request(command, words, function, where, environment, *outputs, prepare, new_session)
        # The modules of tests are found as here.
        message = pickle.dumps((sys.path, pickle.dumps(request)))
        self._keeper = socket.socket(socket.AF_UNIX)
        self._keeper.connect(_server(command if command in PRELOADED else "others"))
        self._keeper.sendall(len(message).to_bytes(LENGTH_BYTES, "big") + message)
        self.pid = self._receive()
        self.returncode: int | None = None
        self._end = weakref.finalize(self, _kill, self.pid)

    def _receive(self) -> int:
        return int.from_bytes(self._keeper.recv(LENGTH_BYTES, socket.MSG_WAITALL), "big", signed=True)

    def wait(self) -> int:
        """Wait for its end; return its exit code, negative for a signal."""
        if self.returncode is None:
            self.returncode = self._receive()
            self._end.detach()
            self._keeper.close()
        return self.returncode

    def poll(self) -> int | None:
        """Return its exit code, or None while it runs."""
        if self.returncode is None and select.select([self._keeper], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    def errors(self) -> str:
        """Return what it has written to standard error so far."""
        return self._errors.read_text()

    def communicate(self) -> tuple[str, str]:
        """Wait for its end; return what it wrote to standard output and standard error."""
        self.wait()
        return self._output.read_text(), self.errors()


def run(command: str, *arguments: object, check: bool = False, **more: object) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, as `subprocess.run` with its output captured."""
    process = Command(command, *arguments, **more)
    output, errors = process.communicate()
    assert not check or process.returncode == 0, errors
    return subprocess.CompletedProcess([command, *arguments], process.returncode, output, errors)


def call(package: str, num_processes: int, function: Callable[..., object], *arguments: object, **more: object) -> None:
    """Call a module's function in several processes that have imported a package, with their rank first."""
    ranks = [Command(package, rank, *arguments, function=function, **more) for rank in range(num_processes)]
    failures = [errors for _, errors in [rank.communicate() for rank in ranks] if errors]
    assert [rank.wait() for rank in ranks] == [0] * num_processes, "\n".join(failures)


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


@functools.cache
def _server(group: str) -> str:
    """Return the address of the process that a group's commands are forked from; start it where none has.

    It ends with the last process that has called this.
    """
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    directory = Path(tempfile.gettempdir(), f"flashi2v-{run}")
    directory.mkdir(mode=0o700, exist_ok=True)
    address = str(directory / group)
    with open(directory / f"{group}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lease = _lease(address)
        if lease is None:
            server = subprocess.Popen([sys.executable, __file__, address, group], stdout=subprocess.PIPE)
            assert server.stdout is not None
            assert server.stdout.readline() == b"ready\n"
            lease = _lease(address)
    assert lease is not None
    atexit.register(lease.close)  # and held until then
    return address


def _lease(address: str) -> socket.socket | None:
    """Return a connection that keeps a server alive; None where there is no server."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(address)
        connection.sendall(bytes(LENGTH_BYTES))
        alive = connection.recv(1)
    except OSError:
        alive = b""
    return connection if alive else None


def serve(address: str, group: str) -> Request:
    """Fork for everyone who connects; return in the forked processes, with what they are to be."""
    for module in PRELOADED[group]:
        importlib.import_module(module)
    gc.freeze()  # what is there is shared with all forks, and stays so
    Path(address).unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen()
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for keepers
    leases: list[socket.socket] = []
    while True:
        for ready in select.select([listening, *leases], [], [])[0]:
            if ready is not listening:  # its other end is closed
                leases.remove(ready)
                if not leases:
                    _leave(Path(address))
                continue
            connection, _ = listening.accept()
            length = int.from_bytes(connection.recv(LENGTH_BYTES, socket.MSG_WAITALL), "big")
            if length == 0:
                connection.sendall(b"1")
                leases.append(connection)
                continue
            if os.fork() == 0:
                for inherited in (listening, *leases):
                    inherited.close()
                return _receive(connection, length)
            connection.close()


def _leave(address: Path) -> NoReturn:
    with contextlib.suppress(OSError):  # another server is there, or somebody starts the next
        address.unlink()
        address.with_suffix(".lock").unlink()
        address.parent.rmdir()
    os._exit(0)


def _receive(connection: socket.socket, length: int) -> Request:
    """Return what the process is to be in a further fork of this one, which stays and keeps that one."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    sys.path, request = pickle.loads(connection.recv(length, socket.MSG_WAITALL))
    request = pickle.loads(request)
    pipes = [os.pipe(), os.pipe()]
    pid = os.fork()
    if pid:
        for _, end in pipes:
            os.close(end)
        _keep(pid, connection, {pipes[0][0]: request.output, pipes[1][0]: request.errors})
    connection.close()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, ends in enumerate(pipes, 1):
        os.dup2(ends[1], number)
        for end in ends:
            os.close(end)
    return request


def _keep(pid: int, connection: socket.socket, outputs: dict[int, str]) -> NoReturn:
    """Tell the number of a process, write down what it says, and tell how it ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection.sendall(pid.to_bytes(LENGTH_BYTES, "big"))
    while outputs:
        for pipe in select.select(list(outputs), [], [])[0]:
            text = os.read(pipe, 1 << 16)
            with open(outputs[pipe], "ab") as file:
                file.write(text)
            if not text:
                del outputs[pipe]
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    connection.sendall(code.to_bytes(LENGTH_BYTES, "big", signed=True))
    os._exit(0)


def become(request: Request) -> None:
    """Be a command, to its end."""
    # Background jobs of a shell, as a CI may be, ignore interrupts and hand that down.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if request.new_session:
        os.setsid()
    os.chdir(request.directory)
    os.environ.clear()
    os.environ.update(request.environment)
    if request.prepare is not None:
        request.prepare()
    if request.function is not None:
        request.function(*request.arguments)
        return
    sys.argv = [request.command, *request.arguments]
    (script,) = importlib.metadata.entry_points(group="console_scripts", name=request.command)
    sys.exit(script.load()())


def end(code: int) -> NoReturn:
    """End as Python does, but leave the memory to the system: taking apart what was imported costs half a second."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.__stdout__):
        try:
            stream.flush()
        except OSError as error:
            print(f"Exception ignored when standard output was flushed: {error}", file=sys.stderr)
            code = 120  # which is Python's
    os._exit(code)


def main() -> NoReturn:
    """Serve, and be a command in forks."""
    request = serve(*sys.argv[1:])
    try:
        become(request)
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        end(ended.code if isinstance(ended.code, int) else int(ended.code is not None))
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        end(1)
    end(0)


if __name__ == "__main__":
    main()
