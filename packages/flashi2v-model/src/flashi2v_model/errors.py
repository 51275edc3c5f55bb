"""The error for what a user can mend."""

import pickle
import struct


class InputError(ValueError):
    """A file, key or value given by the user is wrong; the message is one line that says which and what to change."""

    exit_code = 2


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
