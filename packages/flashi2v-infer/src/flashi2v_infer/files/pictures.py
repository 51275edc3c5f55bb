"""Pictures from files and from memory, as the pixels that a video starts with. H W height and width."""

import logging
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from flashi2v_data.errors import InputError
from flashi2v_data.video.pictures import FORMATS, UNDECODABLE, as_shown, is_animated, opened, reason_of

logger = logging.getLogger(__name__)

Pixels: TypeAlias = NDArray[np.uint8]
AnyImage: TypeAlias = Image.Image | NDArray[np.generic] | Tensor

_LONGEST = 50  # times the other side; the video's size is cut out of the picture


def read_image(path: str | Path, where: str) -> Pixels:
    """Read a picture as (H, W, 3), as a viewer shows it; of an animated one the first.

    Raises:
        InputError: naming `where`, the option or the line of a list that gave `path`.
    """
    try:
        with opened(path) as image:
            return as_pixels(image, f"{where}: {path}")
    except FileNotFoundError:
        reason = "no such file"
    except UnidentifiedImageError:
        reason = f"not an image of a known format ({', '.join(FORMATS)})"
    except UNDECODABLE as error:
        reason = f"cannot be read: {reason_of(error)}"
    raise InputError(f"{where}: {path}: {reason}")


def as_pixels(image: AnyImage, name: str = "the image") -> Pixels:
    """Return a picture as (H, W, 3).

    Args:
        image: PIL, or an array (H, W, 3), or a tensor (3, H, W); numbers are uint8, or floats in [0, 1].
        name: for what is said of it.

    Raises:
        InputError: it is something else, or far too long for its width.
    """
    if isinstance(image, Image.Image):
        if is_animated(image):
            logger.warning("%s: it holds several pictures, of which the first is taken", name)
        pixels = np.array(as_shown(image, partial(logger.warning, "%s: %s", name)))
    elif isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] != 3:
            raise InputError(f"an image tensor must be (3, H, W), got {tuple(image.shape)}")
        image = image.detach().cpu().movedim(0, -1)
        pixels = _of_array((image.float() if image.is_floating_point() else image).numpy())
    elif isinstance(image, np.ndarray):
        pixels = _of_array(image)
    else:
        raise InputError(f"image must be a PIL image, an array or a tensor, got {type(image).__name__}")
    if max(pixels.shape[:2]) > _LONGEST * min(pixels.shape[:2]):
        raise InputError(f"{pixels.shape[1]} x {pixels.shape[0]} is too narrow to cut a video's frame out of")
    return pixels


def _of_array(image: NDArray[np.generic]) -> Pixels:
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
