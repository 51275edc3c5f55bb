"""Pickled records of the public code, read without running anything.

Its stores hold pickled dicts. Unpickling runs whatever a file asks for, so the instructions of a pickle are looked at
first, which runs nothing, and only one that consists of those that make plain values is unpickled. What it asks for is
bounded too: a short pickle can ask for a table of gigabytes, or for tuples in tuples until hashing them never ends.
"""

import pickle
import pickletools
from typing import Any

import zstandard

from flashi2v_data.store.codec import MAX_VALUE_BYTES, decompress

# A clip takes about sixty.
_MAX_INSTRUCTIONS = 100_000
_SCALARS = {
    *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
}
_CONTAINERS = {
    *("EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_SET", "ADDITEMS", "FROZENSET"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "MARK", "PROTO", "FRAME", "STOP"),
}
# So many in each other can be hashed.
_HASHED, _MAX_HASHED = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET"}, 1000
_MEMOIZED = {"MEMOIZE", "BINPUT", "LONG_BINPUT"}
_RECALLED = {"BINGET", "LONG_BINGET"}


class PickleRefused(ValueError):
    """A pickle that holds more than plain containers, text, bytes and numbers, or is damaged."""


def load_value(value: bytes) -> Any:
    """Return what a value of a public store holds: a pickle, compressed by zstd or not.

    Raises:
        PickleRefused: it is not a pickle of plain values.
    """
    if value.startswith(zstandard.FRAME_HEADER):
        try:
            value = decompress(value)
        except zstandard.ZstdError as error:
            raise PickleRefused(f"cannot be decompressed: {error}") from None
    return load_plain_pickle(value)


def load_plain_pickle(data: bytes) -> Any:
    """Return the value of a pickle (protocol 2 to 5) of dict, list, tuple, set, str, bytes, numbers, bool and None.

    Raises:
        PickleRefused: it is something else.
    """
    if len(data) > MAX_VALUE_BYTES:
        raise PickleRefused(f"is larger than {MAX_VALUE_BYTES >> 20} MiB")
    try:
        _check(data)
        return pickle.loads(data)
    except PickleRefused:
        raise
    except (
        pickle.UnpicklingError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        EOFError,
        ArithmeticError,
    ) as error:
        raise PickleRefused(f"is a damaged pickle ({type(error).__name__})") from None


def _check(data: bytes) -> None:
    """Refuse a pickle with any instruction that could run code, or take more time or memory than its length."""
    memo: dict[Any, str] = {}
    last, num_hashed = "", 0
    for number, (instruction, argument, _) in enumerate(pickletools.genops(data)):
        name = instruction.name
        num_hashed += name in _HASHED
        if number == _MAX_INSTRUCTIONS or num_hashed > _MAX_HASHED:
            raise PickleRefused("is a pickle of more instructions than a clip takes")
        if name in _MEMOIZED:
            place = len(memo) if argument is None else argument
            if int(place) > number:
                raise PickleRefused("is a pickle with a table larger than itself")
            memo[place] = last
        elif name in _RECALLED:
            # A container in itself, or in others again and again, would be endless, or grow with every level.
            if memo.get(argument, "") not in _SCALARS:
                raise PickleRefused("is a pickle in which one container stands in several places")
        elif name not in _SCALARS and name not in _CONTAINERS:
            raise PickleRefused(f"is a pickle that holds more than plain values ({name}), which might run code")
        last = name
