"""Changes to valid inputs: of bytes, and of what JSON and msgpack hold."""

import copy
import random
from typing import Any

# Numbers at which sizes, counts and offsets go wrong.
EDGES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, (1 << 63) - 1, (1 << 64) - 1)
# What stands where something else is meant.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 10**6, 2**31, 2**63, 10**400, -(10**12)),
    *(1e-6, -0.0, 1e308, float("nan"), float("inf")),
    *("", " ", "x", "\0", "\x1b[2J\n", "../../..", "/dev/zero", "/", "file:x", "http://127.0.0.1:9/x"),
    *("é" * 300, "a" * 5000),
    *([], {}, [[]], [None], {"": None}, ["x"] * 3, [0, -1], [1e9, 2e9], {"path": "x"}, [[[[[[[[]]]]]]]]),
)


def mutate_bytes(data: bytes, chance: random.Random, others: list[bytes]) -> bytes:
    """Return data with one to eight changes: flips, numbers, cuts, repeats and pieces of others."""
    text = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 3, 8))):
        if not text:
            return bytes(text)
        # Sizes and names stand at the begin, and in some kinds of file at the end.
        place = chance.randrange(len(text)) if chance.random() < 0.4 else chance.randrange(min(len(text), 512))
        if chance.random() < 0.2:
            place = len(text) - 1 - place
        length = min(chance.choice((1, 2, 4, 8, 16, 300)), len(text) - place)
        what = chance.randrange(8)
        if what == 0:
            text[place] ^= 1 << chance.randrange(8)
        elif what == 1:
            text[place] = chance.randrange(256)
        elif what == 2:
            size = chance.choice((1, 2, 4, 8))
            number = chance.choice(EDGES) % (1 << 8 * size)
            text[place : place + size] = number.to_bytes(size, chance.choice(("big", "little")))
        elif what == 3:
            del text[place : len(text) if chance.random() < 0.5 else place + length]
        elif what == 4:
            text[place:place] = text[place : place + length] * chance.choice((1, 2, 50))
        elif what == 5:
            other = chance.choice(others)
            begin = chance.randrange(len(other) + 1)
            text[place : place + length] = other[begin : begin + length]
        elif what == 6:
            text[place : place + length] = chance.randbytes(length)
        else:
            text[place : place + length] = bytes(length)
    return bytes(text)


def mutate_value(value: Any, chance: random.Random) -> Any:
    """Return nested lists and dicts with one to three changes: other values, keys gone, renamed or doubled."""
    value = copy.deepcopy(value)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        places = [*_places(value)]
        if not places:
            return chance.choice(VALUES)
        parent, key = chance.choice(places)
        what = chance.randrange(6)
        if what < 3:
            parent[key] = copy.deepcopy(chance.choice(VALUES))
        elif what == 3:
            del parent[key]
        elif what == 4 and isinstance(parent, dict):
            name = chance.choice((key.upper(), f"{key}_", "", "\0", "__class__")) if isinstance(key, str) else "x"
            parent[name] = parent.pop(key)
        else:
            other, place = chance.choice(places)
            parent[key] = copy.deepcopy(other[place])
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Return all (container, key) pairs."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    found = []
    for key in keys:
        found += [(value, key), *_places(value[key])]
    return found
