"""The picture that a terminal shows while a video is sampled."""

import io
import re
import sys

import numpy as np
import pytest
import torch

from flashi2v_infer import FlashI2VPipeline, InputError
from flashi2v_infer.commands.terminal import TerminalPreview, half_blocks

_CELL = re.compile(r"\x1b\[38;2;(\d+);(\d+);(\d+);48;2;(\d+);(\d+);(\d+)m\u2580")


def read_back(lines):
    """Return the pixels that lines of half blocks show."""
    rows = [[tuple(map(int, cell)) for cell in _CELL.findall(line)] for line in lines]
    return np.array([[cell[part : part + 3] for cell in row] for row in rows for part in (0, 3)], np.uint8)


def test_a_character_holds_two_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    assert np.array_equal(read_back(half_blocks(pixels, true_colours=True)), pixels)


def test_terminals_of_256_colours_get_the_next_of_them():
    white_over_red = np.array([[[255, 255, 255]], [[250, 4, 0]]], np.uint8)
    assert half_blocks(white_over_red, true_colours=False) == ["\x1b[38;5;231;48;5;196m\u2580\x1b[0m"]


class Terminal(io.StringIO):
    """What a terminal of 80 columns is told."""

    def isatty(self) -> bool:
        return True

    def read_new(self) -> str:
        """Return what was written since."""
        shown = self.getvalue()
        self.seek(0)
        self.truncate()
        return shown


@pytest.fixture
def terminal(monkeypatch) -> Terminal:
    for name, value in {"TERM": "xterm", "COLORTERM": "truecolor", "COLUMNS": "80"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


def test_a_terminal_shows_every_latent_frame_over_what_it_showed(terminal, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal)
    pipe = FlashI2VPipeline.from_pretrained("demo")
    seen = []
    drawn = TerminalPreview(pipe, lambda pipeline, step, timestep, tensors: seen.append(step))
    terminal.read_new()
    assert drawn.can_be_seen(None)
    latents = torch.randn(2, 1, 16, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    pictures = []
    for number, denoised in enumerate(latents):
        drawn(pipe, number, torch.tensor(0.0), {"denoised": denoised})
        shown = terminal.read_new()
        *up, lines = shown.rpartition("\x1b[8F")
        assert bool(up[1]) == bool(number)
        pictures.append(read_back(lines.splitlines()))
        assert pictures[-1].shape == (16, 5 * 15 + 4, 3)
        assert not pictures[-1][:, 15].any()  # between two frames
    assert np.abs(pictures[0].astype(int) - pictures[1]).mean() > 10
    assert seen == [0, 1]


def test_nothing_is_drawn_where_it_is_not_wanted_or_cannot_be_seen(terminal, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal)
    pipe = FlashI2VPipeline.from_pretrained("demo")
    drawn = TerminalPreview(pipe, lambda *_: None)
    assert not drawn.can_be_seen(False)
    monkeypatch.setenv("TERM", "dumb")
    assert not drawn.can_be_seen(None)
    with pytest.raises(InputError, match="--preview: standard error is no terminal"):
        drawn.can_be_seen(True)
