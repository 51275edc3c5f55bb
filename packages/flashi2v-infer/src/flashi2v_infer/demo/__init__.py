"""The small model that comes with the package: `flashi2v-infer --model demo`.

It takes the look from any simple picture, and the motion from the words. docs/demo/README.md is its model card: how it
was trained, and how good it is.
"""

import difflib
import json
import re
from functools import cache
from pathlib import Path

NAME = "demo"
_HERE = Path(__file__).parent
DIRECTORY = _HERE / "model"  # a pipeline in diffusers' layout
IMAGE = _HERE / "image.png"
PROMPT = "it moves to the right"
SENTENCES = (
    PROMPT,
    "it drifts slowly upwards",
    "it flies to the lower left",
    "the star moves down, the rest stays",
    "it stays where it is",
)
OUTPUT = "demo.mp4"
_SHOWN = 384  # pixels of the shorter side of a file that people can look at

# The VAE repaints the first frames of 200 held-out stories with 24.3 dB or more.
_KNOWN_PSNR = 24.0


def scale_of(height: int, width: int) -> int:
    """Return how many times a video of this size is enlarged for people to look at."""
    return -(-_SHOWN // min(height, width))


def prompt_note(prompt: str) -> str | None:
    """Say which words of a prompt the model's tokenizer does not know, and which sentence comes next to it."""
    unknown = sorted(set(re.findall(r"\w+", prompt.lower())) - known_words())
    if not unknown:
        return None
    nearest = nearest_sentence(prompt)
    return f"the demo model cannot read {', '.join(unknown)}; the nearest sentence that it knows: {nearest!r}"


def image_note(vae_psnr: float) -> str | None:
    """Say that an image is far from what the model knows.

    Args:
        vae_psnr: between the image and its reconstruction by the VAE alone, in dB.
    """
    if vae_psnr >= _KNOWN_PSNR:
        return None
    return (
        "the image is far from what the demo model knows, drawings of few colours before simple backgrounds: "
        f"its VAE alone repaints it with {vae_psnr:.1f} dB PSNR"
    )


@cache
def known_words() -> frozenset[str]:
    """Return the words that the model's tokenizer knows."""
    vocabulary = json.loads((DIRECTORY / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    return frozenset(word for word in vocabulary if word.isalpha())


# What a sentence tells of a motion, part by part, and the words that tell it.
_PARTS = {
    "still": {"still": "still stay stays stand stands rest rests keep keeps remain remains freeze freezes"},
    "height": {
        "upper": "up upper upwards upward top above rise rises climb climbs",
        "lower": "down lower downwards downward bottom below fall falls sink sinks",
    },
    "side": {"left": "left leftwards leftward", "right": "right rightwards rightward"},
    "pace": {
        "quickly": "quickly fast rapidly quick swiftly fly flies race races rush rushes dart darts speed zoom zooms",
        "slowly": "slowly slow gently leisurely drift drifts creep creeps float floats crawl crawls",
    },
}
_MEANT = {
    word: (part, meaning)
    for part, meanings in _PARTS.items()
    for meaning, words in meanings.items()
    for word in words.split()
}


def nearest_sentence(prompt: str) -> str:
    """Return a sentence that the model knows and that tells the same motion; where a prompt tells none, a default."""
    told: dict[str, str] = {}
    for word in re.findall(r"\w+", prompt.lower()):
        for found in difflib.get_close_matches(word, _MEANT, 1, 0.8):
            part, meaning = _MEANT[found]
            told.setdefault(part, meaning)
    height, side, pace = told.get("height"), told.get("side"), told.get("pace")
    if "still" in told and not (height or side):
        return "it stays where it is"
    if height and side:
        way = f"to the {height} {side}"
    elif height:
        way = {"upper": "up", "lower": "down"}[height]
    else:
        way = f"to the {side or 'right'}"
    return " ".join(word for word in ("it moves", pace, way) if word)
