import os

import pytest

from flashi2v_data.errors import InputError
from flashi2v_data.records import Annotation, printable, read_annotations


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


def test_names_that_are_not_utf8_survive(tmp_path):
    (tmp_path / "meta.json").write_text("[]")
    path = tmp_path / "videos.txt"
    path.write_bytes(b"/caf\xe9," + os.fsencode(tmp_path) + b"/meta.json\n")
    (annotation,) = read_annotations(path)
    assert os.fsencode(annotation.root) == b"/caf\xe9"
    assert printable(annotation.root) == "/caf\\xe9"
