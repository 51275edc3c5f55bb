"""Own captions for a small model: a tokenizer that knows their words, and rows of the text encoder for the new ones.

The encoder stays as it is but for the new rows of its embedding. They are trained on the captions alone: from what the
encoder makes of a caption, a linear layer must tell every word, so that new words become as distinct as known ones.
What they mean, the transformer learns from the videos.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flashi2v_data.captions.cleaning import clean_caption
from flashi2v_data.console import importing
from flashi2v_model.weights.libraries import quieten
from flashi2v_model.weights.writing import copy_directory

MAX_WORDS = 4000  # new ones; of more, the rarest stay unknown
_MAX_LENGTH = 64  # tokens of a caption
_STEPS, _BATCH, _RATE = 200, 64, 0.01
# Scripts that write no spaces between words: every letter is a word of its own.
_UNSPACED = "[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"


@dataclass(frozen=True)
class Words:
    """What became of the captions' words.

    Attributes:
        new: that the tokenizer has learnt.
        unknown: that it has not.
        length: tokens that a caption may have.
        cut: captions that are longer.
        told_apart: share of the new words that the text encoder's states tell from all others.
    """

    new: list[str]
    unknown: list[str]
    length: int
    cut: int
    told_apart: float


def extend(source: Path, directory: Path, captions: Sequence[str], length: int, seed: int) -> Words:
    """Copy a small model's parts, with a tokenizer and a text encoder that know the captions' words.

    Args:
        source: a directory in diffusers' layout; its tokenizer knows whole words.
        directory: a new one.
        captions: as the user wrote them.
        length: tokens of a caption that the model reads.
        seed: of the training of the new rows.
    """
    copy_directory(source, directory)
    words, ids, length, cut = _extend_tokenizer(directory / "tokenizer", captions, length)
    new, unknown = words[:MAX_WORDS], words[MAX_WORDS:]
    config = directory / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "text_len": length}, indent=2) + "\n")
    told_apart = _extend_encoder(directory / "text_encoder", ids, len(new), length, seed) if new else 1.0
    return Words(new, unknown, length, cut, told_apart)


def _extend_tokenizer(
    directory: Path, captions: Sequence[str], length: int
) -> tuple[list[str], list[list[int]], int, int]:
    """Add words; return all that were new, the captions' ids, the length that is read, and how many are longer."""
    from tokenizers import Regex, Tokenizer, pre_tokenizers

    file = directory / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_UNSPACED), "isolated"), pre_tokenizers.Whitespace()]
    )
    cleaned = [clean_caption(caption, True) for caption in captions]
    counts = Counter(word for caption in cleaned for word in _split(tokenizer, caption))
    known = tokenizer.get_vocab()
    words = [word for word, _ in counts.most_common() if word not in known]
    saved = json.loads(tokenizer.to_str())
    vocabulary = saved["model"]["vocab"]
    for word in words[:MAX_WORDS]:
        vocabulary[word] = len(vocabulary)
    file.write_text(json.dumps(saved, ensure_ascii=False, indent=1) + "\n", "utf-8")
    tokenizer = Tokenizer.from_file(str(file))
    ids = [tokenizer.encode(caption).ids for caption in cleaned]
    longest = max(map(len, ids))
    length = max(length, min(_MAX_LENGTH, longest))
    return words, ids, length, sum(len(each) > length for each in ids)


def _split(tokenizer: Any, caption: str) -> list[str]:
    normal = tokenizer.normalizer.normalize_str(caption) if tokenizer.normalizer is not None else caption
    return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal)]


def _extend_encoder(directory: Path, captions: Sequence[Sequence[int]], num_new: int, length: int, seed: int) -> float:
    """Add rows and train them; return the share of the new words in captions that are told apart."""
    with importing():
        from transformers import UMT5EncoderModel

    quieten()
    torch.manual_seed(seed)
    encoder = UMT5EncoderModel.from_pretrained(directory, dtype=torch.float32).eval().requires_grad_(False)
    table = encoder.get_input_embeddings().weight
    num_known = len(table)
    encoder.resize_token_embeddings(num_known + num_new, mean_resizing=False)
    table = encoder.get_input_embeddings().weight
    known = table.data[:num_known].clone()
    table.data[num_known:] = known.mean(0) + known.std(0) * torch.randn(num_new, known.shape[1])
    ids = torch.zeros(len(captions), length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, caption in enumerate(captions):
        kept = caption[:length]
        ids[row, : len(kept)], mask[row, : len(kept)] = torch.tensor(kept), 1
    told_apart = _train_rows(encoder, table, num_known, ids, mask)
    encoder.save_pretrained(directory)
    return told_apart


def _train_rows(
    encoder: nn.Module, table: nn.Parameter, num_known: int, ids: torch.Tensor, mask: torch.Tensor
) -> float:
    reader = nn.Linear(table.shape[1], len(table))
    table.requires_grad_(True)
    optimizer = torch.optim.Adam([table, *reader.parameters()], lr=_RATE)
    for step in range(_STEPS):
        rows = torch.arange(step * _BATCH, (step + 1) * _BATCH) % len(ids) if len(ids) > _BATCH else slice(None)
        states = encoder(input_ids=ids[rows], attention_mask=mask[rows]).last_hidden_state
        is_text = mask[rows] == 1
        loss = nn.functional.cross_entropy(reader(states[is_text]), ids[rows][is_text])
        optimizer.zero_grad()
        loss.backward()
        assert table.grad is not None
        table.grad[:num_known] = 0  # Adam then leaves the known rows alone
        optimizer.step()
    table.requires_grad_(False)
    right = total = 0
    with torch.no_grad():
        for begin in range(0, len(ids), _BATCH):
            some, there = ids[begin : begin + _BATCH], mask[begin : begin + _BATCH]
            guess = reader(encoder(input_ids=some, attention_mask=there).last_hidden_state).argmax(-1)
            is_new = (some >= num_known) & (there == 1)
            right, total = right + int((guess == some)[is_new].sum()), total + int(is_new.sum())
    return right / max(1, total)
