"""Prompts and lists of images, from files."""

import hashlib
import html
import re
from pathlib import Path

from flashi2v_data.captions.cleaning import clean_caption
from flashi2v_data.errors import InputError
from flashi2v_data.textfile import read_text

_LARGEST_LIST = 2**26  # bytes


def read_lines(path: str | Path, key: str) -> list[str]:
    """Read a list with one entry a line; blank lines are allowed at the end only.

    Raises:
        InputError: naming `key`, the setting that gave `path`, where the file is missing, unreadable or has gaps.
    """
    try:
        text = read_text(path, _LARGEST_LIST)
    except InputError as error:
        raise InputError(f"{key}: {error}") from None
    # Not splitlines, for which a prompt could end at one of the less known line separators of Unicode.
    lines = [line.strip() for line in text.rstrip().split("\n")] if text.strip() else []
    if not lines:
        raise InputError(f"{key}: {path} is empty: write one entry a line")
    if "" in lines:
        raise InputError(f"{key}: {path} line {lines.index('') + 1} is empty: every line stands for one video")
    return lines


def read_pairs(prompt_path: str, image_path: str) -> list[tuple[str, str]]:
    """Read the lists of prompts and of image files, which belong together line by line.

    Raises:
        InputError: a list cannot be used, or they differ in length.
    """
    prompts, images = read_lines(prompt_path, "prompt"), read_lines(image_path, "image")
    if len(prompts) != len(images):
        raise InputError(
            f"{prompt_path} holds {len(prompts)} prompts, {image_path} holds {len(images)} images: "
            "give one image for every prompt"
        )
    return list(zip(prompts, images))


def clean_prompt(prompt: str, where: str) -> str:
    """Clean a prompt as training captions are.

    Raises:
        InputError: naming `where`, nothing is left.
    """
    cleaned = clean_caption(prompt)
    if not cleaned:
        raise InputError(f"{where}: nothing is left of {prompt!r} after cleaning: set use_prompt_preprocess to false")
    return cleaned


def tidy(prompt: str) -> str:
    """Resolve HTML entities, also those escaped twice, and make every run of white space one space."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(prompt))).strip()


def hash_file(path: str | Path) -> str:
    """Return a hash of a file's contents."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return f"sha256:{digest.hexdigest()}"
