"""The small model that comes with the package: `flashi2v-infer --model demo`.

It knows flat shapes that move before a flat background, as `flashi2v-data shapes` draws them. docs/demo/README.md is
its model card: how it was trained, and how good it is.
"""

import json
import re
from functools import cache
from pathlib import Path

NAME = "demo"
_HERE = Path(__file__).parent
DIRECTORY = _HERE / "model"  # a pipeline in diffusers' layout
IMAGE = _HERE / "image.png"
PROMPT = "a large pink star moves quickly to the upper right on a dark blue background"
OTHER_PROMPT = "a small yellow circle moves slowly down on a grey background"
OUTPUT = "demo.mp4"

# The VAE repaints the first frames of 200 held-out scenes with 27 dB or more.
_KNOWN_PSNR = 25.0


def notes(prompt: str, vae_psnr: float) -> list[str]:
    """Return what to tell whoever asks the model for more than it knows.

    Args:
        prompt: of the video.
        vae_psnr: between the image and its reconstruction by the VAE alone, in dB.
    """
    found = []
    if unknown := sorted(set(re.findall(r"\w+", prompt.lower())) - known_words()):
        found.append(
            f"the demo model cannot read {', '.join(unknown)}: it was taught sentences like {PROMPT!r}, "
            f"of the words {', '.join(sorted(known_words()))}"
        )
    if vae_psnr < _KNOWN_PSNR:
        found.append(
            "the image is far from what the demo model knows, one flat shape before a flat background: "
            f"its VAE alone repaints it with {vae_psnr:.1f} dB PSNR"
        )
    return found


@cache
def known_words() -> frozenset[str]:
    """Return the words that the model's tokenizer knows."""
    vocabulary = json.loads((DIRECTORY / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    return frozenset(word for word in vocabulary if word.isalpha())
