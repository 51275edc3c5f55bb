"""The filter over an engine: pieces judged anywhere, their outcomes in a ledger, the store written from it in order."""

import gc
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

import flashi2v_data
from flashi2v_data.curation.config import FilterConfig
from flashi2v_data.curation.filter import BAR, cache_of, checked, purpose_of, write_outcomes
from flashi2v_data.curation.judge import Judge
from flashi2v_data.curation.meta import Piece, read_pieces
from flashi2v_data.curation.probing import Prober, Probing
from flashi2v_data.curation.report import FilterReport
from flashi2v_data.curation.stream import JudgePiece, Outcome, outcomes_in_order, settled
from flashi2v_data.engines import Engine, Ledger, Shard, Shards, run_pieces
from flashi2v_data.errors import InputError
from flashi2v_data.records import Annotation, read_annotations
from flashi2v_data.settings import validate
from flashi2v_data.store.codec import ValueCodec


@dataclass(frozen=True)
class FilterStage:
    """Judges pieces, and asks videos what their entries leave out; the probe cache is read, and not added to."""

    config: FilterConfig
    probe_timeout: float

    @property
    def resources(self) -> Mapping[str, float]:
        """A processor each."""
        return {"CPU": 1}

    def start(self, jobs: int) -> "_Judging":
        """Begin, with so many processes that open videos."""
        return _Judging(self.config, Prober(jobs, self.probe_timeout, cache_of(self.config), readonly=True))


class _Judging:
    def __init__(self, config: FilterConfig, prober: Prober) -> None:
        self._judge, self._pack, self._prober = Judge(config), ValueCodec(config.compression).pack, prober
        self._judge_piece = JudgePiece(self._judge, self._pack)

    def submit(self, piece: Piece) -> tuple[Outcome | None, list[Probing]]:
        outcome = self._judge_piece(piece)
        gc.enable()  # which it disables, as it is made for processes that do nothing else
        return outcome, [] if outcome is None else [self._prober.submit(clip.path) for _, clip, _ in outcome.incomplete]

    def result(self, submitted: tuple[Outcome | None, list[Probing]]) -> dict[str, Any] | None:
        outcome, probings = submitted
        if outcome is None:
            return None
        whole = settled(outcome, probings, self._judge, self._pack, self._prober)
        return {"kept": whole.kept, "report": whole.report.to_json(), "num_parsed": whole.num_parsed}

    def close(self) -> None:
        self._prober.close()


def filter_spread(
    config: FilterConfig, engine: Engine, *, probe_timeout: float, shard: Shard | None = None, plots: bool = False
) -> tuple[Path, FilterReport] | None:
    """Write what `filter.filter_files` writes, by an engine, or do a shard of it; a run that was ended goes on.

    Args:
        config: where the meta JSON lies, where to write, the limits.
        engine: spreads the pieces of the meta JSON.
        probe_timeout: seconds for one video.
        shard: of the pieces; None for all.
        plots: draw report.png.

    Returns:
        The store and the report, or None where other shards are to come.

    Raises:
        InputError: as `filter_files`; or another run writes the ledger.
        StorageError, EngineError: the disk or the engine fails.
    """
    annotations = checked(config, plots)
    stage, num_bytes = FilterStage(config, probe_timeout), sum(Path(each.meta).stat().st_size for each in annotations)
    purpose = {
        "command": "filter",
        "version of flashi2v-data": flashi2v_data.__version__,
        "probe_cache_path": config.probe_cache_path,
        **purpose_of(config, annotations),
    }
    with (
        Ledger(ledger_of(Path(config.save_path)), purpose, shard or Shard(0, 1)) as ledger,
        tqdm(total=num_bytes, desc="filter", disable=None, bar_format=BAR) as bar,
    ):
        run_pieces(engine, stage, _pieces(annotations, bar), ledger)
    if shard is not None and shard.count > 1:
        return None
    return unite(Shards(ledger_of(Path(config.save_path))), plots=plots)


def ledger_of(save_path: Path) -> Path:
    """Return where the ledger of a filter lies."""
    return save_path / "filter.ledger"


def _pieces(annotations: list[Annotation], bar: tqdm) -> Iterator[Piece]:
    bytes_before = 0
    for annotation in annotations:
        for piece in read_pieces(annotation):
            yield piece
            bar.update(bytes_before + piece.end - bar.n)
        bytes_before += piece.end


def unite(shards: Shards, *, plots: bool = False) -> tuple[Path, FilterReport]:
    """Write the store and the report from a ledger, and remove the ledger.

    Raises:
        InputError: the meta JSON has changed, or is broken.
        StorageError: the disk is full.
    """
    purpose = shards.purpose
    settings = {key: value for key, value in purpose.items() if key in FilterConfig.model_fields}
    config = validate(settings, FilterConfig, shards.directory)
    annotations = read_annotations(config.ann_txt_path)
    if any(purpose.get(key) != value for key, value in purpose_of(config, annotations).items()):
        raise InputError(f"{shards.directory}: its meta JSON has changed since: remove the ledger, and filter again")
    judge, pack, results = Judge(config), ValueCodec(config.compression).pack, iter(shards)

    def take(_: Annotation, pieces: Iterator[Piece]) -> Iterator[tuple[Piece, Outcome | None]]:
        for piece in pieces:
            result = next(results)
            yield piece, None if result is None else _outcome(result)

    def outcomes(report: FilterReport, num_done: int) -> Iterator[Outcome]:
        for _ in range(num_done):
            next(results)
        with closing(Prober(1, cache=cache_of(config), readonly=True)) as prober:
            for outcome in outcomes_in_order(annotations, take, judge, pack, prober, num_done=num_done):
                report.add(outcome.report, config)
                yield outcome

    path, report = write_outcomes(config, annotations, outcomes, resume=True, plots=plots)
    shards.remove()
    return path, report


def _outcome(result: dict[str, Any]) -> Outcome:
    return Outcome(result["kept"], report=FilterReport.from_json(result["report"]), num_parsed=result["num_parsed"])
