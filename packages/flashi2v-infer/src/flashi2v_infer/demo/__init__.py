"""The small model that comes with the package: `flashi2v-infer --model demo`.

It knows flat shapes that move before a flat background, as `flashi2v-data shapes` draws them. docs/demo/README.md is
its model card: how it was trained, and how good it is.
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
PROMPT = "a large pink star moves quickly to the upper right on a dark blue background"
SENTENCES = (
    PROMPT,
    "a small yellow circle moves slowly down on a grey background",
    "a medium red square moves slowly to the left on a white background",
    "a large cyan ring stands still on a black background",
    "a small green triangle moves quickly up on a brown background",
)
OUTPUT = "demo.mp4"
_SHOWN = 384  # pixels of the shorter side of a file that people can look at

# The VAE repaints the first frames of 200 held-out scenes with 27 dB or more.
_KNOWN_PSNR = 25.0


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
        "the image is far from what the demo model knows, one flat shape before a flat background: "
        f"its VAE alone repaints it with {vae_psnr:.1f} dB PSNR"
    )


@cache
def known_words() -> frozenset[str]:
    """Return the words that the model's tokenizer knows."""
    vocabulary = json.loads((DIRECTORY / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    return frozenset(word for word in vocabulary if word.isalpha())


# What the model was taught, part by part, and the words that others may use for it.
_SIZES = {"small": "small tiny little", "large": "large big huge", "medium": "medium"}
_COLOURS = {word: word for word in ("red", "green", "blue", "yellow", "orange", "purple", "cyan", "pink")}
_SHAPES = {
    "circle": "circle ball disc dot",
    "square": "square box cube",
    "triangle": "triangle",
    "ring": "ring",
    "cross": "cross plus",
    "star": "star",
}
_PACES = {"quickly": "quickly fast rapidly quick", "slowly": "slowly slow gently"}
_HEIGHTS = {"upper": "up upper upwards top rises", "lower": "down lower downwards bottom falls"}
_SIDES = {"left": "left leftwards", "right": "right rightwards"}
_STILL = {"still": "still stands stays rests"}
_GROUNDS = {
    "dark blue": "blue",
    "dark green": "green",
    "black": "black",
    "white": "white",
    "grey": "grey gray",
    "brown": "brown",
}


def nearest_sentence(prompt: str) -> str:
    """Return the sentence that the model was taught which is nearest to a prompt."""
    subject, _, ground = prompt.lower().partition(" on ")

    def part(words: dict[str, str], text: str, default: str = "") -> str:
        meant = {other: word for word, others in words.items() for other in others.split()}
        near = (difflib.get_close_matches(word, meant, 1, 0.75) for word in re.findall(r"\w+", text))
        return next((meant[found[0]] for found in near if found), default)

    thing = f"{part(_SIZES, subject, 'medium')} {part(_COLOURS, subject, 'red')} {part(_SHAPES, subject, 'circle')}"
    height, side = part(_HEIGHTS, subject), part(_SIDES, subject)
    if part(_STILL, subject):
        motion = "stands still"
    else:
        alone = {"upper": "up", "lower": "down"}.get(height, "to the right")
        way = f"to the {height} {side}" if height and side else f"to the {side}" if side else alone
        motion = f"moves {part(_PACES, subject, 'slowly')} {way}"
    return f"a {thing} {motion} on a {part(_GROUNDS, ground, 'grey')} background"
