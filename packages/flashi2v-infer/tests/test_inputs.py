import os
import re
from pathlib import Path

import pytest

from flashi2v_infer.files.inputs import clean_prompt, read_lines, read_pairs, tidy
from flashi2v_infer.settings import InputError


def test_lists_are_read_line_by_line_and_may_end_in_blank_lines(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa cat \r\nein Ärmel\r\n\r\n \r\n".encode())
    assert read_lines(path, "prompt") == ["a cat", "ein Ärmel"]


def test_a_prompt_ends_with_its_line_and_at_no_other_separator(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\u2028purrs\x0c loudly\x85\nmm\n", encoding="utf-8")
    assert read_lines(path, "prompt") == ["a cat\u2028purrs\x0c loudly", "mm"]


def test_a_directory_is_no_list(tmp_path):
    with pytest.raises(InputError, match="is a directory"):
        read_lines(tmp_path, "prompt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\n\nb\n", "prompt: {path} line 2 is empty"),
        (b"\na\n", "prompt: {path} line 1 is empty"),
        (b"\n\n", "prompt: {path} is empty: write one entry a line"),
        ("a\nein Ärmel\n".encode("latin-1"), "prompt: {path}, line 2: is not UTF-8; save it as UTF-8"),
        ("a\n".encode("utf-16"), "prompt: {path}: is UTF-16; save it as UTF-8"),
        (None, "prompt: {path}: no such file"),
    ],
)
def test_lists_that_cannot_be_used_are_named(tmp_path, content, message):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(message.format(path=path))):
        read_lines(path, "prompt")


def test_a_list_is_a_file_of_bounded_size(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    os.truncate(os.open(tmp_path / "large", os.O_CREAT | os.O_WRONLY), 2**30)
    for name, message in (
        ("pipe", "is not a regular file"),
        ("large", "holds more than 65536 KiB"),
        ("a\0", "no such file"),
    ):
        with pytest.raises(InputError, match=f"prompt: .*{name[0]}.* {message}"):
            read_lines(f"{tmp_path}/{name}", "prompt")


def test_lists_of_different_length_are_named_with_their_counts(job):
    Path("images.txt").write_text("first.png\n")
    with pytest.raises(InputError, match=r"prompts.txt holds 2 prompts, images.txt holds 1 images"):
        read_pairs("prompts.txt", "images.txt")


def test_prompts_are_cleaned_like_captions_only_when_asked():
    assert tidy("A  Cat &lt;3 \n http://cat.com") == "A Cat <3 http://cat.com"
    assert clean_prompt("A Cat at http://cat.com", "prompts.txt line 1") == "a cat at"
    with pytest.raises(InputError, match=r"prompts.txt line 1: nothing is left of 'http://cat.com' after cleaning"):
        clean_prompt("http://cat.com", "prompts.txt line 1")
