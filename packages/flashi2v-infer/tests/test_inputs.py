import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flashi2v_infer.inputs import as_pixels, clean_prompt, read_image, read_lines, read_pairs, tidy
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
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_lines(tmp_path, "prompt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\n\nb\n", "prompt: {path} line 2 is empty"),
        (b"\na\n", "prompt: {path} line 1 is empty"),
        (b"\n\n", "prompt: {path} is empty: write one entry a line"),
        ("a\nein Ärmel\n".encode("latin-1"), "prompt: {path}: line 2 is not UTF-8 text: save the file as UTF-8"),
        ("a\n".encode("utf-16"), "prompt: {path}: line 1 is not UTF-8 text"),
        (None, "prompt: {path}: no such file"),
    ],
)
def test_lists_that_cannot_be_used_are_named(tmp_path, content, message):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(message.format(path=path))):
        read_lines(path, "prompt")


def test_lists_of_different_length_are_named_with_their_counts(job):
    Path("images.txt").write_text("first.png\n")
    with pytest.raises(InputError, match=r"prompts.txt holds 2 prompts, images.txt holds 1 images"):
        read_pairs("prompts.txt", "images.txt")


def test_a_photograph_is_turned_upright(job, photograph):
    turned = read_image("second.jpg", "image")
    assert turned.shape == photograph.shape
    # JPEG changes every pixel a little; lying on its side the picture would be another one.
    assert np.abs(turned.astype(float) - photograph).mean() < 5


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_pictures_of_every_mode_become_rgb(tmp_path, photograph, mode):
    path = tmp_path / "picture.tiff"
    Image.fromarray(photograph).convert(mode).save(path)
    assert read_image(path, "image").shape == photograph.shape


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "images.txt line 3: {path}: no such file"),
        (lambda path: path.write_bytes(b"GIF? no"), "images.txt line 3: {path}: not an image of a known format"),
        (lambda path: path.mkdir(), "images.txt line 3: {path}: cannot be read"),
        (lambda path: os.mkfifo(path), "images.txt line 3: {path}: cannot be read: not a regular file"),
        (lambda path: path.write_bytes(_png()[:900]), "images.txt line 3: {path}: cannot be read"),
        (lambda path: Image.fromarray(np.ones((9, 9), np.uint16)).save(path), "more than 8 bits per channel"),
    ],
)
def test_a_picture_that_cannot_be_used_is_named_with_its_line(tmp_path, write, message):
    path = tmp_path / "picture.png"
    write(path)
    with pytest.raises(InputError, match=re.escape(message.format(path=path))):
        read_image(path, "images.txt line 3")


def _png() -> bytes:
    from io import BytesIO

    file = BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).save(file, "png")
    return file.getvalue()


def test_pixels_do_not_share_memory_with_what_was_given(photograph):
    before = photograph.copy()
    as_pixels(photograph)[:] = 0
    assert np.array_equal(photograph, before)


def test_prompts_are_cleaned_like_captions_only_when_asked():
    assert tidy("A  Cat &lt;3 \n http://cat.com") == "A Cat <3 http://cat.com"
    assert clean_prompt("A Cat at http://cat.com", "prompts.txt line 1") == "a cat at"
    with pytest.raises(InputError, match=r"prompts.txt line 1: nothing is left of 'http://cat.com' after cleaning"):
        clean_prompt("http://cat.com", "prompts.txt line 1")
