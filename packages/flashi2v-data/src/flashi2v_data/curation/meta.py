"""Meta JSON of any size: entries in pieces, in constant memory.

A file is cut into pieces of whole entries, which may be parsed anywhere (in another process, say). Where to cut an
array is a guess: behind a comma between braces. It is right if the piece parses, for what precedes it was whole; if it
does not (the comma was inside a string or a nested list), `MetaParser` goes through the entries one by one.
"""

import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import msgspec
import zstandard

from flashi2v_data.curation.tables import is_table, read_rows
from flashi2v_data.errors import InputError
from flashi2v_data.records import Annotation, PlainEntry
from flashi2v_data.textfile import open_regular, read_text

# What is parsed of one piece should stay in the processor's cache, and be worth sending to another process.
PIECE_BYTES = 512 << 10
# What so little of zstd can become fits into memory (64 MiB), even where it was made to become as much as it can.
_COMPRESSED_BYTES = 2 << 10
# An unclosed bracket would otherwise swallow the file.
MAX_ENTRY_BYTES = 16 << 20
# Where an array may be cut: between a closing brace and an opening one. So many spaces are enough for any indentation.
_between = re.compile(rb"\}[ \t\r\n]{0,256},(?=[ \t\r\n]{0,256}\{)")
_BETWEEN_BYTES = 2 * 256 + 3
_line_end = re.compile(rb"\n")


def _parse_int(digits: str) -> int:
    """Return a whole number; one too long to be stored or to be read in bounded time stands for all such."""
    return int(digits) if len(digits) <= 40 else _TOO_LARGE


_TOO_LARGE = 1 << 1000

# It reads what msgspec refuses: NaN, whole numbers beyond 64 bits, lone surrogates.
_lenient = json.JSONDecoder(parse_int=_parse_int)
_space = re.compile(r"[ \t\r\n]*")


class BrokenMetaError(InputError):
    """A meta JSON must be changed before it can be read: what an unfinished run made of it is worth nothing."""


class Span(NamedTuple):
    """Where a piece lies in a plain file, and size and time of that file."""

    begin: int
    end: int
    status: tuple[int, int]


@dataclass
class Piece:
    """Consecutive entries of a meta JSON as they are written, behind the opening bracket of an array."""

    annotation: Annotation
    is_lines: bool  # JSON Lines, else part of an array
    is_last: bool
    end: int  # how far the file has been read, in bytes as they lie on the disk
    content: bytes | Span

    def text(self, before: bytes = b"") -> bytearray:
        """Return the piece as it is written, behind a few other bytes.

        Of a plain file it is read only now, by whoever parses it, which costs less than handing it over.

        Raises:
            BrokenMetaError: the file has changed.
        """
        if isinstance(self.content, bytes):
            return bytearray().join((before, self.content))
        begin, end, status = self.content
        text = bytearray(len(before) + end - begin)
        text[: len(before)] = before
        with open(open_regular(self.annotation.meta), "rb", buffering=0) as file:
            _check_unchanged(self.annotation, file, status)
            file.seek(begin)
            file.readinto(memoryview(text)[len(before) :])
        return text

    def bracketed(self) -> bytearray:
        """Return the text between brackets, which is JSON where the piece was cut well out of an array."""
        text = self.text(b"[")
        if not self.is_last:  # which has the array's closing bracket, where the others end in a comma
            text[-1:] = b"]"
        return text


def read_entries(annotation: Annotation) -> Iterator[Any]:
    """Yield the entries of a meta JSON, their paths joined to the root; memory use does not grow with the file.

    The file is one JSON array, or JSON lines, plain or compressed by gzip or zstd, or a table (see `tables`). Entries
    are whatever the file holds: checking them is the filter's job.

    Raises:
        InputError: the file is not valid JSON, or cannot be read.
    """
    parser = MetaParser(annotation)
    for piece in read_pieces(annotation):
        yield from parser.parse(piece)


def read_pieces(annotation: Annotation) -> Iterator[Piece]:
    """Cut a meta JSON into pieces.

    Raises:
        InputError: the file is empty, or its compression is damaged, or it cannot be read, or has changed meanwhile.
    """
    with open(open_regular(annotation.meta), "rb") as file:
        before = _status(file)
        try:
            for piece in _rows(annotation, file) if is_table(annotation.meta) else _cut(annotation, file):
                _check_unchanged(annotation, file, before)
                yield piece
        except (gzip.BadGzipFile, EOFError, zlib.error, zstandard.ZstdError) as error:
            raise BrokenMetaError(f"{annotation.meta}: cannot be decompressed, is it whole? {error}") from None


def state_of(annotations: Sequence[Annotation]) -> list[list[Any]]:
    """Return which meta JSON a work begins with, as it is now, so that it is not continued with another."""
    return [
        [*annotation, os.stat(annotation.meta).st_size, os.stat(annotation.meta).st_mtime_ns]
        for annotation in annotations
    ]


SIGNALS_SUFFIX = ".signals.json"


def read_provenance(annotations: Sequence[Annotation]) -> dict[str, Any]:
    """Return, under the key `signals`, what the columns of scored meta JSON were made by; empty where none is scored.

    Raises:
        InputError: a file that should say so is none.
    """
    found: dict[str, Any] = {}
    for annotation in annotations:
        path = Path(annotation.meta).with_suffix(SIGNALS_SUFFIX)
        if path.exists():
            try:
                found[annotation.meta] = msgspec.json.decode(read_text(path, 1 << 20), type=dict[str, Any])
            except msgspec.DecodeError as error:
                raise InputError(
                    f"{path}: does not say what signals were: score again, or remove it ({error})"
                ) from None
    return {"signals": found} if found else {}


def _status(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _check_unchanged(annotation: Annotation, file: BinaryIO, before: tuple[int, int]) -> None:
    if _status(file) != before:
        raise BrokenMetaError(f"{annotation.meta}: was changed while it was read: begin anew")


def _rows(annotation: Annotation, file: BinaryIO) -> Iterator[Piece]:
    """Write the rows of a table as JSON Lines, which are then read as any others."""
    end = 0
    try:
        for rows, end in read_rows(annotation.meta, file):
            yield Piece(annotation, True, False, end, _table_encoder.encode_lines(rows))
    except InputError as error:
        raise BrokenMetaError(str(error)) from None
    if not end:
        raise BrokenMetaError(f"{annotation.meta}: has no rows")


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    """Yield what a file holds, decompressed."""
    compression = _compression(file)
    if compression == "zstd":
        waiting = bytearray()
        for block in _zstd_blocks(file):
            waiting += block
            if len(waiting) >= PIECE_BYTES:
                yield bytes(waiting)
                waiting.clear()
        yield bytes(waiting)
    else:
        stream = gzip.GzipFile(fileobj=file) if compression == "gzip" else file
        while block := stream.read(PIECE_BYTES):
            yield block


def _compression(file: BinaryIO) -> Literal["zstd", "gzip"] | None:
    magic = os.pread(file.fileno(), 4, 0)
    if magic == zstandard.FRAME_HEADER:
        return "zstd"
    return "gzip" if magic.startswith(b"\x1f\x8b") else None


def _zstd_blocks(file: BinaryIO) -> Iterator[bytes]:
    # Not the library's own stream reader, which takes a file that was cut short for one that ends there.
    frame = zstandard.ZstdDecompressor().decompressobj()
    while data := file.read(_COMPRESSED_BYTES):
        while data:
            if frame.eof:
                frame = zstandard.ZstdDecompressor().decompressobj()
            if block := frame.decompress(data):
                yield block
            data = frame.unused_data
    if not frame.eof:
        raise EOFError("a frame has no end")


def _cut(annotation: Annotation, file: BinaryIO) -> Iterator[Piece]:
    blocks = _blocks(file)
    text, num_spaces = b"", 0
    while not text:
        block = next(blocks, None)
        if block is None:
            raise BrokenMetaError(f"{annotation.meta}: is empty; write a JSON array of entries")
        if block.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise BrokenMetaError(f"{annotation.meta}: is UTF-16; save it as UTF-8")
        text = block.removeprefix(b"\xef\xbb\xbf").lstrip()
        num_spaces += len(block) - len(text)
        _check_entry(annotation, num_spaces)
    is_lines = not text.startswith(b"[")
    if not is_lines:
        text = text[1:]
    if _compression(file) is None:
        yield from _cut_plain(annotation, file, file.tell() - len(text), is_lines)
        return
    num_searched = 0
    for block in blocks:
        text += block
        end = _last_cut(text.__getitem__, num_searched, len(text), is_lines)
        if end:
            yield Piece(annotation, is_lines, False, file.tell(), text[:end])
            text = text[end:]
        else:
            _check_entry(annotation, len(text))
        num_searched = len(text)
    _check_entry(annotation, len(text))
    yield Piece(annotation, is_lines, True, file.tell(), text)


def _cut_plain(annotation: Annotation, file: BinaryIO, begin: int, is_lines: bool) -> Iterator[Piece]:
    """Cut what is not compressed: all that is read of it here is where it may be cut."""
    status = _status(file)
    searched = begin
    for limit in range(begin + PIECE_BYTES, status[0], PIECE_BYTES):

        def read(part: slice, begin: int = begin) -> bytes:
            return os.pread(file.fileno(), part.stop - part.start, begin + part.start)

        end = begin + _last_cut(read, searched - begin, limit - begin, is_lines)
        if end > begin:
            yield Piece(annotation, is_lines, False, end, Span(begin, end, status))
            begin = end
        else:
            _check_entry(annotation, limit - begin)
        searched = limit
    _check_entry(annotation, status[0] - begin)
    yield Piece(annotation, is_lines, True, status[0], Span(begin, status[0], status))


def _last_cut(read: Callable[[slice], bytes], num_searched: int, num_bytes: int, is_lines: bool) -> int:
    """Return where so much text may be cut last, or 0; in its beginning, already searched, it may not."""
    begin, num_read = num_bytes, 4096
    while begin > num_searched:
        begin = max(0, num_searched - _BETWEEN_BYTES, num_bytes - num_read)
        text = read(slice(begin, num_bytes))
        cuts = [match.end() for match in (_line_end if is_lines else _between).finditer(text)]
        if cuts:
            return begin + cuts[-1]
        num_read *= 8
    return 0


def _check_entry(annotation: Annotation, num_bytes: int) -> None:
    if num_bytes > MAX_ENTRY_BYTES:
        raise BrokenMetaError(
            f"{annotation.meta}: holds an entry of more than {MAX_ENTRY_BYTES >> 20} MiB, or is not meta JSON"
        )


# What Parquet has beyond JSON becomes text: a date as the standard has it, bytes in base64.
_table_encoder = msgspec.json.Encoder(enc_hook=str)
_decoder = msgspec.json.Decoder()
_plain_decoder = msgspec.json.Decoder(PlainEntry)
_plain_array_decoder = msgspec.json.Decoder(list[PlainEntry])


def parse_plain(piece: Piece) -> list[PlainEntry] | None:
    """Return the entries of a piece, their paths as they stand there, if it was cut well and all are plain."""
    try:
        if piece.is_lines:
            return _plain_decoder.decode_lines(piece.text())
        return _plain_array_decoder.decode(piece.bracketed())
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def parse_whole(piece: Piece) -> list[Any] | None:
    """Return the entries of a piece if it was cut well and is strict JSON, else None: `MetaParser` then reads it."""
    try:
        entries = _decoder.decode_lines(piece.text()) if piece.is_lines else _decoder.decode(piece.bracketed())
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    _join(entries, piece.annotation.root)
    return entries


def count_lines(piece: Piece) -> int:
    """Return the number of lines that end in a piece, empty ones included, by which a fault is found."""
    return piece.text().count(b"\n")


def _join(entries: list[Any], root: str) -> None:
    prefix = os.path.join(root, "")
    for entry in entries:
        if isinstance(entry, dict):
            path = entry.get("path")
            # Joined, an empty path would name the root, and no longer be seen to be missing.
            if isinstance(path, str) and path and not path.startswith("/"):
                entry["path"] = prefix + path


class MetaParser:
    """Reads the pieces of one meta JSON in their order.

    Attributes:
        is_between_entries: nothing is left over from the pieces so far.
    """

    def __init__(self, annotation: Annotation) -> None:
        self._meta = annotation.meta
        self._number = 0  # of entries, or of lines
        self._rest = b""

    @property
    def is_between_entries(self) -> bool:
        return not self._rest

    def passed(self, num_entries: int) -> None:
        """Note that a piece was parsed elsewhere, by `parse_whole`, with so many entries, or lines (`count_lines`)."""
        self._number += num_entries

    def parse(self, piece: Piece) -> list[Any]:
        """Return the entries that end in this piece.

        Raises:
            BrokenMetaError: the file is not valid JSON.
        """
        entries = parse_whole(piece) if self.is_between_entries else None
        if entries is not None:
            self.passed(count_lines(piece) if piece.is_lines else len(entries))
            return entries
        entries = self._parse_lines(piece) if piece.is_lines else self._parse_array(piece)
        _join(entries, piece.annotation.root)
        return entries

    def _parse_lines(self, piece: Piece) -> list[Any]:
        entries = []
        for line in piece.text().splitlines():
            self._number += 1
            text = line.decode("utf-8", "surrogateescape").strip()
            if text:
                try:
                    entries.append(_lenient.decode(text))
                except (json.JSONDecodeError, RecursionError) as error:
                    raise BrokenMetaError(
                        f"{self._meta}, line {self._number}: not valid JSON: {_reason(error)}"
                    ) from None
        return entries

    def _parse_array(self, piece: Piece) -> list[Any]:
        text = (self._rest + piece.text()).decode("utf-8", "surrogateescape").rstrip()
        closing = len(text) - 1 if piece.is_last and text.endswith("]") else len(text)
        entries: list[Any] = []
        begin = _skip_space(text, 0)
        try:
            while begin < closing or (begin == closing and self._number):
                entry, end = _lenient.raw_decode(text, begin)
                end = _skip_space(text, end)
                if end != closing and text[end : end + 1] != ",":
                    raise json.JSONDecodeError("Expecting ',' or ']'", text, end)
                entries.append(entry)
                self._number += 1
                begin = _skip_space(text, end + 1)
                if begin >= len(text):
                    break
            if piece.is_last and closing == len(text):
                raise json.JSONDecodeError("Expecting ']'", text, len(text))
        except (json.JSONDecodeError, RecursionError) as error:
            if piece.is_last or not _is_cut_off(error, text) or len(text) - begin > MAX_ENTRY_BYTES:
                raise BrokenMetaError(
                    f"{self._meta}: not valid JSON after entry {self._number} (comments are not allowed): "
                    f"{_reason(error)}"
                ) from None
        self._rest = text[begin:].encode("utf-8", "surrogateescape")
        return entries


def _skip_space(text: str, begin: int) -> int:
    match = _space.match(text, begin)
    assert match is not None
    return match.end()


def _reason(error: json.JSONDecodeError | RecursionError) -> str:
    # The position that a JSONDecodeError adds counts from the piece's begin.
    return error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"


def _is_cut_off(error: json.JSONDecodeError | RecursionError, text: str) -> bool:
    """Tell whether more text could fix a fault: it lies at the end, or a string's end is missing."""
    return isinstance(error, json.JSONDecodeError) and (
        error.pos >= len(text.rstrip()) - len("-Infinity") or error.msg.startswith("Unterminated string")
    )
