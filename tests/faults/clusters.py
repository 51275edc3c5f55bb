"""Kill parts of a Ray cluster of three nodes while it scores clips: nothing may be lost, doubled, or differ.

`nox -s clusters` runs this. Every try scores the same clips, and kills one thing at a random moment: an actor, the
driver, a raylet, or all processes of a node. A driver that ended is started again. Then the output must be that of one
process, byte for byte, and of the pieces that the ledger held when the driver ended none may have been done again.
"""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import lmdb
import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
import ray_nodes

ROOT = Path(__file__).parents[2]
KINDS = ("actor", "driver", "raylet", "node")
PATIENCE_SECONDS = 900.0
NOTES = Path("seen")


def command(*options: str) -> list[str]:
    signal_ = ["--signal", "engine_signals:Mean", "--signal", "engine_signals:Twins"]
    return [sys.executable, "-m", "flashi2v_data.cli", "score", "meta.json", *signal_, *options]


def outputs(stem: str) -> list[bytes]:
    return [Path(f"{stem}{suffix}").read_bytes() for suffix in (".json", ".failed.jsonl", ".signals.json")]


def write_clips(num: int) -> None:
    """Write a few videos, and a meta JSON that names them many times, once one that is not there."""
    from flashi2v_data.shapes.scenes import write_shapes

    write_shapes("shapes", 12, 7, 32, 48, 13)
    videos = [entry["path"] for entry in json.loads(Path("shapes/videos.json").read_text())]
    entries: list[dict[str, Any]] = [
        {"path": f"shapes/{videos[number % len(videos)]}", "number": number, "note": str(NOTES)}
        for number in range(num)
    ]
    entries[num // 2]["path"] = "nowhere.mp4"
    Path("meta.json").write_text(json.dumps(entries))


def done_pieces() -> set[int]:
    """Return the pieces that the ledger holds."""
    path = Path("scored.json.ledger/shard_00000_of_00001.lmdb")
    if not (path / "data.mdb").exists():
        return set()
    with lmdb.open(str(path), readonly=True, lock=False) as environment, environment.begin() as transaction:
        return {int(key) for key, _ in transaction.cursor() if key.isdigit()}


def raylet_of(node: Any) -> psutil.Process:
    return psutil.Process(node.all_processes["raylet"][0].process.pid)


def strike(kind: str, draw: random.Random, cluster: Any, driver: subprocess.Popen[bytes]) -> str:
    """Kill one thing; return what it was."""
    others = [node for node in cluster.list_all_nodes() if node is not cluster.head_node]
    if kind == "driver":
        driver.kill()
        return f"driver {driver.pid}"
    if kind == "actor":
        actors = [
            child
            for node in cluster.list_all_nodes()
            for child in raylet_of(node).children()
            if child.cmdline()[:1] and child.cmdline()[0].startswith("ray::Actor")
        ]
        if not actors:
            return "no actor was there"
        victim = draw.choice(actors)
        victim.kill()
        return f"actor {victim.pid}"
    node = draw.choice(others)
    victims = [raylet_of(node)] if kind == "raylet" else [raylet_of(node), *raylet_of(node).children(recursive=True)]
    for victim in victims:
        with_pid = victim.pid
        try:
            os.kill(with_pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    cluster.remove_node(node, allow_graceful=False)
    return f"{kind}, {len(victims)} processes"


def attempt(
    number: int, draw: random.Random, cluster: Any, num_clips: int, whole: list[bytes]
) -> tuple[str, list[str]]:
    """Score once, with a strike; return its kind and what was wrong after it."""
    kind = KINDS[number % len(KINDS)]
    for path in (*Path().glob("scored.*"), NOTES):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    over = command("-o", "scored.json", "--engine", "ray", "--address", cluster.address, "--jobs", "3")
    driver = subprocess.Popen(over, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    moment = draw.randrange(1, num_clips)
    struck, faults = "", []
    while driver.poll() is None and not struck:
        if NOTES.exists() and NOTES.read_bytes().count(b"\n") >= moment:
            struck = strike(kind, draw, cluster, driver)
        time.sleep(0.02)
    _, errors = driver.communicate(timeout=PATIENCE_SECONDS)
    if driver.returncode != 0:
        if kind == "actor" or driver.returncode == 2:
            faults.append(f"the driver ended: {errors[-300:]!r}")
        done = done_pieces()
        NOTES.unlink(missing_ok=True)
        again = subprocess.run(over, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=PATIENCE_SECONDS)
        if again.returncode != 0:
            faults.append(f"the second start failed: {again.stderr[-300:]!r}")
        from flashi2v_data.curation.score import PIECE_ENTRIES

        seen = {int(line) // PIECE_ENTRIES for line in (NOTES.read_text().split() if NOTES.exists() else ())}
        if seen & done:
            faults.append(f"pieces {sorted(seen & done)} were done twice")
    if not faults and outputs("scored") != whole:
        faults.append("the output differs from that of one process")
    while len(cluster.list_all_nodes()) < 3:
        ray_nodes.add_node(cluster)
    note = "" if struck else " (it had ended before)"
    print(f"{number:4} {kind:7} after {moment:4} clips: {struck}{note}; {'; '.join(faults) or 'equal'}", flush=True)
    return kind, faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=30, help="tries")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clips", type=int, default=400)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    tests = ROOT / "packages/flashi2v-data/tests"
    os.environ["PYTHONPATH"] = f"{tests}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    import ray

    draw, tries, faulty = random.Random(options.seed), Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory() as holder:
        os.chdir(holder)
        write_clips(options.clips)
        subprocess.run(command("-o", "whole.json", "--jobs", "1"), check=True, stdout=subprocess.DEVNULL)
        whole = outputs("whole")
        with ray_nodes.cluster(num_cpus=1, num_nodes=3) as cluster:
            for number in range(options.num):
                kind, faults = attempt(number, draw, cluster, options.clips, whole)
                tries[kind] += 1
                faulty[kind] += bool(faults)
        os.chdir(ROOT)
    print(f"ray {ray.__version__}, Python {platform.python_version()}, {options.clips} clips, seed {options.seed}")
    print("\n".join(f"| {kind} | {tries[kind]} | {faulty[kind]} |" for kind in KINDS))
    sys.exit(1 if faulty.total() else 0)


if __name__ == "__main__":
    main()
