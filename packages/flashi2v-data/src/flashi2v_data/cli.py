"""The command line `flashi2v-data`."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Annotated, NoReturn

import cyclopts
from cyclopts import App, Parameter
from tqdm import tqdm

from flashi2v_data import __version__
from flashi2v_data.atomic import atomic_file
from flashi2v_data.config import FilterConfig, load_config
from flashi2v_data.console import run
from flashi2v_data.errors import InputError
from flashi2v_data.filter import FilterReport, filter_records
from flashi2v_data.records import read_annotations, read_entries
from flashi2v_data.store import open_store, write_store

app = App(name="flashi2v-data", help="Video data for training FlashI2V.", version=__version__, help_format="plaintext")

Positive = Annotated[int, Parameter(validator=cyclopts.validators.Number(gte=1))]


def main() -> NoReturn:
    """Run the command line."""
    run(app)


@app.command(name="filter")
def filter_command(*, filter_config: Annotated[Path, Parameter(name="--filter_config")], jobs: Positive = 1) -> None:
    """Filter meta JSON into an LMDB.

    Writes <save_path>/filtered_samples_<kept>.lmdb and, beside it, report.txt and report.json with a count for every
    reason why clips were dropped.

    Example: flashi2v-data filter --filter_config filter_config.yaml --jobs 8

    Parameters
    ----------
    filter_config
        YAML with ann_txt_path, save_path and the limits.
    jobs
        Processes that read what entries leave out from the videos.
    """
    config = load_config(filter_config, FilterConfig)
    annotations = read_annotations(config.ann_txt_path)
    directory = Path(config.save_path)
    earlier = sorted(directory.glob("filtered_samples_*.lmdb"))
    if earlier:
        # Training may name the folder, and would then see the clips of both.
        raise InputError(f"save_path holds {earlier[0]} already: remove it, or choose another save_path")

    report = FilterReport()
    entries = (entry for annotation in annotations for entry in read_entries(annotation))
    with tqdm(entries, desc="filter", unit="clip", disable=None) as progress:
        records = filter_records(progress, config, report, jobs=jobs)
        path = write_store(directory / "filtered_samples_{count}.lmdb", records, config.model_dump())
    with atomic_file(directory / "report.json") as file:
        file.write_text(json.dumps(dataclasses.asdict(report), indent=2) + "\n")
    with atomic_file(directory / "report.txt") as file:
        file.write_text(f"{report}\n")
    print(f"{report}\nwritten to {path}")


@app.command(name="inspect")
def inspect_command(
    path: Path,
    /,
    *,
    limit: Positive | None = None,
    plots: Path | None = None,
    open_videos: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Show what an LMDB, or a folder of them, holds, and which videos are missing.

    Example: flashi2v-data inspect data/filtered_samples_1200.lmdb --limit 1000 --plots plots

    Parameters
    ----------
    path
        An LMDB written by `flashi2v-data filter`, or a folder of them.
    limit
        Look at so many records only.
    plots
        Write histograms into this directory.
    open_videos
        Open every video and report those that cannot be read.
    """
    from flashi2v_data.inspection import describe_store, inspect_store, plot_store

    store = open_store(path)
    found = inspect_store(store, limit=limit, open_videos=open_videos)
    # Before any text: a missing matplotlib should not hide below a page of it.
    charts = [] if plots is None else plot_store(found, plots)
    print(describe_store(store, found))
    for chart in charts:
        print(f"plot       {chart}")


@app.command(name="shapes")
def shapes_command(
    directory: Path,
    /,
    *,
    num: Positive = 100,
    seed: int = 0,
    size: str = "64x96",
    frames: Positive = 17,
    fps: Positive = 16,
) -> None:
    """Write a set of moving-shapes videos with exact captions, to try everything on.

    Example: flashi2v-data shapes shapes --num 500 --seed 1 --size 64x96 --frames 17

    Parameters
    ----------
    directory
        A new directory; it gets the videos, videos.json, videos.txt (for ann_txt_path) and scenes.json.
    num
        How many videos.
    seed
        Another seed gives other videos.
    size
        HEIGHTxWIDTH in pixels.
    frames
        Frames of each video.
    fps
        Frames per second.
    """
    from flashi2v_data.shapes import write_shapes

    match = re.fullmatch(r"(\d+)x(\d+)", size)
    if match is None:
        raise InputError(f"--size: expected HEIGHTxWIDTH such as 64x96, got {size!r}")
    write_shapes(directory, num, seed, int(match[1]), int(match[2]), frames, fps)
    print(f"{num} videos in {directory}; filter them with ann_txt_path: '{directory / 'videos.txt'}'")


if __name__ == "__main__":
    main()
