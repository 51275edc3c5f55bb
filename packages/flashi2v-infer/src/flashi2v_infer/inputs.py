"""Prompts and images, from files or as Python objects. H W height and width of a picture."""

import hashlib
import html
import re
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from flashi2v_data.captions import clean_caption
from flashi2v_data.errors import InputError

Pixels: TypeAlias = NDArray[np.uint8]
AnyImage: TypeAlias = Image.Image | NDArray[np.generic] | Tensor


def read_lines(path: str | Path, key: str) -> list[str]:
    """Read a list with one entry a line; blank lines are allowed at the end only.

    Raises:
        InputError: naming `key`, the setting that gave `path`, where the file is missing, unreadable or has gaps.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{key}: {path}: no such file") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{key}: {path}: line {line} is not UTF-8 text: save the file as UTF-8") from None
    except OSError as error:
        raise InputError(f"{key}: {path}: cannot be read: {error.strerror or error}") from None
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


def read_image(path: str | Path, where: str) -> Pixels:
    """Read a picture as (H, W, 3), turned upright where its EXIF data says so.

    Raises:
        InputError: naming `where`, the option or the line of a list that gave `path`.
    """
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise OSError("not a regular file")  # a pipe would be waited for
        with Image.open(path) as image:
            return as_pixels(image)
    except FileNotFoundError:
        reason = "no such file"
    except UnidentifiedImageError:
        reason = "not an image of a known format"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = f"cannot be read: {error}"
    raise InputError(f"{where}: {path}: {reason}")


def hash_file(path: str | Path) -> str:
    """Return a hash of a file's contents."""
    return f"sha256:{hashlib.sha256(Path(path).read_bytes()).hexdigest()}"


def as_pixels(image: AnyImage) -> Pixels:
    """Return a picture as (H, W, 3).

    Args:
        image: PIL, or an array (H, W, 3), or a tensor (3, H, W); numbers are uint8, or floats in [0, 1].

    Raises:
        InputError: it is something else.
    """
    if isinstance(image, Image.Image):
        if image.mode.startswith(("I", "F")):
            raise InputError(f"PIL mode {image.mode} has more than 8 bits per channel: convert the image to 8 bits")
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    if isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] != 3:
            raise InputError(f"an image tensor must be (3, H, W), got {tuple(image.shape)}")
        image = image.detach().cpu().movedim(0, -1)
        return as_pixels((image.float() if image.is_floating_point() else image).numpy())
    if not isinstance(image, np.ndarray):
        raise InputError(f"image must be a PIL image, an array or a tensor, got {type(image).__name__}")
    if image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise InputError(f"an image array must be (H, W, 3), got {image.shape}")
    if image.dtype == np.uint8:
        return image.astype(np.uint8)
    if not np.issubdtype(image.dtype, np.floating):
        raise InputError(f"image numbers must be uint8, or floats in [0, 1], got {image.dtype}")
    # Written so that NaN fails too.
    if not (image.min() >= 0 and image.max() <= 1):
        raise InputError(f"image floats must lie in [0, 1], got [{image.min():g}, {image.max():g}]")
    return (image * 255).round().astype(np.uint8)
