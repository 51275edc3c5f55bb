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


@pytest.mark.parametrize("name", ["a, b", "my #1 set", ' say "so" ', 'half"quoted', "line\u2028end", "a#b"])
def test_names_of_any_kind_can_be_quoted(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "m.json").write_text("[]")
    path = tmp_path / "videos.txt"
    quoted = ['"' + str(part).replace('"', '""') + '"' for part in (folder, folder / "m.json")]
    path.write_text(f"{quoted[0]} , {quoted[1]} # both quoted\r\n,{quoted[1]}\n{quoted[0]},{quoted[1]}")
    whole = Annotation(str(folder), f"{folder}/m.json")
    assert read_annotations(path) == [whole, whole._replace(root=""), whole]
    if not {",", " "} & set(name):
        path.write_text(f"{folder},{folder}/m.json # plain")
        assert read_annotations(path) == [whole]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# nothing\n", "names no meta JSON"),
        ("\n/data/only\n", "line 2: expected `root of videos,meta JSON`"),
        ("/data,a,b\n", "line 1: expected"),
        ("/data,missing.json\n", "line 1: no such meta JSON: missing.json"),
        ('"/data","missing.json\n', "a name that holds a comma or ` #` stands in double quotes"),
        ("/data,/dev/null\n", "line 1: is not a regular file: /dev/null"),
        ("/data,\0.json\n", "line 1: no such meta JSON"),
    ],
)
def test_a_fault_in_an_annotation_file_names_file_and_line(tmp_path, text, expected):
    path = tmp_path / "videos.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=expected) as caught:
        read_annotations(path)
    assert str(path) in str(caught.value)


def test_a_missing_annotation_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"videos\.txt: no such file"):
        read_annotations(tmp_path / "videos.txt")


def test_what_is_no_file_is_refused_at_once(tmp_path):
    path = tmp_path / "videos.txt"
    os.mkfifo(path)
    with pytest.raises(InputError, match=r"videos\.txt: is not a regular file"):
        read_annotations(path)
    with pytest.raises(InputError, match="is a directory"):
        read_annotations(tmp_path)
    for name in ("a\0b", "a" * 5000):
        with pytest.raises(InputError, match="no such file"):
            read_annotations(name)


def test_names_that_are_not_utf8_survive(tmp_path):
    (tmp_path / "meta.json").write_text("[]")
    path = tmp_path / "videos.txt"
    path.write_bytes(b"/caf\xe9," + os.fsencode(tmp_path) + b"/meta.json\n")
    (annotation,) = read_annotations(path)
    assert os.fsencode(annotation.root) == b"/caf\xe9"
    assert printable(annotation.root) == "/caf\\xe9"
