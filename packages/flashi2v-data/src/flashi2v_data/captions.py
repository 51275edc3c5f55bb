"""Cleaning of training captions: lower case, without web addresses, handles, file names and other debris."""

import html
import re
from urllib.parse import unquote_plus

import ftfy

_SITE = r"[a-z0-9.\-]+\.(?:com|co|ru|net|org|edu|gov|it)\b[\w/\-]*"
_FILE_TYPES = r"(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)"

# A caption may be any text of any length, so no pattern may go through a run of characters once for every place in it:
# one that takes a run without limit begins at the run's start only, and takes it in one way only.

# Not the standard library's parser, which in some releases takes minutes over text of many "<", and of which others
# drop, rather than keep, what follows a tag without an end.
_TAG = r"<[a-z/!?][^<>]*>"
# Python refuses to read a number of thousands of digits; none of more than 20 is a character.
_LONG_REFERENCE = r"&#\d{20,};?"

# Applied in this order, before the text's encoding is repaired.
_DEBRIS = [
    (r"https?:/{1,3}", ""),
    (rf"\b(?:{_SITE}(?!@)|([a-z0-9.\-]+))", r"\1"),  # what is no site is kept, but not searched again
    (r"@\w+\b", ""),
    # Chinese, Japanese and Korean writing: strokes, kana extensions, compatibility forms, hexagrams, ideographs.
    (r"[\u31c0-\u31ef\u31f0-\u31ff\u3200-\u33ff\u3400-\u4dbf\u4dc0-\u4dff\u4e00-\u9fff]+", ""),
    # Every kind of dash and quotation mark becomes the plain one.
    (
        r"[\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d-]+",
        "-",
    ),
    ("[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),
    ("[\u2018\u2019]", "'"),
    (r"&quot;?|&amp", ""),
    (r"\d{1,3}(?:\.\d{1,3}){3}", " "),  # IP addresses
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),  # a line break that was escaped twice
    (r"#\d{1,3}\b|#\d{5,}\b|\b\d{6,}\b", ""),  # article numbers
    (rf"(?<!\S)\S+\.{_FILE_TYPES}", ""),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*]+", " "),
    (r"(?<!\s)\s+\.\s+", " "),
]
# Applied after it: codes such as jc6640, leftovers of file names and sizes such as 1080x720, then spacing.
_CODES = [
    (r"\b[a-z]{1,3}\d{3,15}\b", ""),
    (r"\b[a-z]+\d+[a-z]+\b", ""),
    (r"\b\d+[a-z]+\d+\b", ""),
    (rf"\b{_FILE_TYPES}\b(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-z]+\d+[a-z]+\d[a-z\d]*\b", " "),
    (r"\b\d+(?:\.\d*)?[x\u0445\u00d7]\d+(?:\.\d*)?\b", ""),
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
]
_EDGES = [
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
]


def clean_caption(caption: str) -> str:
    """Return the caption as the text encoder is trained on it; may be empty."""
    text = unquote_plus(caption).strip().lower().replace("<person>", "person")
    text = _substitute(_unescape(re.sub(_TAG, "", text)), _DEBRIS)
    # More than three separators: a file name or slug, this-is-my-cute-cat.
    if len(re.findall(r"[-_]", text)) > 3:
        text = re.sub(r"[-_]", " ", text)
    text = _unescape(_unescape(ftfy.fix_text(text)))
    text = _substitute(text, _CODES).strip()
    return _substitute(text, _EDGES).strip()


def _substitute(text: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


def _unescape(text: str) -> str:
    return html.unescape(re.sub(_LONG_REFERENCE, "\ufffd", text))
