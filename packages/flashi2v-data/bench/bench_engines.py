"""A Ray cluster of this machine against its processes alone, the same number of them; memory over 200,000 records.

Seconds count from the first result to the last, so that neither start counts. Each run is a process of its own:
local, ray, ray, local.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import psutil

JOBS, PIECE = 2, 16
# Entries, and milliseconds of work on each: what opening a small clip takes, and next to nothing.
SETS = {"5 ms each": (4000, 5.0), "nothing each": (200_000, 0.0)}


class Work:
    """Computes for so many milliseconds, and returns two columns."""

    def __init__(self, milliseconds: float) -> None:
        self._seconds = milliseconds / 1000

    def __call__(self, entry: dict[str, Any]) -> dict[str, Any]:
        end = time.process_time() + self._seconds
        while time.process_time() < end:
            pass
        return {"score": 0.5, "number": entry["number"]}


def pieces(num: int) -> Iterator[list[dict[str, Any]]]:
    for begin in range(0, num, PIECE):
        yield [
            {"path": f"videos/{number:012d}.mp4", "cap": "a caption of some words " * 8, "number": number}
            for number in range(begin, begin + PIECE)
        ]


def actors() -> list[float]:
    """Return megabytes of each actor of the cluster that this process has started."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "".join(child.cmdline()[:1]).startswith("ray::Actor"):
                found.append(child.memory_info().rss / 1e6)
    return found


def measure(engine_name: Literal["local", "ray"], name: str) -> dict[str, Any]:
    """Run one set in this process; return seconds, and memory at each quarter."""
    from bench_engines import Work  # not of __main__, which other processes could not import

    from flashi2v_data.engines import EachEntry, Ledger, open_engine, run_pieces
    from flashi2v_data.workers import Limits

    num, milliseconds = SETS[name]
    quarter, times, driver, others = max(1, num // PIECE // 4), [], [], []

    def on_done(number: int, result: Any) -> None:
        times.append(time.perf_counter())
        if len(times) % quarter == 0:
            driver.append(round(psutil.Process().memory_info().rss / 1e6))
            others.append(max(map(round, actors()), default=0))

    stage = EachEntry(Work(milliseconds), Limits(300, 1 << 30, most_bytes=2 << 30))
    with (
        tempfile.TemporaryDirectory() as holder,
        closing(open_engine(engine_name, jobs=JOBS)) as engine,
        Ledger(Path(holder) / "ledger", {"bench": name}) as ledger,
    ):
        run_pieces(engine, stage, pieces(num), ledger, on_done=on_done)
    return {"seconds": times[-1] - times[0], "driver": driver[:4], "actor": others[:4]}


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(*sys.argv[1:])))
        return
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    for name, (num, _) in SETS.items():
        best: dict[str, float] = {}
        for engine in ("local", "ray", "ray", "local"):
            command = [sys.executable, __file__, engine, name]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
            found = json.loads(output.splitlines()[-1])
            best[engine] = min(best.get(engine, float("inf")), found["seconds"])
            rate = num / found["seconds"]
            print(
                f"{name:<13} {engine:<6} {num:,} entries, {JOBS} processes: {found['seconds']:7.2f} s, "
                f"{rate:8,.0f} a second, MB of driver {found['driver']}, of an actor {found['actor']}",
                flush=True,
            )
        print(f"{name:<13} ray against local: {best['ray'] / best['local']:.2f}x the seconds")


if __name__ == "__main__":
    main()
