"""The filter by shards and engines writes what it writes by itself, byte for byte; a run that was killed goes on."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flashi2v_data.cli import app
from flashi2v_data.curation import meta as meta_module
from flashi2v_data.errors import InputError
from flashi2v_data.store.reader import open_store

NUM_CLIPS = 400


def run(*arguments: str) -> None:
    app([*map(str, arguments)], exit_on_error=False, print_error=False, result_action="return_value")


@pytest.fixture
def settings(shapes: Path, tmp_path: Path, monkeypatch) -> Path:
    """A filter of two meta JSON, some of whose entries leave out what their videos say, in many small pieces."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(meta_module, "PIECE_BYTES", 4000)
    videos = [entry["path"] for entry in json.loads((shapes / "videos.json").read_text())]
    entries = []
    for number in range(NUM_CLIPS):
        entry = {"path": videos[number % len(videos)], "cap": f"clip {number}", "number": number}
        if number % 3:
            entry |= {"resolution": {"height": 32, "width": 48}, "fps": 16, "num_frames": 2 + number % 13}
        if number % 50 == 7:
            entry["path"] = "nowhere.mp4"
        if number % 60 == 9:
            entry |= {"cap": "a comma between braces }, {" * 150, "others": [{"a": 1}, {"b": 2}] * 300}
        if number % 70 == 11:
            del entry["cap"]
        entries.append(entry)
    Path("a.json").write_text(json.dumps(entries[:250]))
    Path("b.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in entries[250:]))
    Path("videos.txt").write_text(f"{shapes},a.json\n{shapes},b.jsonl\n")
    Path("a.signals.json").write_text(json.dumps({"mine": {"version": "7"}}))
    limits = {"sample_height": 32, "sample_width": 48, "sample_num_frames": 5, "min_hxw": 1, "train_fps": 16}
    ratios = {"max_h_div_w_ratio": 1.2, "min_h_div_w_ratio": 0.4}
    Path("filter.yaml").write_text(json.dumps({"ann_txt_path": "videos.txt", "save_path": "lmdb", **limits, **ratios}))
    return Path("filter.yaml")


FILTER = ("filter", "--filter_config", "filter.yaml")


def taken_away() -> dict[str, bytes]:
    """Return all that a filter wrote but its probe cache, and remove it."""
    found = {
        str(path.relative_to("lmdb")): path.read_bytes()
        for path in sorted(Path("lmdb").rglob("*"))
        if path.is_file() and "probe_cache" not in path.parts
    }
    shutil.rmtree("lmdb")
    return found


def test_shards_write_what_one_run_writes(settings):
    run(*FILTER, "--jobs", "2")
    store = open_store(next(Path("lmdb").glob("*.lmdb")))
    assert {record["number"] % 60 == 9 for record in store} == {True, False}, "what was cut wrongly is kept, too"
    del store
    alone = taken_away()
    assert {"report.json", "report.txt"} < alone.keys()
    assert b"mine" in b"".join(alone.values()), "the store says what its columns were made by"
    for index in (1, 2, 0):
        run(*FILTER, "--jobs", "1", "--shard", f"{index}/3")
    run("merge", "lmdb")
    assert taken_away() == alone
    run(*FILTER, "--shard", "0/1")
    assert taken_away() == alone


def test_a_killed_shard_goes_on(settings):
    run(*FILTER, "--shard", "0/1", "--jobs", "1")
    whole = taken_away()
    code = (
        "import flashi2v_data.curation.meta as meta; meta.PIECE_BYTES = 4000\n"
        f"import sys; sys.argv = ['x', *{list(FILTER)!r}, '--shard', '0/2']\n"
        "from flashi2v_data.cli import main; main()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ, stderr=subprocess.PIPE)
    with contextlib.closing(process.stderr):
        data = Path("lmdb/filter.ledger/shard_00000_of_00002.lmdb/data.mdb")
        while process.poll() is None and not (data.exists() and data.stat().st_size > 5 * 4096):
            time.sleep(0.01)
        process.kill()
        process.wait()
    for index in (1, 0):
        run(*FILTER, "--shard", f"{index}/2", "--jobs", "1")
    run("merge", "lmdb")
    assert taken_away() == whole


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (("--shard", "0/2", "--resume"), "goes on by itself, and writes: leave out --resume"),
        (("--shard", "0/2", "--dry-run"), "leave out --dry-run"),
        (("--engine", "ray", "--explain", "x"), "leave out --explain"),
        (("--address", "auto"), "without --engine ray there is no cluster: leave out --address"),
    ],
)
def test_options_that_would_be_ignored_are_refused(settings, options, fault):
    with pytest.raises(InputError, match=fault):
        run(*FILTER, *options)


def test_merge_refuses_what_does_not_belong_together(settings):
    run(*FILTER, "--shard", "0/2", "--jobs", "1")
    with pytest.raises(InputError, match="shard 1/2 is missing"):
        run("merge", "lmdb")
    with pytest.raises(InputError, match="--signal is of score"):
        run("merge", "lmdb", "--signal", "a:B")
    Path("filter.yaml").write_text(Path("filter.yaml").read_text().replace('"min_hxw": 1', '"min_hxw": 2'))
    with pytest.raises(InputError, match="was begun with another min_hxw"):
        run(*FILTER, "--shard", "1/2")
    Path("a.json").write_text(Path("a.json").read_text() + " ")
    Path("filter.yaml").write_text(Path("filter.yaml").read_text().replace('"min_hxw": 2', '"min_hxw": 1'))
    with pytest.raises(InputError, match="was begun with another meta JSON"):
        run(*FILTER, "--shard", "1/2")
