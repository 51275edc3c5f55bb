"""The real commands on NPUs, or where the CPU stands for them, and what they asked NPUs for.

Where the CPU stands for NPUs, commands are forked from a process that has imported everything, several processes as
torchrun's. On NPUs each is started afresh: CANN may start threads when it is loaded, and a fork has none of them.
"""

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import forked

EMULATED = "STUB_CANN_DEVICES" in os.environ
RECORD = "STUB_CANN_RECORD"
RECORDS = "NPU_RECORDS"  # a directory that keeps what NPUs were asked for: operators.py makes a table of it
PAGE = Path(__file__).parents[2] / "docs/ascend-operators.md"


class Runs:
    """Runs commands; each leaves what its processes asked NPUs for in `records` under a name."""

    def __init__(self, records: Path) -> None:
        self.records = records

    def __call__(self, name: str, command: str, *words: object, processes: int = 1, **environment: str) -> None:
        """Run a command; raise an AssertionError with what it said where it fails."""
        codes, errors = self.try_(name, command, *words, processes=processes, **environment)
        assert codes == [0] * len(codes), errors
        self._check(name)

    def try_(
        self, name: str, command: str, *words: object, processes: int = 1, **environment: str
    ) -> tuple[list[int], str]:
        """Run a command; return the exit codes of its processes, and what they wrote to standard error."""
        record = self.records / name
        record.mkdir(parents=True, exist_ok=True)
        given = os.environ | environment | {RECORD: str(record)}
        if not EMULATED:
            launch = ["torchrun", "--nproc-per-node", str(processes), "--no-python"] if processes > 1 else []
            line = [*launch, command, *map(str, words)]
            finished = subprocess.run(line, env=given, capture_output=True, text=True, errors="replace")
            return [finished.returncode], finished.stderr
        ranks = [forked.Command(command, *words, env=given | part) for part in torchrun(processes)]
        codes = [rank.poll() for rank in ranks]
        while None in codes:
            if any(codes):  # as torchrun does: the others would wait for it
                for rank in ranks:
                    rank.kill()
            time.sleep(0.05)
            codes = [rank.poll() for rank in ranks]
        return codes, "\n".join(rank.errors() for rank in ranks)

    def call(self, name: str, function: Callable[..., object], *arguments: object) -> None:
        """Call a module's function in a process of its own, on NPUs in this one; the rank, 0, goes before the rest."""
        record = self.records / name
        record.mkdir(parents=True, exist_ok=True)
        if EMULATED:
            forked.call("flashi2v-infer", 1, function, *arguments, env=os.environ | {RECORD: str(record)})
            self._check(name)
        else:
            function(0, *arguments)

    def _check(self, name: str) -> None:
        """Hold what NPUs were asked for to the documentation's table, unless that is what is made."""
        if EMULATED and RECORDS not in os.environ:
            unknown = sorted(self.used(name).keys() - documented())
            assert not unknown, f"{name} asks NPUs for {', '.join(unknown)}: see tests/ascend/operators.py"

    def used(self, name: str) -> dict[str, set[str]]:
        """Return the operators that NPUs were asked for under a name, and the dtypes of their tensors."""
        return read_records(self.records / name)


def torchrun(processes: int) -> list[dict[str, str]]:
    """Return what torchrun tells each process; of one, nothing."""
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    ranks = [{"RANK": rank, "LOCAL_RANK": rank} | shared for rank in range(processes)]
    return [{name: str(value) for name, value in rank.items()} for rank in ranks]


def read_records(directory: Path) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for path in directory.iterdir():
        for operator, dtypes in json.loads(path.read_text()).items():
            found.setdefault(operator, set()).update(dtypes)
    return found


def documented() -> set[str]:
    """Return the operators of the documentation's table."""
    rows = [line.split("`") for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    return {row[1] for row in rows}
