"""The command `flashi2v-data filter`: files in, a store and its report out."""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flashi2v_data.atomic import check_directory
from flashi2v_data.captions.cleaning import CaptionCount
from flashi2v_data.curation import meta
from flashi2v_data.curation.config import FilterConfig
from flashi2v_data.curation.judge import Judge
from flashi2v_data.curation.meta import BrokenMetaError, read_entries, read_provenance, state_of
from flashi2v_data.curation.probing import Prober
from flashi2v_data.curation.report import FilterReport, check_plots, write_report
from flashi2v_data.curation.stream import FileFilter, Outcome
from flashi2v_data.errors import InputError
from flashi2v_data.records import Annotation, printable, read_annotations
from flashi2v_data.store.environments import storage
from flashi2v_data.store.writer import StoreWriter
from flashi2v_data.video.probe import VideoInfo


def filter_files(
    config: FilterConfig, *, jobs: int, probe_timeout: float, resume: bool = False, plots: bool = False
) -> tuple[Path, FilterReport]:
    """Write <save_path>/filtered_samples_<kept>.lmdb, and the report beside it.

    Until it is whole, the store is <save_path>/unfinished; a run that was ended is continued from there.

    Args:
        config: where the meta JSON lies, where to write, the limits.
        jobs: processes that parse and judge entries, and as many that read what entries leave out from videos.
        probe_timeout: seconds for one video.
        resume: continue an unfinished run.
        plots: draw report.png.

    Raises:
        InputError: the meta JSON or the annotation file is broken; save_path holds a store or an unfinished one.
        StorageError: the disk is full.
    """
    annotations = checked(config, plots)

    def outcomes(report: FilterReport, num_done: int) -> Iterator[Outcome]:
        return _outcomes(config, annotations, report, jobs, probe_timeout, num_done)

    return write_outcomes(config, annotations, outcomes, resume=resume, plots=plots)


def checked(config: FilterConfig, plots: bool) -> list[Annotation]:
    """Return the meta JSON, if the filter may begin.

    Raises:
        InputError: as `filter_files`.
    """
    annotations = read_annotations(config.ann_txt_path)
    directory = Path(config.save_path)
    for key, place in (("save_path", directory), ("probe_cache_path", cache_of(config))):
        check_directory(place, f"{key} of the filter's settings")
    earlier = sorted(directory.glob("filtered_samples_*.lmdb"))
    if earlier:
        # Training may name the folder, and would then see the clips of both.
        raise InputError(f"save_path holds {earlier[0]} already: remove it, or choose another save_path")
    if plots:
        check_plots()
    return annotations


def write_outcomes(
    config: FilterConfig,
    annotations: list[Annotation],
    outcomes: Callable[[FilterReport, int], Iterator[Outcome]],
    *,
    resume: bool,
    plots: bool,
) -> tuple[Path, FilterReport]:
    """Write outcomes as they come; `outcomes` adds to a report, behind so many pieces of an earlier run."""
    directory = Path(config.save_path)
    with StoreWriter(directory / "unfinished", purpose_of(config, annotations), resume=resume) as writer:
        captions = CaptionCount(config.tokenizer_max_length or 0)
        begun = writer.state or {"place": 0, "report": FilterReport(captions=captions).to_json()}
        report = FilterReport.from_json(begun["report"])
        try:
            for outcome in outcomes(report, begun["place"]):
                writer.append(outcome.kept, functools.partial(_state, outcome.num_pieces, report))
        except BrokenMetaError:
            writer.discard()  # once the file is fixed, this part fits no more
            raise
        except KeyboardInterrupt:
            raise KeyboardInterrupt("continue with --resume") from None
        path = directory / f"filtered_samples_{writer.count}.lmdb"
        with storage(directory, "free some space and continue with --resume"):
            write_report(report, config, directory, plots)  # first: a store that is there is whole, report and all
        writer.finish(
            path, config.compression, config.model_dump(), report=report.to_json(), **read_provenance(annotations)
        )
    return path, report


def _state(num_pieces: int, report: FilterReport) -> dict[str, Any]:
    return {"place": num_pieces, "report": report.to_json()}


def count_files(config: FilterConfig, *, jobs: int, probe_timeout: float) -> FilterReport:
    """Return what `filter_files` would report, without writing anything.

    Raises:
        InputError: the meta JSON or the annotation file is broken.
    """
    report = FilterReport(captions=CaptionCount(config.tokenizer_max_length or 0))
    annotations = read_annotations(config.ann_txt_path)
    for _ in _outcomes(config, annotations, report, jobs, probe_timeout, num_done=0, readonly=True):
        pass
    return report


def explain_path(config: FilterConfig, path: str, *, probe_timeout: float) -> Iterator[list[str]]:
    """Yield, for every clip of a video, the lines that tell its fate rule by rule.

    Args:
        config: the limits.
        path: as it stands in the meta JSON, or joined to its root.
        probe_timeout: seconds for the video.

    Raises:
        InputError: no entry has this path.
    """
    judge, num_found = Judge(config), 0

    def probe(path: str) -> VideoInfo:
        return prober.result(prober.submit(path))

    with closing(Prober(1, probe_timeout, cache_of(config), readonly=True)) as prober:
        for annotation in read_annotations(config.ann_txt_path):
            for entry in read_entries(annotation):
                if isinstance(entry, dict) and _is_at(entry.get("path"), path, annotation.root):
                    num_found += 1
                    yield [f"{printable(entry['path'])}, in {annotation.meta}", *judge.explain(entry, probe)]
    if not num_found:
        raise InputError(f"--explain: no entry has the path {printable(path)}; give it as the meta JSON does")


def _is_at(entry_path: object, path: str, root: str) -> bool:
    if not isinstance(entry_path, str):
        return False
    places = (path, os.path.join(root, path))
    return entry_path in places or os.path.abspath(entry_path) in map(os.path.abspath, places)


def purpose_of(config: FilterConfig, annotations: list[Annotation]) -> dict[str, Any]:
    """Return what a part must have been begun with to be continued: settings, pieces, the files as they are now."""
    return {
        **config.model_dump(exclude={"probe_cache_path"}),
        "size of pieces": meta.PIECE_BYTES,
        "meta JSON": state_of(annotations),
    }


def cache_of(config: FilterConfig) -> Path:
    """Return where the probe cache lies."""
    return Path(config.probe_cache_path or os.path.join(config.save_path, "probe_cache"))


def _outcomes(
    config: FilterConfig,
    annotations: list[Annotation],
    report: FilterReport,
    jobs: int,
    probe_timeout: float,
    num_done: int,
    readonly: bool = False,
) -> Iterator[Outcome]:
    """Filter, count and show progress: by bytes, as the entries are not counted ahead."""
    num_bytes = sum(os.path.getsize(annotation.meta) for annotation in annotations)
    with (
        closing(Prober(jobs, probe_timeout, cache_of(config), readonly=readonly)) as prober,
        closing(FileFilter(annotations, config, prober, jobs)) as files,
        tqdm(total=num_bytes, desc="filter", disable=None, bar_format=BAR) as bar,
    ):
        for outcome in files.outcomes(num_done):
            report.add(outcome.report, config)
            bar.update(outcome.num_bytes - bar.n)
            if not bar.disable:
                seconds = bar.format_dict["elapsed"] or 1
                bar.set_postfix_str(
                    f"{report.total:,} clips, {report.kept:,} kept, {report.total / seconds:,.0f} clips/s",
                    refresh=False,
                )
            yield outcome


BAR = "{desc}: {percentage:3.0f}%|{bar}| {postfix} [{elapsed}<{remaining}]"
