"""What a video will be, drawn in the terminal while it is sampled: two pixels a character, as half blocks."""

import os
import shutil
import sys
from typing import Any, TextIO

import numpy as np
from diffusers.callbacks import PipelineCallback
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from flashi2v_data.errors import InputError
from flashi2v_infer.pipeline import FlashI2VPipeline, StepCallback

_ROWS, _COLUMNS, _NARROWEST = 12, 24, 4  # characters of a frame
_GAP = 1


def can_draw(stream: TextIO) -> bool:
    """Return whether a stream is a terminal that shows colours."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb") and not os.environ.get("NO_COLOR")


class TerminalPreview(PipelineCallback):
    """Draws every latent frame side by side after each step, over what it drew before.

    Args:
        pipeline: whose latents are drawn.
        on_step_end: is called first.
    """

    tensor_inputs = ["denoised"]  # noqa: RUF012 (diffusers declares it so)

    def __init__(self, pipeline: FlashI2VPipeline, on_step_end: StepCallback) -> None:
        super().__init__()
        self._pipeline, self._on_step_end = pipeline, on_step_end
        self._height = 0

    def can_be_seen(self, wanted: bool | None) -> bool:
        """Return whether to draw.

        Args:
            wanted: None where standard error is a terminal and the VAE has a map.

        Raises:
            InputError: it is wanted, and the terminal or the VAE does not allow it.
        """
        if wanted is False or (wanted is None and not can_draw(sys.stderr)):
            return False
        try:
            if not can_draw(sys.stderr):
                raise InputError("--preview: standard error is no terminal that shows colours")
            self._pipeline.preview_map()
        except InputError:
            if wanted:
                raise
            return False
        return True

    def callback_fn(
        self, pipeline: FlashI2VPipeline, step: int, timestep: Any, tensors: dict[str, Tensor]
    ) -> dict[str, Any]:
        """Draw where a step leads, latents (1, C, F, h, w)."""
        self._on_step_end(pipeline, step, timestep, tensors)
        pictures = pipeline.preview(tensors["denoised"])[0]
        width = min(_COLUMNS, shutil.get_terminal_size().columns // len(pictures) - _GAP)
        if width < _NARROWEST:
            return {}
        lines = half_blocks(_side_by_side(pictures, width), true_colours="COLORTERM" in os.environ)
        with tqdm.external_write_mode(file=sys.stderr):
            if self._height:
                sys.stderr.write(f"\x1b[{self._height}F")
            sys.stderr.write("\n".join(lines) + "\n")
        self._height = len(lines)
        return {}


def _side_by_side(pictures: list[Image.Image], width: int) -> NDArray[np.uint8]:
    """Return (rows, columns, 3), the rows an even number."""
    first = pictures[0]
    height = min(2 * _ROWS, max(2, round(width * first.height / first.width / 2) * 2))
    shown = [np.asarray(picture.resize((width, height), Image.Resampling.BOX)) for picture in pictures]
    gap = np.zeros((height, _GAP, 3), np.uint8)
    return np.concatenate([part for picture in shown for part in (picture, gap)][:-1], 1)


def half_blocks(pixels: NDArray[np.uint8], *, true_colours: bool) -> list[str]:
    """Return lines of a terminal that show (2 rows, columns, 3): the upper pixel is the block, the lower one behind."""

    def colour(pixel: NDArray[np.uint8]) -> str:
        red, green, blue = (int(value) for value in pixel)
        if true_colours:
            return f"2;{red};{green};{blue}"
        level = [round(value / 51) for value in (red, green, blue)]  # of the cube of 6 x 6 x 6
        return f"5;{16 + 36 * level[0] + 6 * level[1] + level[2]}"

    rows = zip(pixels[::2], pixels[1::2])
    return [
        "".join(f"\x1b[38;{colour(up)};48;{colour(low)}m\u2580" for up, low in zip(upper, lower)) + "\x1b[0m"
        for upper, lower in rows
    ]
