import gzip
import json
import subprocess
import sys

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashi2v_data.curation import meta
from flashi2v_data.curation.meta import MetaParser, read_entries, read_pieces
from flashi2v_data.errors import InputError
from flashi2v_data.records import Annotation

ENTRIES = [{"path": "a.mp4", "cap": "é", "fps": 29.97, "cut": [0, 5]}, {"path": "/abs/b.mp4"}, {"cap": "no path"}, 5]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ENTRIES),
        "\ufeff\n  " + json.dumps(ENTRIES, indent=1, ensure_ascii=False),
        "\n\n".join(json.dumps(entry) for entry in ENTRIES),
    ],
    ids=["array", "indented array with byte order mark", "lines"],
)
def test_entries_come_with_their_root_joined(tmp_path, text):
    path = tmp_path / "meta.json"
    path.write_text(text, encoding="utf-8")
    entries = list(read_entries(Annotation("/videos", str(path))))
    assert entries == [{**ENTRIES[0], "path": "/videos/a.mp4"}, ENTRIES[1], ENTRIES[2], 5]
    assert type(entries[0]["fps"]) is float


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[{"path": "a"}, {"path": # comment\n}]', "not valid JSON after entry 1 "),
        ('[{"path": "a"}, {"path"', "not valid JSON after entry 1 "),
        ('{"path": "a"}\n{"path" "b"}\n', "line 2: not valid JSON"),
        ("", "is empty"),
        ('[{"path": "a"}]'.encode("utf-16"), "is UTF-16; save it as UTF-8"),
    ],
)
def test_broken_meta_json_says_where(tmp_path, text, expected):
    path = tmp_path / "meta.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=expected) as caught:
        list(read_entries(Annotation("", str(path))))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**25), 10**25)
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    # What looks like the end of an entry.
    | st.sampled_from(["},{", '}, {"a', '[{"', "\\", '"', "\ud800", "\udcff"]),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=3), children, max_size=4),
    max_leaves=12,
)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    entries=st.lists(ANY, max_size=12),
    indent=st.sampled_from([None, 1]),
    is_lines=st.booleans(),
    size=st.integers(3, 80),
)
def test_cutting_a_file_anywhere_changes_nothing(tmp_path, monkeypatch, entries, indent, is_lines, size):
    monkeypatch.setattr(meta, "PIECE_BYTES", size)
    path = tmp_path / "meta.json"
    if is_lines:
        entries = [{"entry": entry} for entry in entries] or [{}]
        path.write_text("\n".join(json.dumps(entry) for entry in entries))
    else:
        path.write_text(json.dumps(entries, indent=indent))
    assert list(read_entries(Annotation("", str(path)))) == entries


@pytest.mark.parametrize("is_lines", [True, False])
@pytest.mark.parametrize(
    "compress",
    [
        gzip.compress,
        zstandard.compress,
        lambda data: b"".join(zstandard.compress(data[i : i + 9]) for i in range(0, len(data), 9)),
    ],
    ids=["gzip", "zstd", "zstd in frames"],
)
def test_compressed_files_are_known_by_their_content(tmp_path, is_lines, compress):
    entries = [{"path": f"{number}.mp4"} for number in range(50)]
    text = "\n".join(map(json.dumps, entries)) if is_lines else json.dumps(entries)
    path = tmp_path / "meta.json"
    path.write_bytes(compress(text.encode()))
    assert list(read_entries(Annotation("/v", str(path)))) == [{"path": f"/v/{number}.mp4"} for number in range(50)]


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_a_compressed_file_that_was_cut_short_says_so(tmp_path, compress):
    path = tmp_path / "meta.json.gz"
    path.write_bytes(compress(json.dumps([{"path": "a.mp4", "cap": str(n)} for n in range(999)]).encode())[:-20])
    with pytest.raises(InputError, match=r"meta\.json\.gz: cannot be decompressed, is it whole"):
        list(read_entries(Annotation("", str(path))))


def test_an_empty_path_does_not_become_the_root(tmp_path):
    path = tmp_path / "meta.json"
    path.write_text('[{"path": ""}]')
    assert list(read_entries(Annotation("/videos", str(path)))) == [{"path": ""}]


def test_bytes_that_are_not_utf8_become_the_path_that_opens_the_file(tmp_path):
    path = tmp_path / "meta.jsonl"
    path.write_bytes(b'{"path": "caf\xe9.mp4"}\n{"path": "\\udce9.mp4"}\n')
    assert [entry["path"] for entry in read_entries(Annotation("/v", str(path)))] == [
        "/v/caf\udce9.mp4",
        "/v/\udce9.mp4",
    ]


def test_an_entry_without_an_end_is_not_read_to_the_end_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(meta, "PIECE_BYTES", 1000)
    monkeypatch.setattr(meta, "MAX_ENTRY_BYTES", 10_000)
    path = tmp_path / "meta.json"
    path.write_text('[{"path": "a.mp4", "cap": "' + "word " * 100_000)
    with pytest.raises(InputError, match="holds an entry of more than"):
        list(read_entries(Annotation("", str(path))))


@pytest.mark.parametrize("form", ["[%s]", "%s\n"], ids=["array", "lines"])
def test_a_number_of_any_length_is_one_that_no_clip_can_have(tmp_path, form):
    path = tmp_path / "meta.json"
    path.write_text(form % '{"path": "/a.mp4", "num_frames": %s, "id": -%s}' % ("9" * 5000, "9" * 30))
    (entry,) = read_entries(Annotation("", str(path)))
    assert entry["num_frames"] > 10**100
    assert entry["id"] == -int("9" * 30)


@pytest.mark.parametrize(
    "text",
    ['[{"a":' * 3_000_000, "[" * 17_000_000, "[" + "}" * 17_000_000, " " * 17_000_000, "[1" + ",1" * 9_000_000],
    ids=["braces", "brackets", "closing braces", "spaces", "numbers"],
)
@pytest.mark.parametrize("compress", [bytes, zstandard.compress], ids=["plain", "zstd"])
def test_what_is_no_list_of_entries_is_given_up_after_a_while(tmp_path, text, compress):
    path = tmp_path / "meta.json"
    path.write_bytes(compress(text.encode()))
    with pytest.raises(InputError, match=r"holds an entry of more than 16 MiB|not valid JSON after entry 0"):
        list(read_entries(Annotation("", str(path))))


@pytest.mark.parametrize("change", [lambda data: data[:-3000], lambda data: b" " + data], ids=["shorter", "shifted"])
def test_a_file_that_changes_while_it_is_read_says_so(tmp_path, monkeypatch, change):
    monkeypatch.setattr(meta, "PIECE_BYTES", 1000)
    path = tmp_path / "meta.json"
    path.write_text(json.dumps([{"path": f"{number}.mp4"} for number in range(500)]))
    entries = read_entries(Annotation("", str(path)))
    next(entries)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InputError, match="was changed while it was read"):
        list(entries)


def test_a_piece_that_changes_before_it_is_parsed_says_so(tmp_path):
    path = tmp_path / "meta.json"
    path.write_text('[{"path": "a.mp4"}]')
    (piece,) = read_pieces(Annotation("", str(path)))
    path.write_text('[{"path": "bb.mp4"}]')
    with pytest.raises(InputError, match="was changed while it was read"):
        piece.bracketed()


def test_lists_of_objects_within_entries_are_read_to_their_end(tmp_path, monkeypatch):
    monkeypatch.setattr(meta, "PIECE_BYTES", 200)
    entries = [{"path": f"/{n}.mp4", "shots": [{"at": m} for m in range(20)]} for n in range(100)]
    path = tmp_path / "meta.json"
    path.write_text(json.dumps(entries))
    annotation = Annotation("", str(path))
    parser, found = MetaParser(annotation), []
    for piece in read_pieces(annotation):
        found += parser.parse(piece)
        assert len(parser._rest) < 1000
    assert found == entries


def test_memory_does_not_grow_with_the_meta_json(tmp_path):
    entry = json.dumps({"path": "a.mp4", "cap": "word " * 100})
    path = tmp_path / "meta.json"
    with path.open("w") as file:
        file.write("[" + entry)
        for _ in range(100_000):
            file.write(",\n" + entry)
        file.write("]")
    size_kib = path.stat().st_size // 1024
    assert size_kib > 50_000
    # A process of its own: peak memory never falls again.
    program = (
        "import resource, sys\n"
        "from flashi2v_data.curation.meta import read_entries\n"
        "from flashi2v_data.records import Annotation\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); count = sum(1 for _ in read_entries(Annotation('', sys.argv[1])))\n"
        "print(count, peak() - before)"
    )
    result = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    count, growth = map(int, result.stdout.split())
    assert count == 100_001
    assert growth * (1 if sys.platform != "darwin" else 1 / 1024) < 10_000
