import json
from pathlib import Path

import pytest

from flashi2v_data.captions import clean_caption

PAIRS = json.loads(Path(__file__).with_name("data_cases.json").read_text(encoding="utf-8"))["text_preprocessing"]


@pytest.mark.parametrize(("raw", "clean"), PAIRS)
def test_captions_are_cleaned_as_by_the_reference(raw, clean):
    assert clean_caption(raw) == clean


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("<b>Bold</b> &amp; <i>thin</i> lines", "bold thin lines"),
        ("holiday.jpg of a beach", "of a beach"),
        ("call 192.168.0.1 now", "call now"),
        ("jc6640 a red car 6640vc231", "a red car"),
        ('"A quoted sentence"', "a quoted sentence"),
        ("5 < 6 dogs", "5 < 6 dogs"),
        ("", ""),
        ("a,b.c", "a, b. c"),
        ("an <img src=x> a <!-- note --> b", "an a b"),
        ("a <b without an end", "a <b without an end"),
        ("&#" + "1" * 5000 + "; a", "\ufffd a"),
    ],
)
def test_debris_of_the_web_is_removed(raw, clean):
    assert clean_caption(raw) == clean


@pytest.mark.timeout(20)
def test_no_text_takes_time_beyond_its_length():
    for text in (
        "a" * 100_000,
        "a1" * 50_000,
        "<" * 100_000,
        "x" + " " * 100_000 + "x",
        "a." * 50_000,
        "." * 100_000,
        "<a " * 33_333,
        "<!--" * 25_000,
        "a1a" + "1" * 100_000 + "_",
        "1x" + "1" * 100_000 + "_",
        "a.com@" * 16_000,
    ):
        assert len(clean_caption(text)) < 200_000
