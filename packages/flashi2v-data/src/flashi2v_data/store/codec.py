"""How one record is written: msgpack, each value by itself compressed by zstd where the store's header says so."""

import os
from typing import Any, Literal, cast

import msgspec
import zstandard

from flashi2v_data.records import Record

Compression = Literal["zstd"]
# Read, a value may take 70 times its bytes (a list of empty lists); this is more than any clip needs, and harmless.
MAX_VALUE_BYTES = 8 << 20


class ValueCodec:
    """Packs and unpacks the records of one store.

    A path that is not UTF-8 is written as bytes (msgpack bin) and read as `os.fsdecode` gives it.
    """

    def __init__(self, compression: Compression | None = None) -> None:
        self._compression = compression
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder().decode
        self._compressor = zstandard.ZstdCompressor() if compression else None

    def __reduce__(self) -> tuple[type["ValueCodec"], tuple[Compression | None]]:
        """Travel to another process without the compressor."""
        return ValueCodec, (self._compression,)

    def pack(self, record: Record | msgspec.Struct) -> bytes | None:
        """Return the value, or None where the record is too large or holds what msgpack cannot: huge numbers, say."""
        try:
            value = self._encode(record)
        except UnicodeEncodeError:
            return self._pack_bytes_path(record)
        except (OverflowError, TypeError, ValueError, RecursionError):
            return None
        if len(value) > MAX_VALUE_BYTES:
            return None
        return self._compressor.compress(value) if self._compressor else value

    def _pack_bytes_path(self, record: Record | msgspec.Struct) -> bytes | None:
        plain: Any = record if isinstance(record, dict) else msgspec.to_builtins(record)
        if isinstance(plain["path"], bytes):
            return None
        try:
            return self.pack(cast(Record, {**plain, "path": os.fsencode(plain["path"])}))
        except UnicodeEncodeError:
            return None

    def unpack(self, value: bytes | memoryview) -> Any:
        """Return what `pack` was given.

        Raises:
            ValueError: the value is damaged.
        """
        try:
            data = decompress(value) if self._compression else value
            if len(data) > MAX_VALUE_BYTES:
                raise ValueError(f"more than {MAX_VALUE_BYTES >> 20} MiB")
            record = self._decode(data)
        except (ValueError, zstandard.ZstdError, RecursionError) as error:
            raise ValueError(f"is damaged: {error}") from None
        if type(record) is dict and type(record.get("path")) is bytes:
            record["path"] = os.fsdecode(record["path"])
        return record


def decompress(value: bytes | memoryview) -> bytes:
    """Decompress zstd, but no more than MAX_VALUE_BYTES.

    Raises:
        zstandard.ZstdError: the value is damaged or too large.
    """
    with zstandard.ZstdDecompressor().stream_reader(value) as reader:
        data = reader.read(MAX_VALUE_BYTES + 1)
    if len(data) > MAX_VALUE_BYTES:
        raise zstandard.ZstdError(f"a value of more than {MAX_VALUE_BYTES >> 20} MiB")
    return data
