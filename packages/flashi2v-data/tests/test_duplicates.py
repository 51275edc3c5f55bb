"""The signal duplicates: which clips show what an earlier one shows."""

import numpy as np
import pytest
from PIL import Image

from flashi2v_data.shapes.films import draw_film
from flashi2v_data.signals import SetSignal, neighbours
from flashi2v_data.signals.duplicates import Duplicates, fingerprint, repeated
from flashi2v_data.signals.neighbours import pairs_within

HEIGHT, WIDTH, NUM_FRAMES = 72, 128, 49


def resized(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.stack([np.asarray(Image.fromarray(frame).resize((width, height))) for frame in frames])


def found(rows: list[dict]) -> list[int | None]:
    columns = [*Duplicates().finish(iter(rows))]
    assert all(column["is_duplicate"] == (column["duplicate_of"] is not None) for column in columns)
    return [column["duplicate_of"] for column in columns]


@pytest.mark.parametrize("captions", ["looks", "motion"])
def test_what_was_coded_again_resized_or_cut_a_frame_later_repeats_the_first(measured, captions):
    originals, copies = [], {"coded again": [], "smaller": [], "larger": [], "a frame later": []}
    for index in range(5):
        film = draw_film(captions, 3, index, NUM_FRAMES + 1, HEIGHT, WIDTH)
        originals.append(measured(Duplicates(), film[:-1], crf=16))
        copies["coded again"].append(measured(Duplicates(), film[:-1], crf=35))
        copies["smaller"].append(measured(Duplicates(), resized(film[:-1], HEIGHT // 2, WIDTH // 2), crf=23))
        copies["larger"].append(measured(Duplicates(), resized(film[:-1], 2 * HEIGHT, 2 * WIDTH), crf=28))
        copies["a frame later"].append(measured(Duplicates(), film[1:], crf=23))
    for kind, rows in copies.items():
        assert found([*originals, *rows]) == [None] * 5 + [0, 1, 2, 3, 4], kind


@pytest.mark.parametrize("captions", ["looks", "motion"])
def test_distinct_clips_are_none(captions):
    films = (draw_film(captions, 5, index, 16, 32, 48) for index in range(100))
    rows = [{"fingerprint": fingerprint(resized(film, 16, 16)).hex()} for film in films]
    assert found(rows) == [None] * 100


def test_the_same_in_other_order_direction_or_colour_is_another_clip(measured):
    film = draw_film("looks", 3, 4, NUM_FRAMES, HEIGHT, WIDTH)
    others = [film, film[::-1], film[:, :, ::-1], film[:, ::-1], np.roll(film, 1, -1), 255 - film]
    assert found([measured(Duplicates(), other) for other in others]) == [None] * 6


def test_plain_clips_repeat_those_of_their_colour_alone(measured):
    def plain(level: int) -> dict:
        return measured(Duplicates(), np.full((6, 32, 48, 3), level, np.uint8))

    assert found([plain(0), plain(200), plain(3), plain(200)]) == [None, None, 0, 1]


def test_a_clip_repeats_none_that_repeats_another():
    """Each differs from the next by 15 bits: the third is too far from the first, the fourth too far from the third."""
    bits = np.zeros((4, 256), bool)
    for number in range(4):
        bits[number, : 15 * number] = True
    prints = np.concatenate([np.packbits(bits, axis=1), np.zeros((4, 12), np.uint8)], 1)
    assert repeated(prints).tolist() == [-1, 0, -1, 2]
    # The first of the set is kept, wherever it stands among the hashes.
    assert repeated(prints[[3, 0, 2, 1]]).tolist() == [-1, -1, 0, 1]
    assert repeated(prints[:0]).tolist() == []


def test_of_many_equal_clips_one_is_kept():
    prints = np.random.default_rng(0).integers(0, 256, (3, 44), np.uint8)
    assert repeated(prints[[0, 1, 0, 2, 1, 0]]).tolist() == [-1, -1, 0, -1, 1, 0]


@pytest.mark.parametrize("max_distance", [0, 1, 9, 22])
@pytest.mark.parametrize("many", [100, 1000], ids=["as of many", "as of few"])
def test_neighbours_are_those_that_comparing_each_with_each_finds(max_distance, many, monkeypatch):
    monkeypatch.setattr(neighbours, "_MANY_HASHES", many)
    random = np.random.default_rng(max_distance)
    hashes = random.integers(0, 256, (400, 32), np.uint8)
    for number in range(200, 400):  # as far from another as may be, and a bit farther
        flipped = random.choice(256, max_distance + number % 2, replace=False)
        hashes[number] = np.packbits(np.unpackbits(hashes[number - 200]) ^ np.isin(np.arange(256), flipped))
    bits = np.unpackbits(hashes, axis=1).astype(int)
    distances = bits @ (1 - bits.T) + (1 - bits) @ bits.T
    later, earlier = np.nonzero(np.tril(distances <= max_distance, -1))
    found = pairs_within(hashes, max_distance)
    assert [*zip(*map(np.ndarray.tolist, found))] == [*zip(earlier.tolist(), later.tolist())]
    assert len(later) >= 100


def test_neighbours_are_found_without_comparing_each_with_each(monkeypatch):
    compared = []
    equal = neighbours._equal
    monkeypatch.setattr(
        neighbours, "_equal", lambda keys: (compared.append(len(pair[0])) or pair for pair in equal(keys))
    )
    pairs_within(np.random.default_rng(0).integers(0, 256, (20_000, 32), np.uint8), 22)
    assert 0 < sum(compared) < 0.001 * 20_000**2 / 2


def test_it_decides_over_the_whole_set():
    assert isinstance(Duplicates(), SetSignal)
