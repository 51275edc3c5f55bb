"""Pictures as viewers show them: upright, in sRGB, nothing transparent. H W height and width.

A file says more than its numbers: a colour profile, what it covers, which side is up. What is not followed is told.
"""

import io
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import ExifTags, Image, ImageCms

from flashi2v_data.errors import InputError

Tell: TypeAlias = Callable[[str], object]

# No others: some start programs (EPS), and few of Pillow's many are as well tried as these.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Bytes, pixels, and pixels times passes over them: a minute's decoding fits into a kilobyte of file.
_MOST_BYTES, _MOST_PIXELS, _MOST_WORK = 2**29, 2**26, 2**30
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
# All that Pillow was seen to raise on damaged bytes.
UNDECODABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    Image.DecompressionBombError,
)


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
        with path.open("rb") as file, Image.open(file, formats=FORMATS) as image:
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


def as_shown(image: Image.Image, tell: Tell) -> Image.Image:
    """Return a picture in mode RGB, upright and in sRGB; what is transparent lies on white.

    Args:
        image: perhaps not decoded yet; of several pictures the one it stands at.
        tell: takes words on what is not followed.

    Raises:
        InputError: it has more than 8 bits a channel.
        Exception: one of `UNDECODABLE`.
    """
    return _upright(image, _without_transparency(image, tell), tell)


def is_animated(image: Image.Image) -> bool:
    """Tell whether a file holds several pictures that stand for themselves."""
    return getattr(image, "is_animated", False) and image.format != "MPO"  # of a telephone, with its depth, say


def reason_of(error: BaseException) -> str:
    """Return what an error of reading says, as one phrase."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


def _without_transparency(image: Image.Image, tell: Tell) -> Image.Image:
    """Return a picture in sRGB."""
    image.load()
    if not image.has_transparency_data:
        return _in_srgb(_eight_bits(image), image, tell)
    if image.mode.startswith("I"):
        raise InputError("16 bits with a transparent colour are not read: convert the image to 8 bits")
    covered = image.convert("RGBA")
    alpha = covered.getchannel("A")
    is_grey = image.mode in ("L", "LA", "1")
    colours = _in_srgb(covered.getchannel("R") if is_grey else covered.convert("RGB"), image, tell)
    if alpha.getextrema() == (255, 255):
        return colours
    tell(f"its transparent parts are shown on {_BACKGROUND}")
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


def _in_srgb(colours: Image.Image, image: Image.Image, tell: Tell) -> Image.Image:
    """Return colours (L, RGB or CMYK) in sRGB, by the profile that the image carries."""
    profile = image.info.get("icc_profile")
    if not profile:
        if untold := _untold(colours, image):
            tell(f"{untold} is not followed, its colours are taken for sRGB")
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
        tell(f"its colour profile cannot be used, its colours are taken for sRGB: {reason_of(error)}")
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


def _upright(image: Image.Image, picture: Image.Image, tell: Tell) -> Image.Image:
    """Turn a picture as the EXIF data of the image that it was made from says."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except UNDECODABLE as error:
        tell(f"its EXIF data is damaged, it is taken as it lies: {reason_of(error)}")
        return picture
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return picture if turn is None else picture.transpose(turn)
