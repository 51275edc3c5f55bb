"""What a call of the pipeline is given, checked, and made one for each of its videos.

B videos, n of them for each prompt.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from flashi2v_data.errors import InputError
from flashi2v_data.loading.transforms import center_crop_resize, normalise, to_tensor
from flashi2v_infer.files.pictures import AnyImage, Pixels, as_pixels, read_image
from flashi2v_model import FlashI2VTransformer3DModel

Conditioning: TypeAlias = float | Sequence[float] | Tensor
Picture: TypeAlias = AnyImage | str | Path


def pictures_of(image: Picture | Sequence[Picture], num_prompts: int) -> list[Picture]:
    """Return pictures as a list: one for all prompts, or one for each.

    Raises:
        InputError: there are others.
    """
    found: list[Picture]
    if isinstance(image, (list, tuple)):
        found = list(image)
    elif isinstance(image, (np.ndarray, Tensor)) and image.ndim == 4:
        found = [image[i] for i in range(len(image))]
    else:
        found = [image]  # type: ignore[list-item]  # no other sequence is an image
    if not num_prompts or len(found) not in (1, num_prompts):
        raise InputError(
            f"give one image for all prompts, or one for each, got {len(found)} images and {num_prompts} prompts"
        )
    return found


def prepare_image(image: Picture, height: int, width: int) -> Tensor:
    """Resize and crop a picture as training does: (3, 1, height, width) in [-1, 1]."""
    pixels: Pixels = read_image(image, "image") if isinstance(image, (str, Path)) else as_pixels(image)
    return normalise(to_tensor(center_crop_resize(pixels[None], height, width)))


def texts_of(texts: str | Sequence[str], name: str) -> list[str]:
    """Return prompts as a list: a string is one of them, not a sequence of letters.

    Raises:
        InputError: naming `name`, one is no string.
    """
    found = [texts] if isinstance(texts, (str, bytes)) else list(texts)
    if odd := [type(text).__name__ for text in found if not isinstance(text, str)]:
        raise InputError(f"{name} must be a string or a list of them, got {odd[0]}")
    return found


def num_prompts_of(prompt: str | Sequence[str] | None, embeds: Tensor | None) -> int:
    """Return how many prompts there are.

    Raises:
        InputError: both are given, or none, or a prompt is no string.
    """
    if (prompt is None) == (embeds is None):
        raise InputError("give one of prompt and prompt_embeds")
    return len(embeds) if embeds is not None else len(texts_of(() if prompt is None else prompt, "prompt"))


def negatives_of(prompt: str | Sequence[str] | None, embeds: Tensor | None, num_prompts: int) -> list[str] | Tensor:
    """Return the negative prompts, or their states, one for each prompt.

    Raises:
        InputError: there are others, or both are given.
    """
    if embeds is not None and prompt is not None:
        raise InputError("give one of negative_prompt and negative_prompt_embeds")
    given: list[str] | Tensor = (
        texts_of("" if prompt is None else prompt, "negative_prompt") if embeds is None else embeds
    )
    if isinstance(given, list) and (prompt is None or isinstance(prompt, str)):
        given = given * num_prompts
    if len(given) != num_prompts:
        raise InputError(f"give one negative prompt, or one for each of {num_prompts} prompts, got {len(given)}")
    return given


def check_conditioning(transformer: FlashI2VTransformer3DModel, given: Collection[str]) -> None:
    """Refuse names of conditioning that are not those that a transformer asks for.

    Raises:
        InputError: naming both.
    """
    wanted = transformer.conditioning_names
    if sorted(given) != sorted(wanted):
        raise InputError(
            f"conditioning: this {type(transformer).__name__} asks for {', '.join(wanted) or 'none'}, got "
            f"{', '.join(sorted(given)) or 'none'}"
        )


def conditioning_tensors(given: Mapping[str, Conditioning], num_videos: int, device: torch.device) -> dict[str, Tensor]:
    """Return further tensors of the network, with a row for each video.

    Raises:
        InputError: a tensor has other rows.
    """
    tensors = {}
    for name, value in given.items():
        if isinstance(value, Tensor):
            if not value.ndim or len(value) != num_videos:
                raise InputError(f"conditioning: {name} must have a row for each of {num_videos} videos")
            tensors[name] = value.to(device, torch.float32)
            continue
        tensor = torch.tensor(value, dtype=torch.float32, device=device)
        tensors[name] = tensor.expand(num_videos, *tensor.shape)
    return tensors
