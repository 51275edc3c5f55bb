"""From the colours of HDR screens to those of others.

A picture with PQ or HLG (ITU-R BT.2100) that is read as any other looks pale: its numbers mean more light.
"""

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Values of the transfer characteristics, and of the matrix coefficients of BT.2020 (ITU-T H.273).
_PQ, _HLG, _BT2020 = 16, 18, 9
# Candela per square metre: of white that is lit as the scene is (BT.2408), and of the brightest that is kept apart.
_WHITE, _PEAK = 203.0, 1000.0
# Up to this part of white, light is shown as it is; what is brighter is pressed into the rest.
_KNEE = 0.5
# From the primaries of BT.2020 to those of BT.709, by rows (BT.2087).
_PRIMARIES = np.array(
    [[1.660491, -0.587641, -0.07285], [-0.124550, 1.1329, -0.008349], [-0.018151, -0.100579, 1.11873]], np.float32
)
_LEVELS = 4096


def is_hdr(frame: Any) -> bool:
    """Tell whether the colours of a frame of PyAV are meant for an HDR screen."""
    return frame.color_trc in (_PQ, _HLG)


def tone_mapped(frame: Any) -> NDArray[np.uint8]:
    """Return an HDR frame of PyAV as other screens show it, (H, W, 3) uint8 RGB of BT.709."""
    codes = frame.reformat(format="rgb48le", src_colorspace=_BT2020, dst_colorspace=_BT2020, threads=1).to_ndarray()
    light = _light(frame.color_trc)[codes]  # (H, W, 3), 1 for white
    if frame.color_trc == _HLG:
        # A screen shows bright scenes with more contrast (the OOTF of BT.2100, at 1000 cd/m2).
        luminance = light @ np.array([0.2627, 0.678, 0.0593], np.float32)
        light *= np.maximum(luminance, 1e-6)[..., None] ** 0.2 * (_PEAK / _WHITE)
    brightest = light.max(-1, keepdims=True)
    light *= _pressed(brightest) / np.maximum(brightest, 1e-6)
    levels = (light @ _PRIMARIES.T).clip(0, 1) * (_LEVELS - 1)
    return _shown()[levels.astype(np.uint16)]


@functools.cache
def _light(transfer: int) -> NDArray[np.float32]:
    """Return the light that each code of 16 bits stands for (BT.2100): of PQ in whites, of HLG in the scene's peaks."""
    code = np.arange(1 << 16) / ((1 << 16) - 1)
    if transfer == _HLG:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        return np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12).astype(np.float32)
    root = code ** (1 / 78.84375)
    ratio = np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)
    return (10_000 / _WHITE * ratio ** (1 / 0.1593017578125)).astype(np.float32)


def _pressed(light: NDArray[np.float32]) -> NDArray[np.float32]:
    """Bring light from 0 ... peak to 0 ... 1, by the Moebius curve that leaves the knee without a bend."""
    peak, knee = _PEAK / _WHITE, _KNEE
    a = -(knee**2) * (peak - 1) / (knee**2 - 2 * knee + peak)
    b = (knee**2 - 2 * knee * peak + peak) / (peak - 1)
    bright = (b**2 + 2 * b * knee + knee**2) / (b - a) * (light + a) / (light + b)
    pressed: NDArray[np.float32] = np.where(light <= knee, light, np.minimum(bright, 1)).astype(np.float32)
    return pressed


@functools.cache
def _shown() -> NDArray[np.uint8]:
    """Return the codes of 8 bits for levels of light, as a screen by BT.1886 shows them."""
    return (np.linspace(0, 1, _LEVELS) ** (1 / 2.4) * 255).round().astype(np.uint8)
