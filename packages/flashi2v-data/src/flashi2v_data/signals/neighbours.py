"""All pairs of hashes that differ in few bits, exactly, without comparing each with each.

A hash of 256 bits is cut into chunks. Two hashes that differ in at most r bits agree wholly in two of r + 2 chunks, as
so few bits cannot touch the others. So for every two chunks the hashes are sorted by these, and only neighbours with
equal ones are compared: the idea of multi-index hashing (Norouzi et al., arXiv:1307.2982). Two of 24 chunks have 21
bits, so one of N hashes meets N / 2 million others for each of these 276 sorts, where bits are independent. Of many
millions, three of r + 3 chunks are taken: 2,300 sorts, but hardly any meetings.
"""

import itertools
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

NUM_BITS = 256
_WORD = 64
# How many chunks agree, and how many there are at least, so that these fit into a word.
_FEW, _MANY = (2, 8), (3, 16)
# From so many hashes on, more sorts take less time than the meetings that they spare.
_MANY_HASHES = 3_500_000
_COUNTS = np.array([number.bit_count() for number in range(256)], np.uint8)
# Pairs that are compared at a time.
_BLOCK = 1 << 20


def pairs_within(hashes: NDArray[np.uint8], max_distance: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the pairs of hashes that differ in at most `max_distance` bits, (P,) and (P,), in ascending order.

    Args:
        hashes: (N, 32), each of 256 bits.
        max_distance: of the pairs; the sorts grow with its square.

    Returns:
        The later of two, by its number, in the second; pairs ordered by it, then by the first.
    """
    words = np.ascontiguousarray(hashes).view(np.uint64)  # (N, 4)
    num_equal, least = _FEW if len(hashes) < _MANY_HASHES else _MANY
    places = [*_places(max(max_distance + num_equal, least))]
    found = [np.empty(0, np.int64)]
    for chosen in itertools.combinations(places, num_equal):
        for left, right in _equal(_key(words, chosen)):
            is_near = _COUNTS[hashes[left] ^ hashes[right]].sum(1, dtype=np.int64) <= max_distance
            left, right = left[is_near], right[is_near]
            found.append(np.maximum(left, right) * len(hashes) + np.minimum(left, right))
    later, earlier = np.divmod(np.unique(np.concatenate(found)), max(len(hashes), 1))
    return earlier, later


def _places(num_chunks: int) -> Iterator[tuple[int, int, int]]:
    """Yield word, first bit and width of each chunk; none crosses the border of two words."""
    num_words = NUM_BITS // _WORD
    for word in range(num_words):
        # Every word is cut into the same number of chunks, give or take one.
        number = (num_chunks + word) // num_words
        edges = [_WORD * part // number for part in range(number + 1)]
        yield from ((word, begin, end - begin) for begin, end in itertools.pairwise(edges))


def _key(words: NDArray[np.uint64], places: Iterable[tuple[int, int, int]]) -> NDArray[np.uint64]:
    """Return some chunks of each hash, side by side, (N,)."""
    key = np.zeros(len(words), np.uint64)
    for word, begin, width in places:
        key <<= np.uint64(width)
        key |= words[:, word] >> np.uint64(begin) & np.uint64((1 << width) - 1)
    return key


def _equal(keys: NDArray[np.uint64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield all pairs of places with equal keys, some at a time."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    begins = np.flatnonzero(ordered[1:] == ordered[:-1])  # places whose successor is equal
    distance = 1
    while len(begins):
        for part in range(0, len(begins), _BLOCK):
            chosen = begins[part : part + _BLOCK]
            yield order[chosen], order[chosen + distance]
        distance += 1
        begins = begins[begins + distance < len(keys)]
        begins = begins[ordered[begins] == ordered[begins + distance]]
