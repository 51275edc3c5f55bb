"""A Ray cluster: one worker in each of its actors, which Ray places, starts on new machines, and ends.

An actor does nothing that may hang or crash; its worker gives that to processes of its own. So an actor that dies is a
matter of its machine: another takes its place, and its pieces are done again.
"""

import logging
import os
import pickle
import socket
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import flashi2v_data
from flashi2v_data.console import one_line, told_as
from flashi2v_data.engines.protocol import P, R, Stage
from flashi2v_data.errors import EngineError, InputError

logger = logging.getLogger(__name__)

# Pieces that an actor is given: the second waits there, so that it does not wait for the driver.
_DEPTH = 2
# Actors that died over one piece; machines come and go, a piece that ends so many has too little memory, say.
_MOST_DEATHS = 5
# Actors in a row that died before they were ready.
_MOST_STILLBORN = 8
# After so long without any actor, say what is waited for.
_PATIENCE_SECONDS = 60.0
_CONNECT_SECONDS = 10.0
# Ray gives a node 30 seconds to start, which a busy machine may exceed.
_STARTS = 3
# Of a cluster that is started here: results are small.
_OBJECT_STORE_BYTES = 128 << 20


def import_ray() -> Any:
    """Return Ray.

    Raises:
        InputError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise InputError("--engine ray needs Ray: pip install 'flashi2v-data[ray]'") from None
    return ray


class Actor:
    """The part of the engine that runs in Ray's processes: a worker, and how it was made."""

    def __init__(self) -> None:
        self._worker: Any = None

    def begin(self, version: str, directory: str, stage: bytes) -> tuple[bool, Any]:
        """Start the worker; return whether that went well, else the error.

        Args:
            version: of this package at the driver.
            directory: the driver's working directory, by which paths go.
            stage: pickled.
        """
        node = os.uname().nodename
        if version != flashi2v_data.__version__:
            ours = flashi2v_data.__version__
            return False, InputError(f"{node} has flashi2v-data {ours}, this machine {version}: install one on all")
        try:
            os.chdir(directory)
        except OSError as error:
            reason = f"{node} has no directory {directory} ({error.strerror}): run on a disk that all machines share"
            return False, InputError(reason)
        if directory not in sys.path:
            sys.path.append(directory)
        # Processes that are started here would run Ray's own script, which takes them a second and a lot of memory.
        vars(sys.modules["__main__"]).pop("__file__", None)
        try:
            self._worker = pickle.loads(stage).start(1)
        except Exception as error:
            return _failed(error)
        return True, os.getpid()

    def work(self, piece: Any) -> tuple[bool, Any]:
        """Do a piece; return whether that went well, and the result or the error."""
        try:
            return True, self._worker.result(self._worker.submit(piece))
        except Exception as error:
            return _failed(error)


def _failed(error: Exception) -> tuple[bool, Any]:
    """Return an error that a command line can tell as it is; raise any other, for which Ray keeps the traceback."""
    told = told_as(error)
    if told is None:
        raise error
    return False, InputError(told[1]) if told[0] == 2 else EngineError(told[1])


@dataclass(eq=False)
class _Call:
    number: int
    piece: Any
    num_deaths: int = 0


@dataclass(eq=False)
class _Member:
    """The driver's side of an actor."""

    handle: Any
    is_ready: bool = False
    calls: list[_Call] = field(default_factory=list)  # at the first of these it works


class RayEngine:
    """Runs on a Ray cluster: one that is there, or one that is started on this machine and ends with the engine.

    Args:
        address: of the cluster, HOST:PORT or auto; by default RAY_ADDRESS, else one is started here.
        jobs: actors; by default as many as the cluster has room for now.

    Raises:
        InputError: Ray is missing or of another version, or there is no cluster at this address.
    """

    def __init__(self, address: str | None = None, jobs: int | None = None) -> None:
        self._ray = import_ray()
        self._jobs = jobs
        self.num_processes = jobs or 0
        self._owns = not self._ray.is_initialized()
        if self._owns:
            self._connect(address or os.environ.get("RAY_ADDRESS"))
        elif address not in (None, "auto", joined := self._ray.get_runtime_context().gcs_address):
            raise InputError(f"--address {address}: this process has joined the cluster at {joined} already")

    def _connect(self, address: str | None) -> None:
        if address is not None and "://" in address:
            raise InputError(f"--address {address}: give HOST:PORT, and run this command on a machine of the cluster")
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address is None or address == "local":
            address = "local"
            options |= {"num_cpus": self._jobs, "object_store_memory": _OBJECT_STORE_BYTES, "include_dashboard": False}
        elif address != "auto":
            _check_answers(address)
        for left in range(_STARTS - 1, -1, -1):
            try:
                self._ray.init(address=address, **options)
                return
            except Exception as error:  # Ray has no class of its own for them
                text = " ".join(str(error).split())
                if address != "local":
                    is_version = "ersion mismatch" in text
                    advice = "install the same Ray and Python on all machines" if is_version else "cannot be joined"
                    raise InputError(f"--address {address}: {advice}: {text}") from None
                if "timed out during startup" not in text or not left:
                    raise EngineError(f"Ray could not be started here: {text}") from None
                self._ray.shutdown()

    def run(self, stage: Stage[P, R], pieces: Iterable[tuple[int, P]]) -> Iterator[tuple[int, R]]:
        """Yield number and result of every piece, as they are done."""
        run = _Run(self._ray, stage, iter(pieces))
        try:
            self.num_processes = self._jobs or self._room(stage.resources)
            yield from run.results(self.num_processes)
        finally:
            run.end()

    def _room(self, resources: Mapping[str, float]) -> int:
        """Return how many workers the cluster has room for."""
        has = self._ray.cluster_resources()
        room = min(int(has.get(name, 0) // amount) for name, amount in resources.items())
        if room == 0:
            raise InputError(
                f"the cluster has no room for a worker, which takes {dict(resources)}: give --jobs to wait"
            )
        return room

    def close(self) -> None:
        """End what was started here."""
        if self._owns:
            self._ray.shutdown()


def _check_answers(address: str) -> None:
    """Refuse an address where nothing listens, for which Ray itself would wait many minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(
            f"--address {address}: no Ray cluster answers there ({error}); give HOST:PORT as `ray start` shows it"
        ) from None


class _Run:
    """One stage over one set of pieces: actors, the calls they were given, and what must be done again."""

    def __init__(self, ray: Any, stage: Stage[Any, Any], source: Iterator[tuple[int, Any]]) -> None:
        self._ray, self._source = ray, source
        self._resources = dict(stage.resources)
        self._setup = flashi2v_data.__version__, os.getcwd(), ray.put(pickle.dumps(stage))
        self._actor = ray.remote(max_restarts=0, max_task_retries=0, **_placement(self._resources))(Actor)
        self._members: list[_Member] = []
        self._again: deque[_Call] = deque()
        self._pending: dict[Any, tuple[_Member, _Call | None]] = {}  # None: it begins
        self._num_stillborn = 0

    def results(self, jobs: int) -> Iterator[tuple[int, Any]]:
        """Run all pieces on so many actors."""
        self._members = [self._begin() for _ in range(jobs)]
        while self._has_work():
            self._give()
            for reference in self._wait():
                member, call = self._pending.pop(reference)
                try:
                    result = self._take(reference)
                except self._ray.exceptions.RayTaskError:
                    raise  # a bug in the stage, with its traceback
                except self._ray.exceptions.RayError as error:
                    self._replace(member, call, error)
                    continue
                if call is None:
                    member.is_ready, self._num_stillborn = True, 0
                else:
                    member.calls.remove(call)
                    yield call.number, result

    def end(self) -> None:
        """End all actors."""
        for member in self._members:
            self._ray.kill(member.handle)

    def _begin(self) -> _Member:
        member = _Member(self._actor.remote())
        self._pending[member.handle.begin.remote(*self._setup)] = member, None
        return member

    def _next(self) -> _Call | None:
        if self._again:
            return self._again.popleft()
        found = next(self._source, None)
        return None if found is None else _Call(*found)

    def _has_work(self) -> bool:
        """Tell whether any piece is not done; actors that begin when none is left are not waited for."""
        if any(member.calls for member in self._members):
            return True
        call = self._next()
        if call is not None:
            self._again.appendleft(call)
        return call is not None

    def _give(self) -> None:
        """Give pieces to actors that are ready, one to each before a second to any."""
        for depth in range(1, _DEPTH + 1):
            for member in self._members:
                if member.is_ready and len(member.calls) < depth:
                    call = self._next()
                    if call is None:
                        return
                    member.calls.append(call)
                    self._pending[member.handle.work.remote(call.piece)] = member, call

    def _wait(self) -> list[Any]:
        """Wait for any call to end; say what is waited for where no actor can be placed."""
        while True:
            done, _ = self._ray.wait([*self._pending], num_returns=1, timeout=_PATIENCE_SECONDS)
            if done:
                return list(done)
            if not any(member.is_ready for member in self._members):
                has = {name: self._ray.cluster_resources().get(name, 0) for name in self._resources}
                logger.warning("no actor has begun yet: each takes %s, the whole cluster has %s", self._resources, has)

    def _take(self, reference: Any) -> Any:
        """Return what a call returned.

        Raises:
            InputError, EngineError: what the worker raised.
            RayError: the actor died, or has a bug.
        """
        is_fine, result = self._ray.get(reference)
        if not is_fine:
            raise result
        return result

    def _replace(self, member: _Member, call: _Call | None, error: Exception) -> None:
        """Put another actor in the place of one that died; its pieces are done again."""
        why = one_line(str(error), 200)
        logger.warning("an actor has ended, and is replaced: %s", why)
        self._ray.kill(member.handle)
        for reference in [reference for reference, (owner, _) in self._pending.items() if owner is member]:
            del self._pending[reference]
        if call is None:
            self._num_stillborn += 1
            if self._num_stillborn == _MOST_STILLBORN:
                raise EngineError(
                    f"{_MOST_STILLBORN} actors in a row ended before they were ready: is flashi2v-data installed on "
                    f"all machines of the cluster? {why}"
                )
        else:
            member.calls[0].num_deaths += 1
            if member.calls[0].num_deaths == _MOST_DEATHS:
                number = member.calls[0].number
                raise EngineError(f"piece {number} ended its actor {_MOST_DEATHS} times: too little memory? {why}")
        self._again.extendleft(reversed(member.calls))
        self._members[self._members.index(member)] = self._begin()


def _placement(resources: Mapping[str, float]) -> dict[str, Any]:
    """Return resources as Ray takes them: two have parameters of their own."""
    named = {"CPU": "num_cpus", "GPU": "num_gpus"}
    others = {name: amount for name, amount in resources.items() if name not in named}
    own = {named[name]: amount for name, amount in resources.items() if name in named}
    return {"num_cpus": 0, **own, "resources": others}
