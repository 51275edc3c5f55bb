"""From pictures as they are stored to upright ones of square pixels: for probe, filter and reader alike.

A file may say that its pictures are to be turned or mirrored (the display matrix, which telephones and front cameras
write) and that its pixels are no squares (the sample aspect ratio: a DVD of 720x576 is shown as 1024x576).
"""

import math
import struct
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

# "upright": as a player shows them. "reference": as the reference's decoder gives them, turned by the matrix's angle,
# never mirrored back, of the width and height that are stored.
Way = Literal["upright", "reference"]

# Pixels that are wider or higher than this are a fault of the file; following it could ask for any amount of memory.
_MOST_STRETCHED = 10


class Geometry(NamedTuple):
    """What turns a stored picture into an upright one.

    Attributes:
        transposed: rows become columns, before anything is mirrored.
        is_flipped_y: top and bottom change places.
        is_flipped_x: left and right change places.
        pixel_ratio: width over height of a stored pixel.
    """

    transposed: bool = False
    is_flipped_y: bool = False
    is_flipped_x: bool = False
    pixel_ratio: Fraction = Fraction(1)

    def stored_width(self, width: int) -> int:
        """Return the width that makes the pixels of a stored picture squares, its height being kept."""
        return max(1, round(width * self.pixel_ratio))

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width of what becomes of a stored picture."""
        width = self.stored_width(width)
        return (width, height) if self.transposed else (height, width)

    def turn(self, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Turn a picture (H, W, 3) whose pixels are squares already."""
        if self.transposed:
            picture = picture.transpose(1, 0, 2)
        step_y, step_x = -1 if self.is_flipped_y else 1, -1 if self.is_flipped_x else 1
        return np.ascontiguousarray(picture[::step_y, ::step_x])


def geometry_of(frame: Any, pixel_ratio: Fraction | None, way: Way) -> Geometry:
    """Read the geometry off a frame of PyAV.

    Args:
        frame: decoded.
        pixel_ratio: of the stream, where it says one.
        way: what is wanted.

    Raises:
        ValueError: the pixels are of a shape that nothing is filmed in.
    """
    if way == "reference":
        return BY_ANGLE[round(frame.rotation / 90) % 4]
    ratio = pixel_ratio or Fraction(1)
    if not Fraction(1, _MOST_STRETCHED) <= ratio <= _MOST_STRETCHED:
        raise ValueError(f"says that its pixels are {ratio.numerator}:{ratio.denominator}")
    matrix = frame.side_data.get("DISPLAYMATRIX")
    return (Geometry() if matrix is None else _orientation(bytes(matrix)))._replace(pixel_ratio=ratio)


# By the angle, in quarter turns against the clock.
BY_ANGLE = (Geometry(), Geometry(True, True, False), Geometry(False, True, True), Geometry(True, False, True))


def _orientation(matrix: bytes) -> Geometry:
    """Return the nearest of the eight orientations to a display matrix.

    It leads from a stored place (x, y) to (a x + c y, b x + d y), and holds a, b, u, c, d, v and further numbers.
    """
    a, b, _, c, d = struct.unpack("=5i", matrix[:20])
    if math.hypot(a, d) >= math.hypot(b, c):
        return Geometry(False, d < 0, a < 0)
    return Geometry(True, b < 0, c < 0)
