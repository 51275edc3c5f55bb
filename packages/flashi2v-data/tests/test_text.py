"""The signal text: captions that are burnt into the picture."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from flashi2v_data.shapes.films import draw_film
from flashi2v_data.signals.text import Text

pytest.importorskip("rapidocr")
pytest.importorskip("onnxruntime")

SENTENCES = ("Subscribe now for more", "Chapter 12: the return", "www.example.com")


@pytest.fixture(scope="module")
def signal() -> Text:
    return Text()


def captioned(frames: np.ndarray, text: str, size: int, place: tuple[int, int]) -> tuple[np.ndarray, float]:
    """Draw a text into every frame, and return the share of the picture that it takes."""
    font = ImageFont.load_default(size)
    drawn = []
    for frame in frames:
        picture = Image.fromarray(frame)
        draw = ImageDraw.Draw(picture)
        left, top, right, bottom = draw.textbbox(place, text, font=font)
        draw.text(place, text, font=font, fill="white", stroke_width=2, stroke_fill="black")
        drawn.append(np.asarray(picture))
    return np.stack(drawn), (right - left) * (bottom - top) / (frames.shape[1] * frames.shape[2])


@pytest.mark.parametrize(("index", "size"), [(0, 18), (1, 26), (2, 36)])
def test_a_drawn_caption_is_found_and_measured(measured, signal, index, size):
    frames = draw_film("motion", 4, index, 3, 288, 512)
    drawn, share = captioned(frames, SENTENCES[index], size, (30, 200))
    found = measured(signal, drawn)["text_area"]
    assert share <= found <= 2.5 * share + 0.01


@pytest.mark.parametrize("captions", ["looks", "motion"])
def test_shapes_and_drawings_are_no_text(measured, signal, captions):
    for index in range(3):
        assert measured(signal, draw_film(captions, 2, index, 3, 240, 416))["text_area"] == 0


def test_text_that_comes_late_counts(measured, signal):
    frames = draw_film("motion", 4, 0, 49, 240, 416)
    frames[40:] = captioned(frames[40:], SENTENCES[0], 26, (20, 160))[0]
    assert measured(signal, frames)["text_area"] > 0.01
    assert measured(signal, frames, cut=[0, 40])["text_area"] == 0
