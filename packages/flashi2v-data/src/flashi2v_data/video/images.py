"""Image files: clips of one frame, whose rate is any."""

import os

import numpy as np
from numpy.typing import NDArray

from flashi2v_data.errors import DecodeError
from flashi2v_data.video.index import check_file

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
FPS = 24.0
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")


def is_image(path: str | os.PathLike[str]) -> bool:
    """Tell whether a file is an image, by its name."""
    return os.fspath(path).lower().endswith(IMAGES)


def read_image(path: str) -> NDArray[np.uint8]:
    """Read an image as (H, W, 3), upright, over white where it is transparent; of several in a file the first.

    Raises:
        DecodeError: it is missing, damaged, has more than 8 bits a colour, or more pixels than Pillow takes for safe.
    """
    from PIL import Image, ImageOps

    check_file(path)
    try:
        with Image.open(path, formats=_FORMATS) as image:
            if image.mode.startswith(("I", "F")):
                raise DecodeError(path, f"has more than 8 bits a colour ({image.mode}): save it with 8")
            upright = ImageOps.exif_transpose(image)
            if upright.has_transparency_data:
                colours = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours)
            return np.asarray(upright.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DecodeError(path, f"is no image that can be read: {error}") from error
