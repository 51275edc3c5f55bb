"""The command `flashi2v-data page`: what a filter drops, to look at, as one HTML file that needs no other.

The entries are judged again, as the filter judges them, until each reason has its examples; what a filter wrote is not
needed. Pictures are read in processes that may die over them, and stand within the file.
"""

import base64
import html
import io
import json
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flashi2v_data.atomic import atomic_file
from flashi2v_data.curation.config import FilterConfig
from flashi2v_data.curation.filter import cache_of
from flashi2v_data.curation.judge import Judge, read_entry
from flashi2v_data.curation.meta import read_entries
from flashi2v_data.curation.probing import Prober
from flashi2v_data.curation.rules import REASONS, Rejection
from flashi2v_data.errors import DecodeError, InputError
from flashi2v_data.records import SIGNAL_COLUMNS, Entry, printable, read_annotations
from flashi2v_data.signals import Clip, Frames
from flashi2v_data.workers import Limits, WorkerLost, WorkerPool

KEPT = "kept"
_FITS = "fits all limits"
_FRAMES = Frames(most=3, size=120)
_JPEG_QUALITY = 70
_MEMORY_BYTES = 2 << 30
# What is said of a clip beside its picture.
_SHOWN = ("resolution", "fps", "num_frames", "cut", "motion", *SIGNAL_COLUMNS)


@dataclass
class Verdicts:
    """How many entries met each fate, and some of them.

    Attributes:
        counts: by reason, of the entries that were judged; "kept" is one.
        examples: the first entries of each.
        is_whole: whether all entries were judged.
    """

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[Any]] = field(default_factory=dict)
    is_whole: bool = True


def write_page(
    config: FilterConfig, output: Path, *, num_examples: int, most_entries: int | None, jobs: int, timeout: float
) -> Verdicts:
    """Judge entries and write the page; return what it shows.

    Args:
        config: of the filter.
        output: the file, .html.
        num_examples: of each reason.
        most_entries: judge no more; None for all.
        jobs: processes that open videos.
        timeout: seconds for one video.

    Raises:
        InputError: the name does not end in .html; a meta JSON is broken.
    """
    if output.suffix != ".html":
        raise InputError(f"--output {output}: a page ends in .html")
    with closing(Prober(jobs, timeout, cache_of(config), readonly=True)) as prober:
        found = _judge(config, prober, num_examples, most_entries)
    with closing(WorkerPool(film, jobs, Limits(timeout, most_bytes=_MEMORY_BYTES))) as pool:
        entries = [entry for examples in found.examples.values() for entry in examples]
        tasks = {id(entry): pool.submit(entry) for entry in entries if isinstance(entry, dict) and "path" in entry}
        pictures: dict[int, str] = {}
        for key, task in tasks.items():
            try:
                pictures[key] = (
                    f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(pool.result(task)).decode()}">'
                )
            except (DecodeError, WorkerLost) as error:
                pictures[key] = f"<em>{html.escape(getattr(error, 'reason', str(error)))}</em>"
    with atomic_file(output) as temporary:
        temporary.write_text("\n".join(_page(config, found, pictures)), "utf-8", errors="backslashreplace")
    return found


def film(entry: dict[str, Any]) -> bytes:
    """Return the first, middle and last frame of a clip beside each other, as JPEG.

    Raises:
        DecodeError: the clip cannot be read.
    """
    try:
        with Clip(entry, [_FRAMES]) as clip:
            strip = np.concatenate([*clip.frames(_FRAMES)], axis=1)
    except (TypeError, ValueError, KeyError) as error:  # of an entry that fits no schema
        raise DecodeError(str(entry.get("path")), f"cannot be opened as the entry says: {error}") from None
    buffer = io.BytesIO()
    Image.fromarray(strip).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()


def _judge(config: FilterConfig, prober: Prober, num_examples: int, most_entries: int | None) -> Verdicts:
    judge, found = Judge(config), Verdicts()
    for number, entry in enumerate(_entries(config)):
        if number == most_entries:
            found.is_whole = False
            break
        reason = _reason(judge, prober, entry)
        found.counts[reason] = found.counts.get(reason, 0) + 1
        examples = found.examples.setdefault(reason, [])
        if len(examples) < num_examples:
            examples.append(entry)
    return found


def _entries(config: FilterConfig) -> Iterator[Any]:
    for annotation in read_annotations(config.ann_txt_path):
        yield from read_entries(annotation)


def _reason(judge: Judge, prober: Prober, entry: Any) -> str:
    clip = read_entry(entry)
    verdict = judge(clip) if isinstance(clip, Entry) else clip
    if verdict == "incomplete":
        assert isinstance(clip, Entry)
        try:
            verdict = judge(clip, prober.result(prober.submit(clip.path)))
        except DecodeError:
            return "unreadable"
    return verdict.reason if isinstance(verdict, Rejection) else KEPT


def _page(config: FilterConfig, found: Verdicts, pictures: dict[int, str]) -> Iterator[str]:
    total = sum(found.counts.values())
    kept = found.counts.get(KEPT, 0)
    title = f"{kept:,} of {total:,} clips kept"
    yield f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    yield f"<h1>{title}</h1>"
    yield f"<p>{html.escape(printable(config.ann_txt_path))}" + (
        ".</p>" if found.is_whole else "; others were not judged.</p>"
    )
    reasons = [*(reason for reason in REASONS if found.counts.get(reason)), *([KEPT] if kept else [])]
    yield "<table>"
    for reason in reasons:
        count = found.counts[reason]
        meaning = html.escape(REASONS.get(reason, _FITS))
        bar = f'<td><div class="bar" style="width:{200 * count / total:.0f}px"></div>'
        yield f'<tr><td><a href="#{reason}">{reason}</a><td class="number">{count:,}{bar}<td>{meaning}'
    yield "</table>"
    for reason in reasons:
        meaning = html.escape(REASONS.get(reason, _FITS))
        yield f'<h2 id="{reason}">{reason}: {meaning}</h2><div class="clips">'
        for entry in found.examples[reason]:
            yield f"<figure>{pictures.get(id(entry), '')}<figcaption>{_caption(entry)}</figcaption></figure>"
        yield "</div>"
    yield from _failed(config)


def _caption(entry: Any) -> str:
    if not isinstance(entry, dict):
        return html.escape(json.dumps(entry)[:200])
    name = html.escape(printable(os.path.basename(str(entry.get("path", "")))))
    said = {key: entry[key] for key in _SHOWN if key in entry}
    caption = entry.get("cap", "")
    told = html.escape(str(caption[0] if isinstance(caption, list) and caption else caption)[:200])
    return f"<b>{name}</b> {told}<br><small>{html.escape(json.dumps(said)[1:-1])}</small>"


def _failed(config: FilterConfig) -> Iterator[str]:
    """Show what `score` and `split` could not read, of the meta JSON that they wrote."""
    for annotation in read_annotations(config.ann_txt_path):
        path = Path(annotation.meta).with_suffix(".failed.jsonl")
        if not path.is_file():
            continue
        yield f"<h2>Could not be read for {html.escape(printable(annotation.meta))}</h2><table>"
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                fault = json.loads(line)
                entry = fault["entry"]
                name = printable(str(entry.get("path", ""))) if isinstance(entry, dict) else str(entry)[:100]
                yield f"<tr><td>{html.escape(fault['kind'])}<td>{html.escape(name)}<td>{html.escape(fault['reason'])}"
        yield "</table>"


_STYLE = (
    "body{font:15px/1.4 system-ui,sans-serif;margin:2em;color:#222;background:#fff}"
    "td{padding:.1em .8em .1em 0;vertical-align:top}.number{text-align:right}.bar{background:#48a;height:1em}"
    ".clips{display:flex;flex-wrap:wrap;gap:12px}figure{margin:0;max-width:480px}img{max-width:100%;display:block}"
    "figcaption{font-size:13px;overflow-wrap:anywhere}small{color:#666}"
)
