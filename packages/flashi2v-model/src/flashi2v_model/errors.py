"""The error for what a user can mend."""

import pickle
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


def reason_of(error: BaseException) -> str:
    """Return what an error of reading says, as one phrase.

    torch's own words on a refused pickle advise to load it unsafely; they are not passed on.
    """
    text = str(error)
    if isinstance(error, pickle.UnpicklingError) and "WeightsUnpickler error: " in text:
        asked = text.partition("WeightsUnpickler error: ")[2].split(" was not ")[0].strip()
        text = f"the pickle in it asks for more: {asked}"
    if isinstance(error, KeyError):  # whose text is the key alone
        text = f"it refers to {text}, which is not in it"
    return next(iter(text.strip().splitlines()), type(error).__name__)[:300]
