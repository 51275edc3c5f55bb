"""What a filter did: how many clips fell to each rule, and how near they were."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashi2v_data.atomic import atomic_file
from flashi2v_data.captions.cleaning import CaptionCount
from flashi2v_data.curation.config import FilterConfig
from flashi2v_data.curation.rules import OF_SIGNALS, REASONS, NearMiss, Rejection
from flashi2v_data.errors import InputError

# Groups of near misses (of one size, say) that are told apart; beyond twice as many the farthest are forgotten.
MAX_GROUPS = 512
# In the text; the JSON file holds all groups that are told apart.
NUM_SHOWN = 5


@dataclass
class FilterReport:
    """How many clips came in, were kept, and were rejected for which reason.

    Attributes:
        irregular: kept clips of videos whose frames come in uneven steps, where those were looked at.
        near_misses: clips that a single changed setting would keep; of too many groups the nearest (see MAX_GROUPS).
        captions: of the clips that are kept; of too many unknown words the most frequent.
    """

    total: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    near_misses: Counter[NearMiss] = field(default_factory=Counter)
    captions: CaptionCount = field(default_factory=lambda: CaptionCount(0))
    irregular: int = 0

    def count(self, num_kept: int, rejections: Iterable[Rejection] = ()) -> None:
        """Count clips that are kept, and others that are rejected."""
        self.kept += num_kept
        self.total += num_kept
        for (reason, miss), number in Counter(rejections).items():
            self.total += number
            self.dropped[reason] += number
            if miss is not None:
                self.near_misses[miss] += number

    def add(self, other: "FilterReport", config: FilterConfig) -> None:
        """Count what another report counted; the config tells near from far when there are too many groups."""
        self.total += other.total
        self.kept += other.kept
        self.irregular += other.irregular
        for reason, count in other.dropped.items():
            self.dropped[reason] += count
        self.captions.merge(other.captions)
        if len(self.captions.words) > 2 * MAX_GROUPS:
            self.captions.words = Counter(dict(self.captions.words.most_common(MAX_GROUPS)))
        self.near_misses.update(other.near_misses)
        if len(self.near_misses) > 2 * MAX_GROUPS:
            ranked = sorted(self.near_misses.items(), key=lambda item: (_shortfall(item[0], config), item[0]))
            self.near_misses = Counter(dict(ranked[:MAX_GROUPS]))

    def to_json(self) -> dict[str, Any]:
        """Return plain values, from which `from_json` makes the same report again."""
        return {
            "total": self.total,
            "kept": self.kept,
            "irregular": self.irregular,
            "dropped": dict(self.dropped),
            "captions": {**vars(self.captions), "words": dict(self.captions.words), "first": dict(self.captions.first)},
            "near_misses": [{**miss._asdict(), "count": count} for miss, count in sorted(self.near_misses.items())],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "FilterReport":
        """Return the report that `to_json` was called on."""
        misses = {
            NearMiss(miss["setting"], miss["value"], miss["clips"]): miss["count"] for miss in values["near_misses"]
        }
        captions = CaptionCount(**{**values["captions"], "words": Counter(values["captions"]["words"])})
        return cls(
            values["total"], values["kept"], dict(values["dropped"]), Counter(misses), captions, values["irregular"]
        )

    def describe(self, config: FilterConfig) -> str:
        """Lay out the counts as a table, and the near misses as sentences."""
        rows = [("total", self.total, ""), ("kept", self.kept, "")]
        if self.irregular:
            rows.append(("irregular", self.irregular, "of these: the frame rate varies, frames are chosen by time"))
        rows += [
            (reason, self.dropped[reason], text)
            for reason, text in REASONS.items()
            if self.dropped[reason] or reason not in OF_SIGNALS
        ]
        lines = [f"{name:16}{count:>12,}  {text}".rstrip() for name, count, text in rows]
        return "\n".join([*lines, *_sentences(self.near_misses, config), *self.captions.lines().values()])


def _shortfall(miss: NearMiss, config: FilterConfig) -> float:
    limit = float(getattr(config, miss.setting))
    difference = abs(miss.value - limit)
    return difference / abs(limit) if limit else difference


def _sentences(misses: Counter[NearMiss], config: FilterConfig) -> Iterator[str]:
    for setting in dict.fromkeys(miss.setting for miss in sorted(misses)):
        of_setting = [(miss, count) for miss, count in misses.most_common() if miss.setting == setting]
        # Of many groups the most numerous, nearest first.
        for miss, count in sorted(of_setting[:NUM_SHOWN], key=lambda item: _shortfall(item[0], config)):
            which = f" of {miss.clips}" if miss.clips else ""
            short = _shortfall(miss, config)
            by = f"{100 * short:.2g} %" if getattr(config, setting) else f"{short:.2g}"
            cropped = f" after cropping to {config.sample_height}:{config.sample_width}" * (setting == "min_hxw")
            who, them = _clips(count, "", which)
            yield f"{who} {setting} by {by}{cropped}; {miss.value:.10g} would keep {them}"
        more = sum(count for _, count in of_setting[NUM_SHOWN:])
        if more:
            yield f"{_clips(more, 'further ')[0]} {setting} alone, see report.json"


def _clips(count: int, kind: str, which: str = "") -> tuple[str, str]:
    """Return the beginning of a sentence about clips that miss something, and the word that refers to them later."""
    return (f"1 {kind}clip{which} misses", "it") if count == 1 else (f"{count} {kind}clips{which} miss", "them")


def write_report(report: FilterReport, config: FilterConfig, directory: str | os.PathLike[str], plots: bool) -> None:
    """Write report.json and report.txt, and report.png where `plots` asks for it.

    Raises:
        InputError: matplotlib is not installed.
    """
    directory = Path(directory)
    with atomic_file(directory / "report.json") as file:
        file.write_text(json.dumps(report.to_json(), indent=2) + "\n")
    with atomic_file(directory / "report.txt") as file:
        file.write_text(report.describe(config) + "\n")
    if plots:
        _plot(report, config, directory / "report.png")


def check_plots() -> None:
    """Refuse plots that could not be drawn, before any work is done for them.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401 (only whether it is there)
    except ImportError:
        raise InputError("plots need matplotlib: pip install 'flashi2v-data[plots]'") from None


def _plot(report: FilterReport, config: FilterConfig, path: Path) -> None:
    """Draw the counts, and how many clips each setting would win if it were changed by so much."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(12, 5), layout="constrained")
    counts, near = figure.subplots(1, 2)
    bars = [("kept", report.kept), *((reason, count) for reason, count in report.dropped.items() if count)]
    counts.barh([name for name, _ in bars[::-1]], [count for _, count in bars[::-1]])
    counts.set(xlabel="clips", title=f"{report.total:,} clips")
    counts.xaxis.set_major_locator(MaxNLocator(integer=True))
    for setting in dict.fromkeys(miss.setting for miss in sorted(report.near_misses)):
        steps = sorted(
            (100 * _shortfall(miss, config), count)
            for miss, count in report.near_misses.items()
            if miss.setting == setting
        )
        won, total = [0], 0
        for _, count in steps:
            total += count
            won.append(total)
        near.step([0, *(short for short, _ in steps)], won, where="post", label=setting)
    near.set(xlabel="setting changed by, %", ylabel="clips kept in addition", title="near misses")
    near.yaxis.set_major_locator(MaxNLocator(integer=True))
    if report.near_misses:
        near.legend()
    else:
        near.set_axis_off()
        near.text(0.5, 0.5, "no clip that a single changed setting would keep", ha="center", transform=near.transAxes)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=120)
