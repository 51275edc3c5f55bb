"""Near-duplicates: clips that show the same, coded again, resized, or cut a frame earlier or later.

    fingerprint     a clip -> the perceptual hash of four pictures, the means of its quarters, and their mean colours
    neighbours      all pairs of hashes that differ in few bits
    Duplicates      the signal: fingerprints of all clips, then which of them repeat an earlier one

A hash holds the signs of random projections (Charikar, STOC 2002), so the share of bits in which two differ is the
angle between the clips' pictures over pi. It is computed in whole numbers: the same on every machine for the same
frames.
"""

import functools
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashi2v_data.signals.clip import Clip, Frames
from flashi2v_data.signals.neighbours import NUM_BITS, pairs_within
from flashi2v_data.signals.protocol import Column

# Means over many frames differ little where a clip begins a frame later.
SPREAD = Frames(most=32, size=(16, 16))
_QUARTERS = 4
_HASH_BYTES = NUM_BITS // 8
# Bits of 256: an angle of some 16 degrees between two clips.
MAX_DISTANCE = 22
# Levels of 255 by which mean colours may differ; and by which some part must, else a clip's colours are all it has.
_MAX_COLOUR, _FLAT = 10, 3


def fingerprint(frames: NDArray[np.uint8]) -> bytes:
    """Return the hash of a clip, 32 bytes, and the mean colours of its quarters, 12 bytes.

    Args:
        frames: (T, 16, 16, 3), RGB, spread over the clip.
    """
    edges = np.linspace(0, len(frames), _QUARTERS + 1).astype(int)
    # Of fewer than four frames some stand for two quarters.
    parts = [frames[min(begin, len(frames) - 1) : max(end, begin + 1)] for begin, end in itertools.pairwise(edges)]
    means = np.stack([part.sum(0, dtype=np.int64) * 16 // len(part) for part in parts])  # (4, 16, 16, 3), in 1/16
    colours = (means.mean((1, 2)) / 16).round().astype(np.uint8)  # (4, 3)
    centred = means - means.mean((0, 1, 2)).round().astype(np.int64)
    is_flat = np.abs(centred).max() < 16 * _FLAT
    signs = np.zeros(NUM_BITS, bool) if is_flat else centred.ravel() @ _directions() > 0
    return np.packbits(signs).tobytes() + colours.tobytes()


@functools.cache
def _directions() -> NDArray[np.int64]:
    """Return (3072, 256) of 1 and -1, drawn once and for all: hashes are kept, and compared with later ones."""
    size = _QUARTERS * 16 * 16 * 3 * NUM_BITS
    drawn = hashlib.shake_256(b"flashi2v_data.signals.duplicates").digest(size // 8)
    return np.unpackbits(np.frombuffer(drawn, np.uint8)).reshape(-1, NUM_BITS).astype(np.int64) * 2 - 1


def repeated(fingerprints: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return for each clip the first that it repeats, or -1; a clip repeats only one that repeats none.

    Args:
        fingerprints: (N, 44), of all clips in the order of the set.
    """
    distinct, first, which = np.unique(fingerprints, axis=0, return_index=True, return_inverse=True)
    # In the order in which they come first, so that of two the earlier is kept.
    order = np.argsort(first)
    first, which = first[order], np.argsort(order)[which.ravel()]
    distinct = distinct[order]
    earlier, later = pairs_within(np.ascontiguousarray(distinct[:, :_HASH_BYTES]), MAX_DISTANCE)
    colours = distinct[:, _HASH_BYTES:].astype(np.int16)
    is_alike = np.abs(colours[earlier] - colours[later]).max(1, initial=0) <= _MAX_COLOUR
    original = np.arange(len(distinct))
    for one, other in zip(earlier[is_alike].tolist(), later[is_alike].tolist()):
        if original[one] == one and original[other] == other:
            original[other] = one
    kept = first[original[which]]
    return np.where(kept == np.arange(len(fingerprints)), -1, kept)


class Duplicates:
    """The signal `duplicates`; of clips that are alike, the first of the set is kept."""

    name = "duplicates"
    version = "1"
    licence = "Apache-2.0"
    columns: Mapping[str, Column] = {"is_duplicate": bool, "duplicate_of": int}
    frames: Sequence[Frames] = (SPREAD,)

    def __call__(self, clip: Clip) -> Mapping[str, Any]:
        """Return the fingerprint of a clip, in hexadecimal digits."""
        return {"fingerprint": fingerprint(clip.frames(SPREAD)).hex()}

    def finish(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """Yield for each clip whether it repeats another, and which: its number in the set, from 0."""
        whole = bytearray().join(bytes.fromhex(row["fingerprint"]) for row in rows)
        fingerprints = np.frombuffer(whole, np.uint8).reshape(-1, _HASH_BYTES + 3 * _QUARTERS)
        for number in repeated(fingerprints).tolist():
            yield {"is_duplicate": number >= 0, "duplicate_of": number if number >= 0 else None}
