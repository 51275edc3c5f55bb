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
    ],
)
def test_debris_of_the_web_is_removed(raw, clean):
    assert clean_caption(raw) == clean
