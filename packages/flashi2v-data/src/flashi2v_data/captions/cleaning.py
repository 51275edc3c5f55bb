"""Cleaning of training captions, and counting of what gets lost on the way to the text encoder.

Cleaned captions are in lower case, without web addresses, handles, file names and other debris. The reference also
deletes Chinese characters; here letters of every script stay, unless its cleaning is asked for. As it takes what stands
between two spaces for one word, scripts without spaces are set aside while the rules go over the text between them.
"""

import html
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, NamedTuple
from urllib.parse import unquote_plus

# Clean; leave as it is; or clean as the reference does, to the letter.
Cleaning = bool | Literal["reference"]

# Letters of scripts without spaces between words: Thai, Lao, Tibetan, Burmese, Khmer, kana, Chinese characters of all
# planes with their radicals and strokes, half-width kana; and the symbols among them.
_UNSPACED = (
    r"\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3031-\u3035\u3040-\u309f"
    r"\u30a1-\u9fff\uf900-\ufaff\uff66-\uff9f\U0001b000-\U0001b16f\U00020000-\U0003ffff"
)

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
    (rf"\b(?:{_SITE}(?!@)|([a-z0-9.\-]+))", r"\1"),  # what is not a site is kept, but not searched again
    (r"@\w+\b", ""),
    # Strokes, kana extensions, compatibility forms, hexagrams and ideographs; only the reference's cleaning meets any.
    (r"[\u31c0-\u9fff]+", ""),
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
    (rf"^\.[^\s{_UNSPACED}]+$", ""),
]
# Words that no rule and no repair of encodings touches, between spaces: of Latin letters alone, or of lower Greek,
# Cyrillic, Hebrew, Arabic, Devanagari or Hangul; but for these.
_SAFE_WORD = re.compile(
    "[a-zA-Z\u03b1-\u03c9\u0410-\u044f\u05d0-\u05ea\u0621-\u063a\u0641-\u064a\u0904-\u0939\uac00-\ud7a3]{2,}"
)
_UNSAFE_WORDS = {"png", "jpg", "jpeg", "bmp", "webp", "eps", "pdf", "apk", "mp4", "image", "images", "page"}
# A caption that begins so is kept at least so far. Nearly all do, and this is the quickest way to see it: words are
# looked up only where one of those begins with the same letter.
_UNSAFE_WORD = f"(?=[{''.join(word[0] for word in sorted(_UNSAFE_WORDS))}])(?:{'|'.join(sorted(_UNSAFE_WORDS))}) "
plain_start = re.compile(rf"\s*(?:[a-zA-Z] |)(?!(?i:{_UNSAFE_WORD}))[a-zA-Z]{{2,}} ").match
# Of unspaced letters: kana, Chinese characters and Thai, but no mark or sign.
_SAFE_LETTER = re.compile("[\u0e01-\u0e30\u3041-\u3096\u30a1-\u30fa\u3400-\u4dbf\u4e00-\u9fff]")


def clean_caption(caption: str, how: Cleaning = True) -> str:
    """Return the caption as the text encoder is trained on it; may be empty."""
    if how is False:
        return caption
    import ftfy  # takes a while, and commands that clean no caption should not wait for it

    text = unquote_plus(caption).strip().lower().replace("<person>", "person")
    text = _substitute(_unescape(re.sub(_TAG, "", text)), _DEBRIS, how)
    # More than three separators: a file name or slug, this-is-my-cute-cat.
    if len(re.findall(r"[-_]", text)) > 3:
        text = re.sub(r"[-_]", " ", text)
    text = _unescape(_unescape(ftfy.fix_text(text)))
    text = _substitute(text, _CODES, how).strip()
    # Repaired text may hold Chinese again, which the reference then keeps, but for a single word behind a full stop.
    edges = _EDGES if how is True else [*_EDGES[:-1], (r"^\.\S+$", "")]
    return _substitute(text, edges, "reference").strip()


def has_words(text: str) -> bool:
    """Tell whether a text holds anything to read: a letter, a digit or a picture such as an emoji."""
    return any((kind := unicodedata.category(letter))[0] in "LN" or kind == "So" for letter in text)


def becomes_empty(caption: str, how: Cleaning = True) -> bool:
    """Tell whether nothing to read is left of a caption; only what a quick look does not clear is cleaned for it."""
    return not (_is_surely_kept(caption, how) or has_words(clean_caption(caption, how)))


def _is_surely_kept(caption: str, how: Cleaning) -> bool:
    if plain_start(caption) is not None:
        return True
    if "<" in caption or "&" in caption or "%" in caption:  # tags, and what unescaping may turn into one
        return False
    for word in caption.split(None, 8)[:8]:
        if _SAFE_WORD.fullmatch(word) and word.lower() not in _UNSAFE_WORDS:
            return True
    return how is True and not caption.isascii() and _SAFE_LETTER.search(caption) is not None


class TextLoss(NamedTuple):
    """What the text encoder does not get of a text."""

    is_empty: bool = False  # there is nothing to read in it
    num_tokens: int = 0  # of the whole, where not all are read; else 0
    unknown: tuple[str, ...] = ()  # words or letters that the tokenizer does not know


@dataclass
class CaptionCount:
    """Counts captions of which the text encoder does not get all.

    Attributes:
        max_length: tokens that are read of each.
        total: captions counted.
        empty: those with nothing to read.
        cut: those of more than `max_length` tokens.
        longest: the most tokens of one.
        unknown: those with words or letters that the tokenizer does not know.
        words: these, and how many captions hold each.
        first: for each kind of loss, the clip that had it first.
    """

    max_length: int
    total: int = 0
    empty: int = 0
    cut: int = 0
    longest: int = 0
    unknown: int = 0
    words: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, loss: TextLoss, where: str) -> None:
        """Count the caption of a clip."""
        self.total += 1
        self.empty += loss.is_empty
        self.cut += loss.num_tokens > 0
        self.longest = max(self.longest, loss.num_tokens)
        self.unknown += bool(loss.unknown)
        self.words.update(set(loss.unknown))
        for kind, happened in (("empty", loss.is_empty), ("cut", loss.num_tokens), ("unknown", loss.unknown)):
            if happened:
                self.first.setdefault(kind, where)

    def merge(self, other: "CaptionCount") -> None:
        """Add what another has counted (in another process, say)."""
        for name in ("total", "empty", "cut", "unknown"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.longest = max(self.longest, other.longest)
        self.words += other.words
        self.first = {**other.first, **self.first}

    def lines(self) -> dict[str, str]:
        """Return one line for each kind of loss that occurred."""
        of_all = f"of {self.total} captions"
        found = {
            "empty": f"{self.empty} {of_all} are empty, or become so when cleaned, and train a model without text "
            "(drop_empty_captions leaves such clips out)",
            "cut": f"{self.cut} {of_all} have more than the {self.max_length} tokens that are read "
            f"(tokenizer_max_length), up to {self.longest}",
            "unknown": f"{self.unknown} {of_all} hold what the tokenizer does not know: {self._named()}",
        }
        return {
            kind: f"{line}; the first is of {where}" for kind, line in found.items() if (where := self.first.get(kind))
        }

    def _named(self) -> str:
        shown = [f"{word[:20]!r}" for word, _ in self.words.most_common(8)]
        return ", ".join(shown) + (f" and {len(self.words) - 8} more" if len(self.words) > 8 else "")


def _substitute(text: str, rules: list[tuple[str, str]], how: Cleaning) -> str:
    # In the reference's cleaning all is one run; else every other run is of unspaced letters, which no rule is shown.
    runs = [text] if how == "reference" else re.split(f"([{_UNSPACED}]+)", text)
    for number in range(0, len(runs), 2):
        for pattern, replacement in rules:
            runs[number] = re.sub(pattern, replacement, runs[number])
    return "".join(runs)


def _unescape(text: str) -> str:
    return html.unescape(re.sub(_LONG_REFERENCE, "\ufffd", text))
