"""The text encoder's tokenizer, and what it takes from a text."""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashi2v_data.captions.cleaning import TextLoss, has_words
from flashi2v_data.errors import InputError


class TextTokens(NamedTuple):
    """Token ids and which of them are text, both (L,) int64."""

    ids: Tensor
    mask: Tensor


Tokenizer = Callable[[str], TextTokens]
"""From a caption to its tokens and their mask, padded to one length."""


def load_tokenizer(path: str, max_length: int) -> Tokenizer:
    """Load a tokenizer directory; texts are cut or padded to `max_length` tokens.

    Raises:
        InputError: there is no such directory, it holds no tokenizer, or transformers is not installed.
    """
    return _Padded(load_model(path, "text_tokenizer_path"), max_length)


def load_model(path: str, key: str) -> Any:
    """Load the tokenizer of a directory as transformers has it; Python code beside it is never run.

    Raises:
        InputError: naming `key`, the setting that gave `path`; see `load_tokenizer`.
    """
    if not os.path.isdir(path):
        raise InputError(f"{key}: no such directory: {path}")
    try:
        # Imported here: it takes seconds, and stores and filters are used without it.
        from transformers import AutoTokenizer
    except ImportError:
        raise InputError("the tokenizer needs transformers: pip install 'flashi2v-data[tokenizer]'") from None
    for entry in os.scandir(path):
        if not entry.is_file() and not entry.is_dir():  # a pipe would be waited for
            raise InputError(f"{key}: {path} holds no tokenizer: {entry.name} is not a regular file")
    try:
        # False, not the default, which asks on the terminal whether to run a directory's code.
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the libraries below raise whatever they like, plain Exception included
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if "trust_remote_code" in str(error):
            reason = "it names Python code of its own, which is not run; save it with a class of transformers"
        raise InputError(f"{key}: {path} holds no tokenizer: {reason}") from None


def find_loss(tokenizer: Tokenizer, text: str, tokens: TextTokens) -> TextLoss:
    """Return what the text encoder does not get of a text.

    Args:
        tokenizer: one that `load_tokenizer` did not load cannot be asked: its texts are only looked at for being empty.
        text: as it was tokenised.
        tokens: what it became.
    """
    if isinstance(tokenizer, _Padded):
        return text_loss(tokenizer.model, text, tokens.ids.tolist(), bool(tokens.mask.all()))
    return TextLoss(not has_words(text))


def text_loss(model: Any, text: str, ids: Sequence[int], is_full: bool) -> TextLoss:
    """Return what the text encoder does not get of a text.

    Args:
        model: a tokenizer of transformers.
        text: as it was tokenised.
        ids: what it became, cut or padded to as many as are read.
        is_full: whether none of these is padding; only such a text may have been cut.
    """
    num_tokens, unknown = 0, list[str]()
    if is_full and (length := len(model(text, verbose=False).input_ids)) > len(ids):
        num_tokens = length
    if model.unk_token_id is not None and model.unk_token_id != model.pad_token_id and model.unk_token_id in ids:
        unknown = _unknown(model, text, len(ids))
    return TextLoss(not has_words(text), num_tokens, tuple(dict.fromkeys(unknown)))


def _unknown(model: Any, text: str, max_length: int) -> list[str]:
    """Return what became unknown tokens, as the text has it: letters or words, as the tokenizer splits it."""
    if not model.is_fast:  # only the fast ones say where tokens come from
        return [word for word in text.split() if model.unk_token_id in model(word, add_special_tokens=False).input_ids]
    found = model(text, max_length=max_length, truncation=True, return_offsets_mapping=True)
    places = zip(found.input_ids, found.offset_mapping)
    return [text[begin:end].strip() for token, (begin, end) in places if token == model.unk_token_id]


class _Padded:
    """A class rather than a closure, so that loader workers can be started by spawn."""

    def __init__(self, model: Any, max_length: int) -> None:
        self.model = model
        self.max_length = max_length

    def __call__(self, text: str) -> TextTokens:
        tokens = self.model(text, max_length=self.max_length, padding="max_length", truncation=True)
        return TextTokens(torch.tensor(tokens["input_ids"]), torch.tensor(tokens["attention_mask"]))
