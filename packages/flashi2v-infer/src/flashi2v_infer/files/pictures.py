"""Pictures as viewers show them: upright, in sRGB, nothing transparent. H W height and width.

A file says more than its numbers: a colour profile, what it covers, which side is up. What is not followed is logged.
"""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError
from torch import Tensor

from flashi2v_data.errors import InputError
from flashi2v_model.errors import UNREADABLE, reason_of

logger = logging.getLogger(__name__)

Pixels: TypeAlias = NDArray[np.uint8]
AnyImage: TypeAlias = Image.Image | NDArray[np.generic] | Tensor

# No others: some start programs (EPS), and few of Pillow's many are as well tried as these.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Bytes, pixels, and pixels times passes over them: a minute's decoding fits into a kilobyte of file.
_MOST_BYTES, _MOST_PIXELS, _MOST_WORK = 2**29, 2**26, 2**30
_LONGEST = 50  # times the other side; the video's size is cut out of the picture
_JPEG_SCAN = b"\xff\xda"
_BACKGROUND = "white"  # as most viewers have it
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # of a profile's colours
_SRGB_GAMMA, _SRGB_POINTS = 0.45455, (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
UNDECODABLE = (*UNREADABLE, SyntaxError, Image.DecompressionBombError)


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
        reason = f"not an image of a known format ({', '.join(_FORMATS)})"
    except UNDECODABLE as error:
        reason = f"cannot be read: {reason_of(error)}"
    raise InputError(f"{where}: {path}: {reason}")


@contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """Open a picture without decoding it; one that would take unreasonable time or memory is refused.

    Raises:
        InputError: it would.
        Exception: one of `UNDECODABLE`, here or when it is decoded.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise InputError("not a regular file")  # a pipe would be waited for
    if (size := path.stat().st_size) > _MOST_BYTES:
        raise InputError(f"it has {size:,} bytes, more than the {_MOST_BYTES:,} that are read")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what matters of them is an error here
        with path.open("rb") as file, Image.open(file, formats=_FORMATS) as image:
            pixels = image.width * image.height
            if pixels > _MOST_PIXELS:
                raise InputError(
                    f"{image.width} x {image.height} is more than {_MOST_PIXELS:,} pixels: make it smaller"
                )
            if image.format in ("JPEG", "MPO") and pixels * _num_scans(path) > _MOST_WORK:
                raise InputError("a JPEG of so many passes takes too long: save it anew")
            yield image


def _num_scans(path: Path) -> int:
    with path.open("rb") as file:
        return sum(block.count(_JPEG_SCAN) for block in iter(lambda: file.read(2**20), b""))


def as_pixels(image: AnyImage, name: str = "the image") -> Pixels:
    """Return a picture as (H, W, 3).

    Args:
        image: PIL, or an array (H, W, 3), or a tensor (3, H, W); numbers are uint8, or floats in [0, 1].
        name: for what is said of it.

    Raises:
        InputError: it is something else, or far too long for its width.
    """
    if isinstance(image, Image.Image):
        pixels = np.array(_upright(image, _without_transparency(image, name), name))
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


def _without_transparency(image: Image.Image, name: str) -> Image.Image:
    """Return a picture in sRGB; what is transparent lies on white."""
    image.load()
    if getattr(image, "is_animated", False) and image.format != "MPO":  # of a telephone, with its depth, say
        logger.warning("%s: it holds several pictures, of which the first is taken", name)
    if not image.has_transparency_data:
        return _in_srgb(_eight_bits(image), image, name)
    if image.mode.startswith("I"):
        raise InputError("16 bits with a transparent colour are not read: convert the image to 8 bits")
    covered = image.convert("RGBA")
    alpha = covered.getchannel("A")
    is_grey = image.mode in ("L", "LA", "1")
    colours = _in_srgb(covered.getchannel("R") if is_grey else covered.convert("RGB"), image, name)
    if alpha.getextrema() == (255, 255):
        return colours
    logger.warning("%s: its transparent parts are shown on %s", name, _BACKGROUND)
    whole = Image.new("RGB", colours.size, _BACKGROUND)
    whole.paste(colours, mask=alpha)
    return whole


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return a picture in mode L, RGB or CMYK."""
    if image.mode.startswith("I;16") and getattr(image, "tag_v2", {}).get(ExifTags.Base.BitsPerSample, (16,)) == (16,):
        wide = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode.startswith(("I", "F")):
        raise InputError(f"PIL mode {image.mode} has more than 8 bits per channel: convert the image to 8 bits")
    return image if image.mode in ("L", "RGB", "CMYK") else image.convert("L" if image.mode == "1" else "RGB")


def _in_srgb(colours: Image.Image, image: Image.Image, name: str) -> Image.Image:
    """Return colours (L, RGB or CMYK) in sRGB, by the profile that the image carries."""
    profile = image.info.get("icc_profile")
    if not profile:
        if untold := _untold(colours, image):
            logger.warning("%s: %s is not followed, its colours are taken for sRGB", name, untold)
        return colours.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _MODES[source.profile.xcolor_space.strip()]
        if mode != colours.mode and (mode, colours.mode) != ("RGB", "L"):
            raise ValueError(f"a profile of {mode} for {colours.mode}")
        intent = ImageCms.Intent(ImageCms.getDefaultIntent(source))
        flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", intent, flags)
        if _is_srgb(transform, mode):  # whose every conversion would lose a level here and there
            return colours.convert("RGB")
        converted = ImageCms.applyTransform(colours.convert(mode), transform)
        assert converted is not None
        return converted
    except (ImageCms.PyCMSError, OSError, KeyError, ValueError, TypeError) as error:
        logger.warning(
            "%s: its colour profile cannot be used, its colours are taken for sRGB: %s", name, reason_of(error)
        )
        return colours.convert("RGB")


def _is_srgb(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Tell whether colours keep their numbers, up to rounding."""
    if mode == "CMYK":
        return False
    steps = np.arange(0, 256, 15, dtype=np.uint8)
    grid = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(-1, 18, 3)
    probe = Image.fromarray(grid if mode == "RGB" else grid[..., 0])
    shown = ImageCms.applyTransform(probe, transform)
    return bool(np.abs(np.asarray(shown, int) - np.asarray(probe.convert("RGB"), int)).max() <= 2)


def _untold(colours: Image.Image, image: Image.Image) -> str:
    """Say by what, other than a profile, a picture tells that its colours are not sRGB."""
    if colours.mode == "CMYK":
        return "which inks CMYK is meant for"
    info = image.info
    points = info.get("chromaticity", _SRGB_POINTS)
    is_near = np.allclose(points, _SRGB_POINTS, atol=0.01) and abs(info.get("gamma", _SRGB_GAMMA) - _SRGB_GAMMA) < 0.02
    if "srgb" not in info and not is_near:
        return "what its chunks gAMA and cHRM say"
    try:
        interoperability = image.getexif().get_ifd(ExifTags.IFD.Interop).get(ExifTags.Interop.InteropIndex)
    except UNDECODABLE:
        return ""  # that it is damaged is logged where it is read for the orientation
    return "Adobe RGB, of which its EXIF data speaks," if interoperability == "R03" else ""


def _upright(image: Image.Image, picture: Image.Image, name: str) -> Image.Image:
    """Turn a picture as the EXIF data of the image that it was made from says."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except UNDECODABLE as error:
        logger.warning("%s: its EXIF data is damaged, it is taken as it lies: %s", name, reason_of(error))
        return picture
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return picture if turn is None else picture.transpose(turn)
