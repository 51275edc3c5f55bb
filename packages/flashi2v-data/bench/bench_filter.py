"""Filter and LMDB of 200,000 complete entries against a straightforward loader, each in a process of its own, in turn.

The loader does what the public code does: json.load, rules entry by entry with the frames counted by numpy, pickle, one
big transaction. About a third of the clips are kept, as in the reference's own set (1.86 of 5.98 million).
"""

import json
import math
import os
import pickle
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NUM_ENTRIES, NUM_ROUNDS = 200_000, 5
SETTINGS = {
    "sample_height": 480,
    "sample_width": 832,
    "sample_num_frames": 49,
    "min_hxw": 921600,
    "train_fps": 16,
    "max_h_div_w_ratio": 1.2,
    "min_h_div_w_ratio": 0.4,
}
TEXT = (
    "a the video shows woman man walking along beach while waves roll in behind them camera pans slowly sunset light "
    "warm soft grass dog plays with red ball near house tall trees blue sky street city people cars night rain"
)


def entries(num: int) -> Iterator[dict[str, Any]]:
    """Yield complete entries with the sizes, rates, lengths and captions of a crawl, the same in every process."""
    draw, words = random.Random(0), TEXT.split()
    sizes = [(1080, 1920)] * 45 + [(720, 1280)] * 32 + [(2160, 3840)] * 8 + [(1920, 1080)] * 8 + [(480, 854)] * 7
    for number in range(num):
        height, width = draw.choice(sizes)
        fps = draw.choice([24, 25, 29.97, 30, 30, 50, 60, 23.976])
        num_frames = round(draw.uniform(2, 18) * fps)
        begin = draw.randrange(2000)
        yield {
            "path": f"part_{number // 1000:04d}/{draw.getrandbits(64):016x}.mp4",
            "cap": " ".join(draw.choices(words, k=draw.randint(60, 140))),
            "resolution": {"height": height, "width": width},
            "fps": fps,
            "num_frames": num_frames,
            "cut": [begin, begin + num_frames],
        }


def straightforward(directory: Path) -> int:
    """Filter as one would write it down."""
    import lmdb
    import numpy as np
    from tqdm import tqdm

    limits = SETTINGS
    samples = []
    for line in (directory / "videos.txt").read_text().splitlines():
        root, meta = line.split(",")
        with open(meta) as file:
            part = json.load(file)
        for sample in part:
            sample["path"] = os.path.join(root, sample["path"])
        samples += part
    kept = []
    for sample in tqdm(samples, desc="filter", disable=None):
        if sample.get("cap") is None or sample.get("resolution") is None:
            continue
        height, width = sample["resolution"].get("height"), sample["resolution"].get("width")
        if height is None or width is None or height <= 0 or width <= 0:
            continue
        ratio, target = height / width, limits["sample_height"] / limits["sample_width"]
        if not limits["min_h_div_w_ratio"] <= ratio <= limits["max_h_div_w_ratio"]:
            continue
        if height * width < math.ceil(limits["min_hxw"] * max(ratio / target, target / ratio)):
            continue
        fps = sample.get("fps", 24)
        if sample["num_frames"] > 5.0 * (limits["sample_num_frames"] * fps / limits["train_fps"]):
            continue
        interval = 1.0 if abs(fps - limits["train_fps"]) < 0.1 else fps / limits["train_fps"]
        if interval < 1.0 or not 0.0 <= sample.get("motion", 0.0) <= 1.0:
            continue
        start = sample.get("cut", [0])[0]
        sample["start_frame_idx"] = start
        if len(np.arange(start, start + sample["num_frames"], interval).astype(int)) < limits["sample_num_frames"]:
            continue
        kept.append(sample)
    environment = lmdb.open(str(directory / "plain.lmdb"), map_size=1 << 40)
    with environment.begin(write=True) as transaction:
        for number, sample in enumerate(tqdm(kept, desc="write", disable=None)):
            transaction.put(f"{number:012d}".encode(), pickle.dumps(sample))
    environment.close()
    return len(kept)


def this_package(directory: Path) -> int:
    """Filter by the command's own function, with its default number of processes."""
    from flashi2v_data.curation.config import FilterConfig
    from flashi2v_data.curation.filter import filter_files

    paths = {"ann_txt_path": str(directory / "videos.txt"), "save_path": str(directory / "lmdb")}
    jobs = len(os.sched_getaffinity(0))
    return filter_files(FilterConfig(**paths, **SETTINGS), jobs=jobs, probe_timeout=60)[1].kept


def measure(name: str, directory: Path) -> None:
    """Run one of them in this process and print (seconds, MB resident of it and its largest child, clips kept)."""
    run = {"straightforward": straightforward, "this package": this_package}[name]
    import lmdb  # noqa: F401
    import numpy  # noqa: F401
    import tqdm  # noqa: F401

    if name == "this package":
        import flashi2v_data.curation.filter  # noqa: F401
    begin = time.perf_counter()
    kept = run(directory)
    seconds = time.perf_counter() - begin
    own, child = (resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    jobs = len(os.sched_getaffinity(0))
    print(json.dumps([seconds, own + jobs * child, kept]))


def main() -> None:
    if len(sys.argv) > 1:
        measure(sys.argv[1], Path(sys.argv[2]))
        return
    with tempfile.TemporaryDirectory() as holder:
        meta = Path(holder) / "meta.json"
        with meta.open("w") as file:  # not at once: a child would inherit this process's peak of memory
            for number, entry in enumerate(entries(NUM_ENTRIES)):
                file.write((", " if number else "[") + json.dumps(entry))
            file.write("]")
        best: dict[str, list[float]] = {}
        for number in range(NUM_ROUNDS):
            for name in ("straightforward", "this package"):
                directory = Path(holder) / f"{name} {number}"
                directory.mkdir()
                (directory / "videos.txt").write_text(f"/data,{meta}")
                command = [sys.executable, __file__, name, str(directory)]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                best[name] = min(best.get(name, [math.inf]), json.loads(output))
        print(f"{NUM_ENTRIES:,} entries, {meta.stat().st_size / 1e6:.0f} MB, best of {NUM_ROUNDS}")
    first = best["straightforward"]
    for name, (seconds, megabytes, kept) in best.items():
        print(
            f"{name:<16} {seconds:6.2f} s, {first[0] / seconds:4.1f}x, {megabytes:5.0f} MB resident, {kept:,.0f} kept"
        )


if __name__ == "__main__":
    main()
