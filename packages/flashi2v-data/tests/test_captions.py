# ruff: noqa: RUF001 (letters of all scripts)
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashi2v_data.captions.cleaning import CaptionCount, TextLoss, becomes_empty, clean_caption, has_words

PAIRS = json.loads(Path(__file__).with_name("data_cases.json").read_text(encoding="utf-8"))["text_preprocessing"]
WITH_CHINESE = ["中文 test", "test"]


@pytest.mark.parametrize(("raw", "clean"), PAIRS)
def test_captions_are_cleaned_as_by_the_reference(raw, clean):
    assert clean_caption(raw, "reference") == clean
    assert clean_caption(raw) == (clean if [raw, clean] != WITH_CHINESE else raw)
    assert clean_caption(raw, False) == raw


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("一只猫在草地上奔跑", None),
        ("一隻貓,兩隻狗", None),
        ("スーパーで買い物をする女性・東京", None),
        ("고양이가 풀밭에서 달린다", None),
        ("Кошка бежит по траве", "кошка бежит по траве"),
        ("القطة تجري على العشب", None),
        ("חתול רץ על הדשא", None),
        ("हिन्दी में एक बिल्ली", None),
        ("แมววิ่งบนหญ้า", None),
        ("𠮷野家の牛丼 ㈱ 々 〆", None),
        ("CAFÉ Việt Nam", "café việt nam"),  # combining marks join their letters
        ("🐱 ❤️ 👨‍👩‍👧", None),
        # Full-width letters and signs become plain ones, half-width kana full ones; Chinese punctuation stays.
        ("Ａ　ＣＡＴ，ｒｕｎｓ！（ﾈｺｶﾞ）。「猫」", "a cat, runs!(ネコガ)。「猫」"),
        # Debris goes from among letters that no space parts from it, and takes none of them along.
        ("看photo.jpg吧", "看吧"),
        ("猫.jpg", "猫."),
        ("访问www.example.com/路径看视频", "访问路径看视频"),
        ("请看@user在草地上@小明奔跑", "请看在草地上 小明奔跑"),
        ("jc6640一辆红车1080x720", "一辆红车"),
        (".一只猫", None),
        ("&lt;猫&gt; &#20013;%E6%96%87", "<猫> 中文"),
    ],
)
def test_letters_of_every_script_stay(raw, clean):
    assert clean_caption(raw) == (raw if clean is None else clean)


@pytest.mark.parametrize("how", [True, "reference"])
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
def test_debris_of_the_web_is_removed(raw, clean, how):
    assert clean_caption(raw, how) == clean


# Seconds where time grows with length, hours where it grows with its square.
@pytest.mark.timeout(600)
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
        "猫" * 100_000,
        "猫a1." * 25_000,
    ):
        assert len(clean_caption(text)) < 200_000


@pytest.mark.parametrize(
    "caption", ["", " ", "...", "。，！", "http://www.pets.com", "<b></b>", "@user", "%20", "a.jpg"]
)
def test_captions_that_become_empty_are_known(caption):
    assert becomes_empty(caption)
    assert becomes_empty(caption, "reference")


def test_chinese_becomes_empty_only_by_the_cleaning_of_the_reference():
    assert becomes_empty("一只猫,在草地上。", "reference")
    assert not becomes_empty("一只猫,在草地上。")
    assert not becomes_empty("a 猫", "reference")
    assert becomes_empty("...", False)
    assert not becomes_empty("@user", False)
    assert not becomes_empty("🐱")


_PARTS = [*"a.-@#<&%x:'\"猫ね。Ñйก ", "dog", "png", "images", "page", "12", "\\n", "вЂ“", "Рђ", "한글", "â€œ", "αβ"]
_PARTS += ["http://", "www.", ".com", ".jpg", "  ", "\u0301", "\ufeff"]


@given(st.lists(st.sampled_from(_PARTS), max_size=8).map("".join), st.sampled_from([True, "reference", False]))
def test_the_quick_look_agrees_with_the_cleaning(caption, how):
    assert becomes_empty(caption, how) == (not has_words(clean_caption(caption, how)))


def test_losses_are_counted_and_named():
    count, other = CaptionCount(8), CaptionCount(8)
    for number in range(3):
        count.add(TextLoss(), f"{number}.mp4")
    assert count.lines() == {}
    count.add(TextLoss(is_empty=True), "a.mp4")
    count.add(TextLoss(num_tokens=12, unknown=("purple",)), "b.mp4")
    other.add(TextLoss(num_tokens=9, unknown=("purple", "猫")), "c.mp4")
    count.merge(other)
    lines = count.lines()
    assert lines["empty"].startswith("1 of 6 captions are empty, or become so")
    assert "2 of 6 captions have more than the 8 tokens that are read (tokenizer_max_length), up to 12" in lines["cut"]
    assert (
        lines["unknown"]
        == "2 of 6 captions hold what the tokenizer does not know: 'purple', '猫'; the first is of b.mp4"
    )
