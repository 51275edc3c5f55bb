import json
import subprocess
import sys

import pytest

from flashi2v_data.errors import InputError
from flashi2v_data.records import Annotation, read_annotations, read_entries


def test_annotations_may_have_comments_and_blank_lines(tmp_path):
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text("[]")
    path = tmp_path / "videos.txt"
    path.write_text(f"# all of them\n\n/data,{tmp_path}/a.json # Root dir, meta json.\n , {tmp_path}/b.json\n")
    assert read_annotations(path) == [Annotation("/data", f"{tmp_path}/a.json"), Annotation("", f"{tmp_path}/b.json")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# nothing\n", "names no meta JSON"),
        ("\n/data/only\n", "line 2: expected `root of videos,meta JSON`"),
        ("/data,a,b\n", "line 1: expected"),
        ("/data,missing.json\n", "line 1: no such meta JSON: missing.json"),
    ],
)
def test_a_fault_in_an_annotation_file_names_file_and_line(tmp_path, text, expected):
    path = tmp_path / "videos.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=expected) as caught:
        read_annotations(path)
    assert str(path) in str(caught.value)


def test_a_missing_annotation_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="annotation file cannot be read"):
        read_annotations(tmp_path / "videos.txt")


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
    ],
)
def test_broken_meta_json_says_where(tmp_path, text, expected):
    path = tmp_path / "meta.json"
    path.write_text(text)
    with pytest.raises(InputError, match=expected) as caught:
        list(read_entries(Annotation("", str(path))))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


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
        "import resource, sys; from flashi2v_data.records import Annotation, read_entries\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); count = sum(1 for _ in read_entries(Annotation('', sys.argv[1])))\n"
        "print(count, peak() - before)"
    )
    result = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    count, growth = map(int, result.stdout.split())
    assert count == 100_001
    assert growth * (1 if sys.platform != "darwin" else 1 / 1024) < 10_000
