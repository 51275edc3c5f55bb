"""Tables as meta data, and stores as tables."""

import datetime
import json

import numpy as np
import pytest

from flashi2v_data import FilterReport, filter_records, open_store, write_store
from flashi2v_data.curation.filter import filter_files
from flashi2v_data.curation.meta import read_entries, read_pieces
from flashi2v_data.errors import InputError
from flashi2v_data.records import Annotation
from flashi2v_data.store.table import export_parquet

CSV = 'file_name,text,fps,cut,height,width,id,score\n"a, b.mp4",红色,24,"[0, 9]",480,832,007,0.5\nb.mp4,"1,5",,,,,,\n'
ENTRIES = [
    {
        "path": "/v/a, b.mp4",
        "cap": "红色",
        "fps": 24,
        "cut": [0, 9],
        "resolution": {"height": 480, "width": 832},
        "id": "007",
        "score": 0.5,
    },
    {"path": "/v/b.mp4", "cap": "1,5"},
]


def entries_of(path):
    return list(read_entries(Annotation("/v", str(path))))


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.csv", CSV), ("a.csv", "\ufeff" + CSV), ("a.tsv", CSV.replace(",", "\t").replace("\t b", ", b"))],
    ids=["csv", "byte order mark", "tsv"],
)
def test_rows_of_text_become_entries(tmp_path, name, text):
    if name == "a.tsv":
        text = text.replace('"[0\t 9]"', "[0, 9]").replace('"1\t5"', "1,5")
    (tmp_path / name).write_text(text, "utf-8")
    assert entries_of(tmp_path / name) == ENTRIES


def test_spreadsheets_that_write_semicolons_are_read(tmp_path):
    (tmp_path / "a.csv").write_text("path;cap\na.mp4;red, and blue\n")
    assert entries_of(tmp_path / "a.csv") == [{"path": "/v/a.mp4", "cap": "red, and blue"}]


def test_rows_of_parquet_become_entries(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {"video": "a.mp4", "caption": ["one", "two"], "num_frames": 9.0, "day": datetime.date(2026, 1, 2)},
        {"video": "/w/b.mp4", "caption": ["three"], "num_frames": np.nan, "day": None},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows * 1000), tmp_path / "a.parquet")
    entries = entries_of(tmp_path / "a.parquet")
    assert len(entries) == 2000
    assert entries[0] == {"path": "/v/a.mp4", "cap": ["one", "two"], "num_frames": 9.0, "day": "2026-01-02"}
    assert entries[-1] == {"path": "/w/b.mp4", "cap": ["three"]}
    pieces = list(read_pieces(Annotation("/v", str(tmp_path / "a.parquet"))))
    assert len(pieces) == 2
    assert 0 < pieces[0].end < pieces[1].end == (tmp_path / "a.parquet").stat().st_size


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", b"name,cap\na,b\n", "no column is called path, file_name"),
        ("a.csv", b"path,cap,cap\na,b,c\n", "columns are there twice: cap"),
        ("a.csv", b"path,cap\na,b,c\n", "row 1: has 3 cells, the header has 2"),
        ("a.csv", b"path,cap\n\na,caf\xe9\n", "line 3: is not UTF-8; save it as UTF-8"),
        ("a.csv", "path,cap\n".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        ("a.csv", b'path,cap\n"a' + b"x" * (2 << 20), "is not valid CSV"),
        ("a.csv", b"path,cap\n", "has no rows"),
        ("a.parquet", b"PAR1 and nothing", "cannot be read as Parquet"),
    ],
)
def test_a_broken_table_says_what_is_wrong(tmp_path, name, content, expected):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=expected) as caught:
        entries_of(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_filter_reads_a_table_in_pieces_and_every_row_once(tmp_path, shapes, filter_config, monkeypatch):
    entries = json.loads((shapes / "videos.json").read_text())
    lines = [f"{shapes / entry['path']},{entry['cap']}\n" for entry in entries]
    (tmp_path / "a.csv").write_text("path,cap\n" + "".join(lines))
    (tmp_path / "videos.txt").write_text(f",{tmp_path / 'a.csv'}\n")
    monkeypatch.setattr("flashi2v_data.curation.tables._ROWS", 5)
    config = filter_config(ann_txt_path=str(tmp_path / "videos.txt"), save_path=str(tmp_path / "lmdb"))
    path, report = filter_files(config, jobs=1, probe_timeout=60)
    assert (report.total, report.kept) == (len(entries), len(entries))
    assert [record["cap"] for record in open_store(path)] == [entry["cap"] for entry in entries]


def test_a_store_is_exported_and_read_again_as_meta_data(tmp_path, filter_config):
    parquet = pytest.importorskip("pyarrow.parquet")
    base = {"resolution": {"height": 48, "width": 64}, "fps": 24, "num_frames": 9, "start_frame_idx": 0}
    records = [
        {"path": f"/v/{i}.mp4", "cap": "one" if i else ["one", "two"], "tag": i if i % 2 else "odd", "more": {}, **base}
        for i in range(20)
    ]
    records[3]["score"] = 0.25
    export_parquet(open_store(write_store(tmp_path / "a.lmdb", records, {})), tmp_path / "a.parquet")
    table = parquet.read_table(tmp_path / "a.parquet").to_pylist()
    assert [row["cap"] for row in table[:2]] == [["one", "two"], ["one"]]
    assert [row["score"] for row in table[2:5]] == [None, 0.25, None]
    assert [row["tag"] for row in table[:3]] == ["odd", "1", "odd"]
    report = FilterReport()
    again = list(filter_records(entries_of(tmp_path / "a.parquet"), filter_config(), report))
    assert (report.kept, [record["path"] for record in again]) == (20, [record["path"] for record in records])


def test_a_path_that_no_table_can_hold_is_named(tmp_path):
    pytest.importorskip("pyarrow")
    record = {"path": "/v/\udcff.mp4", "cap": "one", "fps": 24, "num_frames": 9, "start_frame_idx": 0}
    store = open_store(write_store(tmp_path / "a.lmdb", [record], {}))
    with pytest.raises(InputError, match="is not UTF-8, which a table cannot hold"):
        export_parquet(store, tmp_path / "a.parquet")
    assert not list(tmp_path.glob("*.parquet"))


def test_a_store_takes_slices(store_path):
    store = open_store(store_path)
    records = list(store)
    assert store[2:5] == records[2:5]
    assert store[-3:] == records[-3:]
    assert store[::-4] == records[::-4]
    assert store[100:] == []
