"""`flashi2v-data score`: the same columns from one process, several, or shards; what a clip costs that does harm."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import lmdb
import pytest

from flashi2v_data.cli import app
from flashi2v_data.curation.meta import read_entries
from flashi2v_data.curation.score import PIECE_ENTRIES
from flashi2v_data.engines import Throughput, throughput
from flashi2v_data.errors import InputError
from flashi2v_data.locking import holder
from flashi2v_data.records import Annotation

HERE = Path(__file__).parent
NUM_CLIPS = 5 * PIECE_ENTRIES + 3


def run(*arguments: str) -> None:
    app(["score", *map(str, arguments)], exit_on_error=False, print_error=False, result_action="return_value")


def merge(*arguments: str) -> None:
    app(["merge", *map(str, arguments)], exit_on_error=False, print_error=False, result_action="return_value")


@pytest.fixture
def meta(shapes: Path, tmp_path: Path, monkeypatch) -> Path:
    """A meta JSON of many clips, some of which cannot be read; the working directory has signals."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("PYTHONPATH", f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    videos = [entry["path"] for entry in json.loads((shapes / "videos.json").read_text())]
    entries = [
        {"path": str(shapes / videos[number * number % len(videos)]), "cap": f"Nr. {number} ä", "number": number}
        for number in range(NUM_CLIPS)
    ]
    entries[7]["path"] = "nowhere.mp4"
    entries[30]["cut"] = [3, 8]
    entries[31]["cut"] = "all"
    path = tmp_path / "meta.json"
    path.write_text(json.dumps(entries))
    return path


SIGNALS = ("--signal", "engine_signals:Mean", "--signal", "engine_signals:Twins")


def outputs(name: str) -> tuple[bytes, ...]:
    stem = name.removesuffix(".json")
    return tuple(Path(f"{stem}{suffix}").read_bytes() for suffix in (".json", ".signals.json", ".failed.jsonl"))


def test_a_run_says_where_its_time_went_and_what_bounded_it(meta, caplog, monkeypatch):
    caplog.set_level("INFO", "flashi2v_data")
    run(meta, "-o", "scored.json", *SIGNALS, "--jobs", "2")
    assert re.search(rf"score: {NUM_CLIPS} clips in .* by 2 processes: \d+% of their time computing", caplog.text)


def test_throughput_names_the_bound_and_the_ceiling(monkeypatch):
    monkeypatch.setattr(throughput.time, "monotonic", lambda: 110.0)
    measured = Throughput(_begun=100.0)
    measured.add(3, working=12.0, waiting=4.0)
    assert measured.describe(2) == (
        "3 clips in 10.0 s, 0.3 a second by 2 processes: 60% of their time computing, 20% waiting for files or a "
        "processor, 20% without work; bound by processors: 80% of the 0.4 a second that this allows"
    )
    measured.add(0, working=0.0, waiting=12.0)
    assert "bound by files or a processor: 100% of the 0.3 a second" in measured.describe(2)


def test_entries_get_columns_and_what_cannot_be_scored_is_named(meta, capsys):
    run(meta, "-o", "scored.json", *SIGNALS, "--jobs", "2")
    assert capsys.readouterr().out.split() == (
        f"total {NUM_CLIPS} scored {NUM_CLIPS - 2} unreadable 2 written to scored.json".split()
    )
    scored = json.loads(Path("scored.json").read_text())
    entries = [entry for entry in json.loads(meta.read_text()) if entry["number"] not in (7, 31)]
    added = {"mean", "length", "twin_of"}
    assert [{key: entry[key] for key in entry.keys() - added} for entry in scored] == entries
    assert {entry["length"] for entry in scored} == {13, 5}
    assert all(0 < entry["mean"] < 255 for entry in scored)
    looks = {}
    for place, entry in enumerate(scored):  # each clip but the first of its look knows that one
        look = entry["path"], tuple(entry.get("cut", ()))
        assert entry.get("twin_of") == looks.setdefault(look, place) or looks[look] == place
    failed = [json.loads(line) for line in Path("scored.failed.jsonl").read_text().splitlines()]
    assert [(each["kind"], each["entry"]["number"]) for each in failed] == [("unreadable", 7), ("unreadable", 31)]
    assert "No such file" in failed[0]["reason"]
    assert json.loads(Path("scored.signals.json").read_text())["twins"]["version"] == "1"
    assert not Path("scored.json.ledger").exists()
    (annotation,) = [line.split(" #")[0] for line in Path("scored.txt").read_text().splitlines()]
    assert annotation == '.,"scored.json"'


def test_one_process_four_and_shards_write_the_same_bytes(meta):
    run(meta, "-o", "one.json", *SIGNALS, "--jobs", "1")
    run(meta, "-o", "four.json", *SIGNALS, "--jobs", "4")
    for index in (2, 0, 1):
        run(meta, "-o", "shards.json", *SIGNALS, "--jobs", "1", "--shard", f"{index}/3")
    merge("shards.json", "--signal", "engine_signals:Mean", "--signal", "engine_signals:Twins")
    assert outputs("one.json") == outputs("four.json") == outputs("shards.json")
    assert not Path("shards.json.ledger").exists()


def test_several_meta_json_and_their_roots_come_from_an_annotation_file(shapes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(HERE))
    text = (shapes / "videos.json").read_text()
    Path("a.json").write_text(text)
    Path("b.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in json.loads(text)))
    Path("both.txt").write_text(f"{shapes},a.json\n{shapes},b.jsonl\n")
    run("both.txt", "-o", "scored.json", "--signal", "engine_signals:Twins", "--jobs", "1")
    run("a.json", "-o", "single.json", "--signal", "engine_signals:Twins", "--jobs", "1", "--root", str(shapes))
    both, single = (json.loads(Path(name).read_text()) for name in ("scored.json", "single.json"))
    assert both[: len(single)] == single
    assert all("twin_of" in entry for entry in both[len(single) :])
    assert [entry["path"] for entry in read_entries(Annotation(".", "scored.json"))] == [e["path"] for e in both]


@pytest.mark.parametrize(
    ("does", "kind", "reason", "tries"),
    [
        ("abort", "crashed", "ended the process that read it 2 times (SIGABRT)", 2),
        ("segfault", "crashed", "ended the process that read it 2 times (SIGSEGV)", 2),
        ("hang", "hung", "no answer within 10 seconds", 1),
        ("eat", "too_large", "it took more than 0.5 GiB of memory", 2),
        ("raise", "failed", "ZeroDivisionError: of the signal's own", 1),
        ("unreadable", "unreadable", "is damaged", 1),
    ],
)
def test_a_clip_that_does_harm_costs_two_tries_at_most_and_is_named(meta, does, kind, reason, tries):
    entries = json.loads(meta.read_text())[: 2 * PIECE_ENTRIES]
    del entries[31], entries[7]
    entries[9] |= {"does": does, "note": str(meta.with_name("tries"))}
    meta.write_text(json.dumps(entries))
    bounds = ("--timeout", "10" if does == "hang" else "300", "--memory-gib", "0.5")
    run(meta, "-o", "scored.json", "--signal", "engine_signals:Trap", "--jobs", "1", *bounds)
    (failed,) = [json.loads(line) for line in Path("scored.failed.jsonl").read_text().splitlines()]
    assert (failed["kind"], failed["entry"]) == (kind, entries[9])
    assert reason in failed["reason"]
    assert meta.with_name("tries").read_text().split() == [does] * tries
    assert [entry["number"] for entry in json.loads(Path("scored.json").read_text())] == [
        entry["number"] for entry in entries if "does" not in entry
    ]


def test_a_signal_that_gives_other_columns_ends_the_run_with_its_name(meta):
    entries = json.loads(meta.read_text())
    entries[40] |= {"does": "another column", "note": str(meta.with_name("tries"))}
    meta.write_text(json.dumps(entries))
    with pytest.raises(InputError, match=r"signal trap gave .*, not its columns trapped"):
        run(meta, "-o", "scored.json", "--signal", "engine_signals:Trap", "--jobs", "1")


def test_where_nothing_goes_well_nothing_is_kept(meta, shapes):
    entries = json.loads((shapes / "videos.json").read_text())
    meta.write_text(json.dumps([{**entry, "path": f"mounted/{entry['path']}"} for entry in entries * 2]))
    arguments = (meta, "-o", "scored.json", *SIGNALS, "--jobs", "1", "--root", ".")
    with pytest.raises(InputError, match="all clips of 2 pieces in a row failed; is a disk not mounted"):
        run(*arguments)
    Path("mounted").symlink_to(shapes)
    run(*arguments)
    assert len(json.loads(Path("scored.json").read_text())) == 2 * len(entries)


def start(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "flashi2v_data.cli", "score", *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which what starts the tests may ignore
    )


def test_a_killed_run_goes_on_and_nothing_done_is_done_again(meta):
    note = meta.with_name("seen")
    meta.write_text(json.dumps([{**entry, "note": str(note)} for entry in json.loads(meta.read_text())]))
    run(meta, "-o", "whole.json", *SIGNALS, "--jobs", "1")
    ledger, done = Path("scored.json.ledger/shard_00000_of_00001.lmdb"), set()
    for _ in range(2):
        note.unlink()
        process = start(meta, "-o", "scored.json", *SIGNALS, "--jobs", "1")
        with contextlib.closing(process.stderr):
            while process.poll() is None and len(_lines(note)) < 2 * PIECE_ENTRIES:
                time.sleep(0.01)
            process.kill()
            process.wait()
        assert not _clips(done) & {*map(int, _lines(note))}
        with lmdb.open(str(ledger), readonly=True, lock=False) as environment, environment.begin() as transaction:
            done |= {int(key) for key, _ in transaction.cursor() if key.isdigit()}
    assert done
    note.unlink()
    run(meta, "-o", "scored.json", *SIGNALS, "--jobs", "1")
    assert not _clips(done) & {*map(int, _lines(note))}
    assert outputs("scored.json") == outputs("whole.json")


def _clips(pieces: set[int]) -> set[int]:
    """The numbers of the clips of some pieces."""
    return {number for number in range(NUM_CLIPS) if number // PIECE_ENTRIES in pieces}


def _lines(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


def test_two_runs_into_one_ledger(meta):
    entries = json.loads(meta.read_text())
    entries[0] |= {"does": "hang", "note": str(meta.with_name("tries"))}
    meta.write_text(json.dumps(entries))
    arguments = (meta, "-o", "scored.json", "--signal", "engine_signals:Trap", "--jobs", "1")
    process = start(*arguments)
    with contextlib.closing(process.stderr):
        while not meta.with_name("tries").exists():
            assert process.poll() is None
        with pytest.raises(InputError, match=rf"is in use by another process \(process {process.pid} on "):
            run(*arguments)
        process.send_signal(signal.SIGINT)
        process.wait()
    assert holder("scored.json.ledger/.shard_00000_of_00001.lmdb.lock") is None
    changes = [
        (("--signal", "engine_signals:Mean"), "was begun with another --signal and signals"),
        (("--signal", "engine_signals:Trap", "--shard", "0/2"), "was begun with 1 shards, not 2"),
    ]
    for options, fault in changes:
        with pytest.raises(InputError, match=fault):
            run(meta, "-o", "scored.json", *options)
    meta.write_text(json.dumps(entries[1:]))
    with pytest.raises(InputError, match="was begun with another meta JSON"):
        run(*arguments)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ((), "no signal was asked for"),
        (("-o", "scored.lmdb"), "a meta JSON ends in .json"),
        (("-o", "meta.json"), "--output meta.json exists"),
        (("--shard", "3"), "expected INDEX/COUNT"),
        (("--shard", "4/4"), "shards are counted from 0, the last is 3/4"),
        (("--address", "10.0.0.1:6379"), "--address is of a Ray cluster: add --engine ray"),
        (("--root", "x"), "no such meta JSON"),
    ],
)
def test_wrong_usage_is_refused_in_one_line(meta, options, fault):
    given = ("nowhere.json",) if "--root" in options else (meta,)
    with pytest.raises(InputError, match=fault):
        run(*given, *(("-o", "scored.json") if "-o" not in options else ()), *options)


def test_merge_says_what_is_missing(meta):
    with pytest.raises(InputError, match="no such ledger"):
        merge("scored.json")
    run(meta, "-o", "scored.json", *SIGNALS, "--jobs", "1", "--shard", "1/2")
    with pytest.raises(InputError, match="shard 0/2 is missing: run it"):
        merge("scored.json")
    run(meta, "-o", "scored.json", *SIGNALS, "--jobs", "1", "--shard", "0/2")
    with pytest.raises(InputError, match="was made with --signal engine_signals:Mean: give it here, too"):
        merge("scored.json")
    meta.write_text(meta.read_text() + " ")
    with pytest.raises(InputError, match="its meta JSON has changed since"):
        merge("scored.json", "--signal", "engine_signals:Mean", "--signal", "engine_signals:Twins")
