"""The text encoder's tokenizer."""

import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flashi2v_data.errors import InputError


class TextTokens(NamedTuple):
    """Token ids and which of them are text, both (L,) int64."""

    ids: Tensor
    mask: Tensor


Tokenizer = Callable[[str], TextTokens]


def load_tokenizer(path: str, max_length: int) -> Tokenizer:
    """Load a tokenizer directory; texts are cut or padded to `max_length` tokens.

    Raises:
        InputError: there is no such directory, it holds no tokenizer, or transformers is not installed.
    """
    if not os.path.isdir(path):
        raise InputError(f"text_tokenizer_path: no such directory: {path}")
    try:
        # Imported here: it takes seconds, and stores and filters are used without it.
        from transformers import AutoTokenizer
    except ImportError:
        raise InputError("the tokenizer needs transformers: pip install 'flashi2v-data[tokenizer]'") from None
    try:
        model = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"text_tokenizer_path: {path} holds no tokenizer: {reason}") from None
    return _Padded(model, max_length)


class _Padded:
    """A class rather than a closure, so that loader workers can be started by spawn."""

    def __init__(self, model: "Callable[..., dict[str, list[int]]]", max_length: int) -> None:
        self.model = model
        self.max_length = max_length

    def __call__(self, text: str) -> TextTokens:
        tokens = self.model(text, max_length=self.max_length, padding="max_length", truncation=True)
        return TextTokens(torch.tensor(tokens["input_ids"]), torch.tensor(tokens["attention_mask"]))
