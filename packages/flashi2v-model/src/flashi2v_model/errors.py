"""Errors: what a user can fix, and what a machine cannot do."""

import pickle
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """A file, key or value given by the user is wrong; the message is one line that says which and what to change."""

    exit_code = 2


class StorageError(RuntimeError):
    """Something could not be written (a full disk, say); the message is one line that says what and why."""

    exit_code = 1


@contextmanager
def named(key: str) -> Iterator[None]:
    """Put the setting that gave a path before what is wrong with it."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{key}: {error}") from error


class DamagedError(InputError):
    """A file does not hold what was written to it."""


# All that unpicklers were seen to raise on damaged bytes.
UNREADABLE = (
    pickle.UnpicklingError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)


# How torch, in any version, advises to run what it has refused; such words are not passed on.
_ADVICE = re.compile(r"weights_only|safe_globals|torch\.load|trust")


def reason_of(error: BaseException) -> str:
    """Return what an error of reading says, as one phrase, without advice to load the file unsafely."""
    text = str(error)
    if isinstance(error, KeyError):  # whose text is the key alone
        text = f"it refers to {text}, which is not in it"
    if _ADVICE.search(text):
        asked = re.search(r"(?:GLOBAL|Unsupported class|Unsupported function) +`?([^\s`]+)", text)
        unknown = re.search(r"Unsupported operand \d+", text)
        if asked:
            text = f"the pickle in it asks for more than tensors: {asked[1]}"
        elif "TorchScript" in text:
            text = "it is a TorchScript archive, which holds code"
        else:
            text = f"it is a pickle of other things, or damaged{f': {unknown[0]}' if unknown else ''}"
    return next(iter(text.strip().splitlines()), type(error).__name__)[:300]
