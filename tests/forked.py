"""The console commands in real processes, forked from one in which the libraries are imported already.

Importing torch and diffusers takes seconds of every process, forking takes none. A forked command has its own working
directory, environment, signals, limits and exit, as one that a shell starts; what a cold start does, the tests of the
packages' READMEs and of the examples see, which run the installed scripts.
"""

import atexit
import functools
import gc
import importlib
import importlib.metadata
import os
import pickle
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

PRELOADED = {
    "flashi2v-data": ("cli", "curation.filter", "curation.inspection", "shapes.scenes"),
    "flashi2v-model": ("cli", "presets", "weights.conversion"),
    "flashi2v-train": ("launcher", "encode", "trainer", "validation"),
    "flashi2v-infer": ("cli", "commands.run", "commands.sampler"),
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
        self._keeper.connect(_server(command))
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


def call(package: str, num_processes: int, function: Callable[..., object], *arguments: object) -> None:
    """Call a module's function in several processes that have imported a package, with their rank first."""
    ranks = [Command(package, rank, *arguments, function=function) for rank in range(num_processes)]
    failures = [errors for _, errors in [rank.communicate() for rank in ranks] if errors]
    assert [rank.wait() for rank in ranks] == [0] * num_processes, "\n".join(failures)


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


@functools.cache
def _server(command: str) -> str:
    """Start the process that those of a command are forked from; return its address. It ends with this one."""
    package = {"flashi2v-encode": "flashi2v-train"}.get(command, command)
    if package != command:
        return _server(package)
    directory = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, directory)
    address = f"{directory}/socket"
    read, _held = os.pipe()  # closed by the system when this process ends
    server = subprocess.Popen([sys.executable, __file__, address, package], stdin=read, stdout=subprocess.PIPE)
    os.close(read)
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n"
    return address


def serve(address: str, package: str) -> Request:
    """Fork for everyone who connects; return in the forked processes, with what they are to be."""
    for module in PRELOADED.get(package, ()):
        importlib.import_module(f"{package.replace('-', '_')}.{module}")
    gc.freeze()  # what is there is shared with all forks, and stays so
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen()
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for keepers
    while listening in select.select([listening, sys.stdin], [], [])[0]:
        connection, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            length = int.from_bytes(connection.recv(LENGTH_BYTES, socket.MSG_WAITALL), "big")
            sys.path, request = pickle.loads(connection.recv(length, socket.MSG_WAITALL))
            request = pickle.loads(request)
            pipes = [os.pipe(), os.pipe()]
            pid = os.fork()
            if pid == 0:
                connection.close()
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                for number, ends in enumerate(pipes, 1):
                    os.dup2(ends[1], number)
                    for end in ends:
                        os.close(end)
                return request
            for _, end in pipes:
                os.close(end)
            _keep(pid, connection, {pipes[0][0]: request.output, pipes[1][0]: request.errors})
        connection.close()
    os._exit(0)


def _keep(pid: int, connection: socket.socket, outputs: dict[int, str]) -> None:
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


if __name__ == "__main__":
    become(serve(*sys.argv[1:]))
