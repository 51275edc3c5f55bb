"""How much of the picture is covered by text: captions, titles, watermarks.

Text is found and read by PP-OCR v6, whose weights RapidOCR's wheel brings. What cannot be read is none, nor is a single
letter, as round things are read as O.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from flashi2v_data.signals.clip import Clip, Frames
from flashi2v_data.signals.libraries import versions
from flashi2v_data.signals.protocol import Column

# Burnt-in text stays for seconds. It is read at a size where a caption's letters still have some ten pixels.
FEW = Frames(most=3, size=480)
_LONGEST_SIDE = 960
_LEAST_LETTERS = 2  # of a line, or digits


def text_area(reader: Any, frame: NDArray[np.uint8]) -> float:
    """Return which share of a frame (H, W, 3), RGB, text covers: that of the quadrilaterals around its lines.

    Args:
        reader: `make_reader()`.
        frame: as above.
    """
    found = reader(np.ascontiguousarray(frame[..., ::-1]), use_cls=False)
    mask = Image.new("1", (frame.shape[1], frame.shape[0]))
    draw = ImageDraw.Draw(mask)
    for box, text in () if found.boxes is None else zip(found.boxes, found.txts):  # box: (4, 2), (right, down)
        if sum(map(str.isalnum, text)) >= _LEAST_LETTERS:
            draw.polygon([(float(right), float(down)) for right, down in box], fill=1)
    return float(np.asarray(mask).mean())


def make_reader() -> Any:
    """Return a RapidOCR that uses one thread, and makes no picture larger than it is."""
    from rapidocr import RapidOCR

    threads = dict.fromkeys(
        ("EngineConfig.onnxruntime.intra_op_num_threads", "EngineConfig.onnxruntime.inter_op_num_threads"), 1
    )
    size = {"Det.limit_type": "max", "Det.limit_side_len": _LONGEST_SIDE}
    return RapidOCR(params={"Global.log_level": "error", **threads, **size})


class Text:
    """The signal `text`: the largest share that text covers, of the frames that are looked at."""

    name = "text"
    licence = "Apache-2.0 AND MIT"  # code and weights of RapidOCR and PP-OCR; onnxruntime
    columns: Mapping[str, Column] = {"text_area": float}
    frames: Sequence[Frames] = (FEW,)

    def __init__(self) -> None:
        self.version = f"1, {versions(self.name, rapidocr=('rapidocr',), onnxruntime=('onnxruntime',))}"
        self._reader: Any = None

    def __reduce__(self) -> tuple[type["Text"], tuple[()]]:
        """Travel to another process without the weights."""
        return Text, ()

    def __call__(self, clip: Clip) -> Mapping[str, Any]:
        """Read some frames of a clip."""
        if self._reader is None:
            self._reader = make_reader()
        return {"text_area": round(max(text_area(self._reader, frame) for frame in clip.frames(FEW)), 4)}
