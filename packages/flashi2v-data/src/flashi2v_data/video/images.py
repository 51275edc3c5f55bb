"""Image files: clips of one frame, whose rate is any."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from flashi2v_data.errors import DecodeError, InputError
from flashi2v_data.video.index import check_file

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
FPS = 24.0
_told: set[str] = set()


def is_image(path: str | os.PathLike[str]) -> bool:
    """Tell whether a file is an image, by its name."""
    return os.fspath(path).lower().endswith(IMAGES)


def read_image(path: str) -> NDArray[np.uint8]:
    """Read an image as (H, W, 3), as viewers show it.

    Raises:
        DecodeError: it is missing, damaged, holds several pictures, or has more than 8 bits a channel.
    """
    from flashi2v_data.video.pictures import as_shown

    with _opened(path) as image:
        return np.array(as_shown(image, _telling(path)))


def size_of_image(path: str) -> tuple[int, int]:
    """Return height and width of an image, as `read_image` gives it, without decoding it.

    Raises:
        DecodeError: it is missing, no image, or holds several pictures.
    """
    from PIL import ExifTags

    with _opened(path) as image:
        is_turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return (image.width, image.height) if is_turned else (image.height, image.width)


@contextmanager
def _opened(path: str) -> Iterator["Image"]:
    from flashi2v_data.video.pictures import UNDECODABLE, is_animated, opened, reason_of

    check_file(path)
    try:
        with opened(path) as image:
            if is_animated(image):
                raise InputError("holds several pictures: save it as a video, or each by itself")
            yield image
    except InputError as error:
        raise DecodeError(path, str(error)) from None
    except UNDECODABLE as error:
        raise DecodeError(path, f"is no image that can be read: {reason_of(error)}") from error


def _telling(path: str) -> Callable[[str], None]:
    """Return what tells of an image what is not followed; the same is not said of others in a process."""

    def tell(words: str) -> None:
        if words not in _told:
            _told.add(words)
            logger.warning("%s: %s; of others the same is not said", path, words)

    return tell
