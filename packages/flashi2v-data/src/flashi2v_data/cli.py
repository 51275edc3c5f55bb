"""The command line `flashi2v-data`."""

import logging
import re
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import cyclopts
from cyclopts import App, Parameter

from flashi2v_data import __version__
from flashi2v_data.atomic import check_directory
from flashi2v_data.console import escaped, run
from flashi2v_data.curation.config import FilterConfig
from flashi2v_data.curation.probing import PROBE_TIMEOUT_SECONDS
from flashi2v_data.curation.report import FilterReport, check_plots
from flashi2v_data.engines.ledger import Shard
from flashi2v_data.engines.opening import EngineName, num_processors, open_engine
from flashi2v_data.engines.protocol import Engine
from flashi2v_data.errors import InputError
from flashi2v_data.records import printable
from flashi2v_data.settings import load_config
from flashi2v_data.workers import Limits

logger = logging.getLogger(__name__)

app = App(name="flashi2v-data", help="Video data for training FlashI2V.", version=__version__, help_format="plaintext")

Jobs = Annotated[int, Parameter(validator=cyclopts.validators.Number(gte=1, lte=1024))]
Positive = Annotated[int, Parameter(validator=cyclopts.validators.Number(gte=1))]


@Parameter(name="*")
@dataclass
class EngineOptions:
    """Where work is spread, and which share of it.

    Parameters
    ----------
    engine
        The processes of this machine, or a Ray cluster, which the extra [ray] brings.
    address
        HOST:PORT of a Ray cluster; by default RAY_ADDRESS, else a cluster that is started here.
    jobs
        Processes; by default one for each processor of the machine or the cluster.
    shard
        INDEX/COUNT, 0/40 to 39/40: do this share only, for Slurm arrays and queues; `flashi2v-data merge` unites them.
    """

    engine: EngineName = "local"
    address: str | None = None
    jobs: Jobs | None = None
    shard: str | None = None

    @property
    def is_spread(self) -> bool:
        """Whether there are pieces and a ledger, or one run on this machine."""
        if self.engine == "local" and self.shard is None:
            _refuse("without --engine ray there is no cluster", {"--address": self.address is not None})
        return self.engine != "local" or self.shard is not None

    def open(self) -> Engine:
        """Return the engine, which is to be closed.

        Raises:
            InputError: there is none.
        """
        return open_engine(self.engine, self.address, self.jobs)

    @property
    def share(self) -> Shard | None:
        """The share that this process does; None for all."""
        return None if self.shard is None else Shard.parse(self.shard)


ENGINE_OPTIONS = EngineOptions()


def main() -> NoReturn:
    """Run the command line."""
    run(app)


@app.command(name="filter")
def filter_command(
    *,
    filter_config: Annotated[Path, Parameter(name="--filter_config")],
    probe_timeout: Annotated[float, Parameter(validator=cyclopts.validators.Number(gt=0))] = PROBE_TIMEOUT_SECONDS,
    resume: Annotated[bool, Parameter(negative="")] = False,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    explain: str | None = None,
    plots: Annotated[bool, Parameter(negative="")] = False,
    options: EngineOptions = ENGINE_OPTIONS,
) -> None:
    """Filter meta JSON into an LMDB.

    Writes <save_path>/filtered_samples_<kept>.lmdb and, beside it, report.txt and report.json: how many clips each rule
    dropped, and which single setting would keep some of them.

    Example: flashi2v-data filter --filter_config filter_config.yaml --jobs 8

    Parameters
    ----------
    filter_config
        YAML with ann_txt_path, save_path and the limits.
    probe_timeout
        Seconds to wait for a video before it is skipped.
    resume
        Continue a run that was interrupted.
    dry_run
        Print the report, and write nothing.
    explain
        Show, rule by rule, what happens to the video at this path, and write nothing.
    plots
        Also draw the report as report.png.
    """
    from flashi2v_data.curation.filter import count_files, explain_path, filter_files
    from flashi2v_data.curation.spread import filter_spread

    if options.is_spread:
        given = {"--resume": resume, "--dry-run": dry_run, "--explain": explain is not None}
        _refuse("with --engine ray or --shard a run goes on by itself, and writes", given)
    if explain is not None:
        _refuse("--explain writes nothing", {"--dry-run": dry_run, "--resume": resume, "--plots": plots})
    if dry_run:
        _refuse("--dry-run writes nothing", {"--resume": resume, "--plots": plots})
    config = load_config(filter_config, FilterConfig)
    if explain is not None:
        for lines in explain_path(config, explain, probe_timeout=probe_timeout):
            print(escaped("\n".join(lines)))
        return
    if options.is_spread:
        with closing(options.open()) as engine:
            found = filter_spread(config, engine, probe_timeout=probe_timeout, shard=options.share, plots=plots)
        if found is None:
            print(escaped(f"shard {options.shard} is done; behind the last: flashi2v-data merge {config.save_path}"))
            return
        path, report = found
        print(escaped(f"{report.describe(config)}\nwritten to {path}"))
        _warn_of_none(report)
        return
    jobs = options.jobs or num_processors()
    if dry_run:
        report = count_files(config, jobs=jobs, probe_timeout=probe_timeout)
        print(report.describe(config))
        _warn_of_none(report)
        return
    path, report = filter_files(config, jobs=jobs, probe_timeout=probe_timeout, resume=resume, plots=plots)
    print(escaped(f"{report.describe(config)}\nwritten to {path}"))
    _warn_of_none(report)


@app.command(name="page")
def page_command(
    *,
    filter_config: Annotated[Path, Parameter(name="--filter_config")],
    output: Annotated[Path, Parameter(name=["--output", "-o"])] = Path("report.html"),
    examples: Positive = 12,
    limit: Positive | None = None,
    jobs: Jobs | None = None,
    timeout: Annotated[float, Parameter(validator=cyclopts.validators.Number(gt=0))] = PROBE_TIMEOUT_SECONDS,
) -> None:
    """Show what a filter drops and keeps, with pictures, as one HTML file to open in a browser or to send.

    Example: flashi2v-data page --filter_config filter_config.yaml -o report.html

    Parameters
    ----------
    filter_config
        YAML with ann_txt_path and the limits.
    output
        The file to write, or to replace; it ends in .html.
    examples
        Clips that are shown of each reason, the first of the set.
    limit
        Judge this many entries only.
    jobs
        Processes that open videos; by default one per processor.
    timeout
        Seconds to wait for a video.
    """
    from flashi2v_data.curation.page import write_page

    config = load_config(filter_config, FilterConfig)
    jobs = jobs or num_processors()
    found = write_page(config, output, num_examples=examples, most_entries=limit, jobs=jobs, timeout=timeout)
    print(escaped(f"{sum(found.counts.values()):,} clips judged, written to {output}"))


def _refuse(reason: str, options: Mapping[str, bool]) -> None:
    """Refuse the options that are given, as they would be ignored."""
    given = [option for option, is_given in options.items() if is_given]
    if given:
        raise InputError(f"{reason}: leave out {' and '.join(given)}")


def _warn_of_none(report: FilterReport) -> None:
    if report.kept == 0:
        logger.warning("none of %s clips were kept: the report says which limits dropped them", f"{report.total:,}")


@app.command(name="meta")
def meta_command(
    directory: Path,
    /,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"])] = Path("meta.json"),
) -> None:
    """Write the meta JSON of a folder of videos and images with captions beside them.

    The caption of clip.mp4 stands in clip.txt or clip.json beside it, or in a table: metadata.jsonl, CSV, or Parquet,
    with columns such as file_name and text. What has no caption, and every broken image, is listed and left out.

    Example: flashi2v-data meta videos -o meta.json

    Parameters
    ----------
    directory
        A folder; folders in it are looked through, too.
    output
        The file to write, or to replace; beside it, as .txt, the annotation file for ann_txt_path.
    """
    from flashi2v_data.curation.folder import read_folder, write_meta

    folder = read_folder(directory)
    annotation = write_meta(output, folder.entries)
    for path in folder.without_caption:
        print(escaped(f"no caption: {printable(path)}"))
    for reason in folder.unreadable:
        print(escaped(f"unreadable: {reason}"))
    left_out = f"{len(folder.without_caption)} without a caption and {len(folder.unreadable)} unreadable left out"
    print(
        escaped(f"{len(folder.entries)} clips in {output}, {left_out}; filter them with ann_txt_path: '{annotation}'")
    )


@app.command(name="score")
def score_command(
    meta: Path,
    /,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    signals: str = "",
    signal: Annotated[list[str] | None, Parameter(negative="")] = None,
    root: str | None = None,
    timeout: Annotated[float, Parameter(validator=cyclopts.validators.Number(gt=0))] = 300.0,
    memory_gib: Annotated[float, Parameter(validator=cyclopts.validators.Number(gt=0))] = 4.0,
    options: EngineOptions = ENGINE_OPTIONS,
) -> None:
    """Look at every clip, and add what signals say of it to its entry.

    Writes the meta JSON with further columns, which the filter's rules and training may use, an annotation file beside
    it (.txt, for ann_txt_path), the versions and licences of the signals (.signals.json), and the clips that could not
    be scored (.failed.jsonl). A run that was ended, however, goes on when the command is given again.

    Example: flashi2v-data score meta.json -o scored.json --signals motion,cuts --jobs 8

    Parameters
    ----------
    meta
        A meta JSON or a table; or an annotation file, .txt, that names several.
    output
        The meta JSON to write, which ends in .json.
    signals
        With commas between them: motion, cuts, transnet, text, still, duplicates; the README says what they measure.
    signal
        module:Class of one of your own; may be given several times.
    root
        That the paths of the meta JSON are relative to; by default the directory that it lies in.
    timeout
        Seconds for one clip, which is left out if it takes longer.
    memory_gib
        That a clip may take, which is left out if it takes more twice.
    """
    from flashi2v_data.curation.score import score

    limits = _limits(timeout, memory_gib)
    names = [name.strip() for name in signals.split(",") if name.strip()]
    share = options.share
    with closing(options.open()) as engine:
        report = score(meta, output, names, signal or [], engine, root=root, limits=limits, shard=share)
    if report is None:
        print(escaped(f"shard {options.shard} is done; behind the last: flashi2v-data merge {output}"))
    else:
        print(escaped(f"{report.describe()}\nwritten to {output}"))


def _limits(timeout: float, memory_gib: float) -> Limits:
    bound = int(memory_gib * 2**30)
    return Limits(timeout, bound // 2, most_bytes=bound)


@app.command(name="split")
def split_command(
    meta: Path,
    /,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    min_seconds: float = 2.0,
    max_seconds: float = 10.0,
    margin: Annotated[int, Parameter(validator=cyclopts.validators.Number(gte=0))] = 1,
    cuts: Literal["cuts", "transnet"] = "cuts",
    root: str | None = None,
    timeout: Annotated[float, Parameter(validator=cyclopts.validators.Number(gt=0))] = 3600.0,
    memory_gib: Annotated[float, Parameter(validator=cyclopts.validators.Number(gt=0))] = 4.0,
    options: EngineOptions = ENGINE_OPTIONS,
) -> None:
    """Split long videos at their cuts into clips of the lengths that are wanted; no video is written.

    Writes a meta JSON with an entry for every clip, whose `cut` names its frames, and an annotation file beside it
    (.txt, for ann_txt_path). A run that was ended, however, goes on when the command is given again.

    Example: flashi2v-data split films.json -o clips.json --min-seconds 3 --max-seconds 8 --jobs 8

    Parameters
    ----------
    meta
        A meta JSON or a table; or an annotation file, .txt, that names several. Of an entry with a `cut`, only that is
        split.
    output
        The meta JSON to write, which ends in .json.
    min_seconds
        What is shorter is left out.
    max_seconds
        A scene that is longer becomes equal parts.
    margin
        Frames that are left out on both sides of a cut.
    cuts
        What finds them: PySceneDetect ("cuts"), or TransNet V2 too, which also sees slow transitions ("transnet").
    root
        That the paths of the meta JSON are relative to; by default the directory that it lies in.
    timeout
        Seconds for one video, which is left out if it takes longer.
    memory_gib
        That a video may take, which is left out if it takes more twice.
    """
    from flashi2v_data.curation.split import Lengths, split

    lengths, share = Lengths(min_seconds, max_seconds, margin), options.share
    limits = _limits(timeout, memory_gib)
    with closing(options.open()) as engine:
        report = split(meta, output, engine, detector=cuts, lengths=lengths, root=root, limits=limits, shard=share)
    if report is None:
        print(escaped(f"shard {options.shard} is done; behind the last: flashi2v-data merge {output}"))
    else:
        print(escaped(f"{report.describe()}\nwritten to {output}"))


@app.command(name="merge")
def merge_command(
    output: Path,
    /,
    *,
    signal: Annotated[list[str] | None, Parameter(negative="")] = None,
    plots: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Unite the shards of a command, when all are done.

    Example: flashi2v-data merge scored.json

    Parameters
    ----------
    output
        What the command was to write: --output of score or split, save_path of filter.
    signal
        Those of your own that the command was given.
    plots
        Also draw a filter's report as report.png.
    """
    from flashi2v_data.curation.merge import merge

    print(escaped(merge(output, signal or [], plots=plots)))


@app.command(name="export")
def export_command(
    path: Path,
    /,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
) -> None:
    """Write an LMDB, or a folder of them, as a Parquet table.

    Example: flashi2v-data export data/filtered_samples_1200.lmdb -o clips.parquet

    Parameters
    ----------
    path
        An LMDB written by `flashi2v-data filter` or by the public code, or a folder of them.
    output
        A file that ends in .parquet, which may take the place of a meta JSON.
    """
    from flashi2v_data.store.reader import open_store
    from flashi2v_data.store.table import export_parquet

    store = open_store(path)
    export_parquet(store, output)
    print(escaped(f"{len(store)} clips in {output}"))


@app.command(name="inspect")
def inspect_command(
    path: Path,
    /,
    *,
    limit: Positive | None = None,
    plots: Path | None = None,
    open_videos: Annotated[bool, Parameter(negative="")] = False,
    jobs: Jobs | None = None,
    probe_timeout: Annotated[float | None, Parameter(validator=cyclopts.validators.Number(gt=0))] = None,
) -> None:
    """Show what an LMDB, or a folder of them, holds, and which videos are missing.

    Example: flashi2v-data inspect data/filtered_samples_1200.lmdb --limit 1000 --plots plots

    Parameters
    ----------
    path
        An LMDB written by `flashi2v-data filter` or by the public code, or a folder of them.
    limit
        Look at this many records only.
    plots
        Write histograms into this directory.
    open_videos
        Open every video, and list all that are missing, unreadable, or not what their records say.
    jobs
        Processes that open videos; by default one per processor.
    probe_timeout
        Seconds to wait for a video before it is skipped; by default 60.
    """
    from flashi2v_data.curation.inspection import describe_store, inspect_store, plot_store
    from flashi2v_data.curation.probing import Prober
    from flashi2v_data.store.reader import open_store

    if not open_videos:
        given = {"--jobs": jobs is not None, "--probe-timeout": probe_timeout is not None}
        _refuse("without --open-videos no video is opened", given)
    if plots is not None:
        check_plots()
        check_directory(plots, "--plots")
    store = open_store(path)
    with closing(Prober(jobs or num_processors(), probe_timeout or PROBE_TIMEOUT_SECONDS)) as prober:
        found = inspect_store(store, limit=limit, prober=prober if open_videos else None)
    charts = [] if plots is None else plot_store(found, plots)
    print(escaped(describe_store(store, found)))
    for chart in charts:
        print(escaped(f"plot       {chart}"))


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
    captions: Literal["looks", "motion"] = "looks",
    pairs: Literal["all", "seen", "unseen"] = "all",
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
    captions
        Of one flat shape, saying how it looks and moves ("looks"); or of one to three shapes and drawings before any
        background, saying how one of them moves, and mostly no more ("motion").
    pairs
        Of shape and colour. "seen" leaves out one colour of every shape: train on these, and try the others, "unseen".
        With captions of the motion, some drawings, backgrounds, words and orders of words are left out, too.
    """
    from flashi2v_data.shapes.scenes import write_shapes
    from flashi2v_data.shapes.stories import write_stories

    match = re.fullmatch(r"(\d+)x(\d+)", size)
    if match is None:
        raise InputError(f"--size: expected HEIGHTxWIDTH such as 64x96, got {size!r}")
    write = write_stories if captions == "motion" else write_shapes
    write(directory, num, seed, int(match[1]), int(match[2]), frames, fps, pairs)
    print(escaped(f"{num} videos in {directory}; filter them with ann_txt_path: '{directory / 'videos.txt'}'"))


if __name__ == "__main__":
    main()
