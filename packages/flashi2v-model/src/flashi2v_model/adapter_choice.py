"""The LoRA adapters that a command is asked for. Nothing heavy is imported, so that a mistake is reported at once."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from flashi2v_model.errors import InputError


@dataclass(frozen=True)
class AdapterChoice:
    """An adapter and its weight.

    Attributes:
        source: a file, a directory, or a hub id (owner/name, or owner/name/file.safetensors).
        scale: its weight.
    """

    source: str
    scale: float = 1.0

    def __str__(self) -> str:
        return f"{self.source}:{self.scale:g}"


def read_choices(texts: Iterable[str]) -> tuple[AdapterChoice, ...]:
    """Read what stands as FILE, or as FILE:SCALE; a file whose own name ends so is taken as it is.

    Raises:
        InputError: a name is empty, or a scale infinite.
    """
    return tuple(map(_choice, texts))


def _choice(text: str) -> AdapterChoice:
    source, colon, number = text.rpartition(":")
    try:
        scale = float(number) if colon and not Path(text).exists() else None
    except ValueError:
        scale = None
    choice = AdapterChoice(text) if scale is None else AdapterChoice(source, scale)
    if not choice.source or not math.isfinite(choice.scale):
        raise InputError(f"lora: {text!r} is to be FILE or FILE:SCALE, such as style.safetensors:0.8")
    return choice
