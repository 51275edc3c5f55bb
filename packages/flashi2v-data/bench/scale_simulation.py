"""How long 20 million clips take on 40 machines, from what one clip costs on one core.

    python packages/flashi2v-data/bench/scale_simulation.py
    python packages/flashi2v-data/bench/scale_simulation.py --machines 8 --clips 1000000 --failures-per-day 4

Pieces are dealt to the slots of machines as the engines deal them: in order, one to each free slot, and a lost one
again. Machines are drawn slower or faster than the mean, pieces too; machines fail, lose what they had in hand and come
back. What a clip costs was measured (RESULTS.md says where); the rest is assumed, and every assumption is an option.
"""

import argparse
import heapq
import math
from collections import deque
from dataclasses import dataclass

import numpy as np

GB, MB = 1e9, 1e6
HOUR = 3600.0


@dataclass(frozen=True)
class Stage:
    """What one clip of 8 seconds costs.

    Attributes:
        name: the command.
        piece: clips that are dealt, and lost, at once.
        core_seconds: of one core; or of one device, where `on_devices`.
        read_bytes: from the shared disk.
        written_bytes: to the shared disk, into the ledger.
        merge_seconds: of the one process that unites the pieces at the end.
        finish_bytes: memory which that process keeps of each clip.
        on_devices: a slot is a device, not a core.
    """

    name: str
    piece: int
    core_seconds: float
    read_bytes: float
    written_bytes: float
    merge_seconds: float
    finish_bytes: float = 0.0
    on_devices: bool = False


@dataclass(frozen=True)
class Cluster:
    """Machines, what they share, and what goes wrong.

    Attributes:
        machines: so many, all alike but for their speed.
        cores: of each.
        devices: accelerators of each.
        link: bytes a second of one machine's network.
        disk: bytes a second of the shared disk, over all machines.
        straggling: standard deviation of the logarithm of a machine's time for the same work.
        spread: the same of a piece's, beyond its mean.
        failures: of one machine in a day.
        repair: seconds until a failed machine takes work again.
        driver: seconds that the driver has to do for each piece.
    """

    machines: int
    cores: int
    devices: int
    link: float
    disk: float
    straggling: float
    spread: float
    failures: float
    repair: float
    driver: float


@dataclass(frozen=True)
class Outcome:
    """Of one stage: hours until the last piece and of the merge, and what happened meanwhile."""

    hours: float
    ideal_hours: float
    merge_hours: float
    lost: int
    failures: int
    tail_hours: float
    bound: str
    driver_share: float


def simulate(stage: Stage, cluster: Cluster, clips: int, rng: np.random.Generator) -> Outcome:
    """Deal all pieces of a stage; time is simulated, nothing is run."""
    slots = cluster.devices if stage.on_devices else cluster.cores
    speeds = np.exp(rng.normal(0, cluster.straggling, cluster.machines))
    # A slot's share of the links and of the disk when all are busy; reading goes on while the clip before is looked at.
    bandwidth = min(cluster.link, cluster.disk / cluster.machines) / slots
    transfer = (stage.read_bytes + stage.written_bytes) / bandwidth
    per_clip = max(stage.core_seconds, transfer)
    pieces = math.ceil(clips / stage.piece)
    durations = stage.piece * per_clip * np.exp(rng.normal(-(cluster.spread**2) / 2, cluster.spread, pieces))

    waiting: deque[int] = deque(range(pieces))
    returned: list[tuple[float, int]] = []  # pieces that were lost, and when that was known
    next_failure = rng.exponential(24 * HOUR / cluster.failures, cluster.machines) if cluster.failures else None
    free = [(0.0, machine, slot) for machine in range(cluster.machines) for slot in range(slots)]
    heapq.heapify(free)
    idle: list[tuple[float, int, int]] = []  # slots for which nothing is left, unless a piece is lost
    finished = np.zeros(pieces)
    lost, failed, done = 0, set(), 0
    while done < pieces:
        time, machine, slot = heapq.heappop(free)
        if returned and (returned[0][0] <= time or not waiting):
            known, number = heapq.heappop(returned)
            time = max(time, known)
        elif waiting:
            number = waiting.popleft()
        else:
            idle.append((time, machine, slot))
            continue
        end = time + float(durations[number] * speeds[machine])
        if next_failure is not None:
            while next_failure[machine] + cluster.repair <= time:  # it failed while this slot had nothing to lose
                next_failure[machine] += cluster.repair + rng.exponential(24 * HOUR / cluster.failures)
            if next_failure[machine] < end:
                failure = float(next_failure[machine])
                failed.add((machine, failure))
                lost += failure > time
                heapq.heappush(returned, (max(time, failure), number))
                heapq.heappush(free, (failure + cluster.repair, machine, slot))
                if idle:
                    since, *place = idle.pop()
                    heapq.heappush(free, (max(since, failure), *place))
                continue
        finished[number] = end
        done += 1
        heapq.heappush(free, (end, machine, slot))
    driver = pieces * cluster.driver
    last = max(float(finished.max()), driver)
    ideal = clips * stage.core_seconds / (cluster.machines * slots)
    return Outcome(
        hours=last / HOUR,
        ideal_hours=ideal / HOUR,
        merge_hours=clips * stage.merge_seconds / HOUR,
        lost=lost,
        failures=len(failed),
        tail_hours=(last - float(np.quantile(finished, 0.99))) / HOUR,
        bound=_bound(stage, transfer, driver >= last),
        driver_share=driver / last,
    )


def _bound(stage: Stage, transfer: float, by_driver: bool) -> str:
    if by_driver:
        return "the driver"
    if transfer > stage.core_seconds:
        return "the network"
    return "devices" if stage.on_devices else "cores"


# Of a clip of 8 s, 1280x720 at 24 frames a second and 4 Mbit/s. Seconds of a core were measured: opening took 0.039,
# and RESULTS.md has motion, cuts, text, still and duplicates, 1.32 of decoding and 1.64 of their own. Those of a device
# are counted: 102 TFLOP of the VAE for 49x480x832 and 6 of the text encoder, at 30 % of a 910B's 313 TFLOP/s. Bytes are
# those of the file, and of latents and text states in bf16. Uniting a score is nearly all search for near-duplicates:
# 2,300 sorts, of 0.14 s for a million hashes and 1.6 s for eight, so about 4.2 s for 20 million.
STAGES = (
    Stage("filter", 1500, 0.039, 0.2 * MB, 600, 7e-6),
    Stage("score", 16, 2.96, 4 * MB, 400, 5e-4, finish_bytes=250),
    Stage("encode", 64, 1.15, 4 * MB, 3.5 * MB, 2e-5, on_devices=True),
)


def table(clips: int, cluster: Cluster, seed: int) -> str:
    """Return what becomes of every stage, as Markdown."""
    rows: dict[str, list[str]] = {}
    for stage in STAGES:
        found = simulate(stage, cluster, clips, np.random.default_rng(seed))
        read, written = clips * stage.read_bytes, clips * stage.written_bytes
        cells = {
            "hours": f"{found.hours:.1f}",
            "of them for the last 1 % of pieces": f"{found.tail_hours:.2f}",
            "hours if nothing failed and all were alike": f"{found.ideal_hours:.1f}",
            "bound by": found.bound,
            "machines that failed": str(found.failures),
            "pieces done again": f"{found.lost} of {math.ceil(clips / stage.piece):,}",
            "driver busy": f"{found.driver_share:.1%}",
            "hours of uniting, one process": f"{found.merge_hours:.2f}",
            "its memory, GB": f"{clips * stage.finish_bytes / GB:.1f}",
            "read, TB": f"{read / 1e12:.1f}",
            "written, TB": f"{written / 1e12:.2f}",
            "of the shared disk, GB/s": f"{(read + written) / GB / (found.hours * HOUR):.1f}",
        }
        for name, cell in cells.items():
            rows.setdefault(name, []).append(cell)
    lines = ["| | " + " | ".join(stage.name for stage in STAGES) + " |", "|---|" + "---|" * len(STAGES)]
    return "\n".join(lines + [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=20_000_000, help="default: %(default)s")
    parser.add_argument("--machines", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--cores", type=int, default=64, help="of each machine (default: %(default)s)")
    parser.add_argument("--devices", type=int, default=8, help="accelerators of each machine (default: %(default)s)")
    parser.add_argument("--link", type=float, default=25, help="Gbit/s of each machine (default: %(default)s)")
    parser.add_argument("--disk", type=float, default=20, help="GB/s of the shared disk (default: %(default)s)")
    parser.add_argument(
        "--straggling", type=float, default=0.1, help="log-normal spread of machines' speeds (default: %(default)s)"
    )
    parser.add_argument("--spread", type=float, default=0.3, help="the same of pieces (default: %(default)s)")
    parser.add_argument(
        "--failures-per-day", type=float, default=1, help="of each machine, 0 for none (default: %(default)s)"
    )
    parser.add_argument("--repair", type=float, default=30, help="minutes of a failure (default: %(default)s)")
    parser.add_argument(
        "--driver", type=float, default=10, help="milliseconds that the driver takes for a piece (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    options = parser.parse_args()
    cluster = Cluster(
        machines=options.machines,
        cores=options.cores,
        devices=options.devices,
        link=options.link * 1e9 / 8,
        disk=options.disk * GB,
        straggling=options.straggling,
        spread=options.spread,
        failures=options.failures_per_day,
        repair=options.repair * 60,
        driver=options.driver / 1e3,
    )
    print(table(options.clips, cluster, options.seed))


if __name__ == "__main__":
    main()
