"""Pickled records of the public code, read without running anything.

Its stores hold pickled dicts. Unpickling runs whatever a file asks for, and Python's unpickler can be made to allocate
gigabytes even where it finds no class; so this reads the few instructions of which plain values consist, and no others.
"""

import struct
from collections.abc import Callable
from typing import Any

import zstandard

from flashi2v_data.values import decompress

_MARK = object()


class PickleRefused(ValueError):
    """A pickle that holds more than plain containers, text, bytes and numbers, or is damaged."""


def load_value(value: bytes) -> Any:
    """Return what a value of a public store holds: a pickle, compressed by zstd or not.

    Raises:
        PickleRefused: it is no pickle of plain values.
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
        PickleRefused: it is none.
    """
    try:
        return _Reader(data).load()
    except (IndexError, KeyError, TypeError, UnicodeDecodeError, struct.error, OverflowError, MemoryError) as error:
        raise PickleRefused(f"is a damaged pickle ({type(error).__name__})") from None


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        while True:
            code = self._take(1)
            if code == b".":
                return self._pop(1)[0]
            step = _STEPS.get(code)
            if step is None:
                raise PickleRefused(
                    f"is a pickle that holds more than plain values (instruction {code!r}), which might run code"
                )
            step(self)

    def _take(self, size: int) -> bytes:
        """Return the next bytes; what a pickle claims to hold is never allocated before it is there."""
        begin, self._at = self._at, self._at + size
        if size < 0 or self._at > len(self._data):
            raise IndexError
        return self._data[begin : self._at]

    def _skip(self, size: int) -> None:
        self._take(size)

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _since_mark(self) -> list[Any]:
        at = len(self._stack) - 1
        while self._stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise IndexError
        items = self._stack[at + 1 :]
        del self._stack[at:]
        return items

    def _text(self, size: int) -> None:
        self._push(self._take(size).decode("utf-8", "surrogatepass"))

    def _long(self, size: int) -> None:
        self._push(int.from_bytes(self._take(size), "little", signed=True))

    def _append(self, items: list[Any]) -> None:
        self._container(list).extend(items)

    def _update(self, items: list[Any]) -> None:
        if len(items) % 2:
            raise IndexError
        self._container(dict).update(zip(map(_scalar, items[::2]), items[1::2]))

    def _add(self, items: list[Any]) -> None:
        self._container(set).update(map(_scalar, items))

    def _container(self, kind: type[Any]) -> Any:
        top = self._stack[-1]
        if type(top) is not kind:
            raise TypeError
        return top

    def _pop(self, count: int) -> list[Any]:
        items = self._stack[len(self._stack) - count :]
        if len(items) < count or _MARK in items:
            raise IndexError
        del self._stack[len(self._stack) - count :]
        return items


def _scalar(key: Any) -> Any:
    """Refuse containers as keys: hashing tuples of tuples of one tuple could take forever."""
    if not isinstance(key, (str, bytes, int, float, type(None))):
        raise TypeError
    return key


# The instructions of plain values, as the standard library's pickletools documents them.
_STEPS: dict[bytes, Callable[[_Reader], None]] = {
    b"\x80": lambda reader: reader._skip(1),  # the protocol
    b"\x95": lambda reader: reader._skip(8),  # a frame: how much follows
    b"(": lambda reader: reader._push(_MARK),
    b"N": lambda reader: reader._push(None),
    b"\x88": lambda reader: reader._push(True),
    b"\x89": lambda reader: reader._push(False),
    b"J": lambda reader: reader._push(reader._number("<i")),
    b"K": lambda reader: reader._push(reader._number("<B")),
    b"M": lambda reader: reader._push(reader._number("<H")),
    b"\x8a": lambda reader: reader._long(reader._number("<B")),
    b"\x8b": lambda reader: reader._long(reader._number("<i")),
    b"G": lambda reader: reader._push(reader._number(">d")),
    b"\x8c": lambda reader: reader._text(reader._number("<B")),
    b"X": lambda reader: reader._text(reader._number("<I")),
    b"\x8d": lambda reader: reader._text(reader._number("<Q")),
    b"C": lambda reader: reader._push(reader._take(reader._number("<B"))),
    b"B": lambda reader: reader._push(reader._take(reader._number("<I"))),
    b"\x8e": lambda reader: reader._push(reader._take(reader._number("<Q"))),
    b"]": lambda reader: reader._push([]),
    b"a": lambda reader: reader._append(reader._pop(1)),
    b"e": lambda reader: reader._append(reader._since_mark()),
    b"}": lambda reader: reader._push({}),
    b"s": lambda reader: reader._update(reader._pop(2)),
    b"u": lambda reader: reader._update(reader._since_mark()),
    b")": lambda reader: reader._push(()),
    b"t": lambda reader: reader._push(tuple(reader._since_mark())),
    b"\x85": lambda reader: reader._push(tuple(reader._pop(1))),
    b"\x86": lambda reader: reader._push(tuple(reader._pop(2))),
    b"\x87": lambda reader: reader._push(tuple(reader._pop(3))),
    b"\x8f": lambda reader: reader._push(set()),
    b"\x90": lambda reader: reader._add(reader._since_mark()),
    b"\x91": lambda reader: reader._push(frozenset(map(_scalar, reader._since_mark()))),
    b"\x94": lambda reader: reader._memo.__setitem__(len(reader._memo), reader._stack[-1]),
    b"q": lambda reader: reader._memo.__setitem__(reader._number("<B"), reader._stack[-1]),
    b"r": lambda reader: reader._memo.__setitem__(reader._number("<I"), reader._stack[-1]),
    b"h": lambda reader: reader._push(reader._memo[reader._number("<B")]),
    b"j": lambda reader: reader._push(reader._memo[reader._number("<I")]),
}
