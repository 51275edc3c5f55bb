"""Reading text files that a user names: at once or not at all, whatever the name leads to."""

import errno
import os
import stat

from flashi2v_data.errors import InputError

# What the user can change; a machine's own faults (a disk that fails, too many open files) stay OSErrors.
_FAULTS = {
    errno.ENOENT: "no such file",
    errno.ENOTDIR: "no such file",
    errno.EACCES: "may not be read",
    errno.EPERM: "may not be read",
    errno.ELOOP: "is a link that leads nowhere",
    errno.ENAMETOOLONG: "no such file, the name is too long",
    errno.ENXIO: "is not a regular file",
}


def open_regular(path: str | os.PathLike[str]) -> int:
    """Open a regular file for reading and return its descriptor; a pipe, which might never be written to, is refused.

    Raises:
        InputError: there is no such file, or it is something else (a directory, a pipe, a device).
    """
    try:
        # Without O_NONBLOCK a pipe would be waited for.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except ValueError:  # a zero byte
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        if error.errno not in _FAULTS:
            raise
        raise InputError(f"{path}: {_FAULTS[error.errno]}") from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise InputError(f"{path}: is {'a directory' if stat.S_ISDIR(mode) else 'not a regular file'}")
    return descriptor


def read_text(path: str | os.PathLike[str], max_bytes: int, *, errors: str = "strict") -> str:
    """Read a text file in UTF-8, with or without a byte order mark.

    Args:
        path: of a regular file.
        max_bytes: that are taken for what the file should be.
        errors: what to do with other bytes, as for `bytes.decode`.

    Raises:
        InputError: there is no such file, it is larger, or not UTF-8.
    """
    with open(open_regular(path), "rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise InputError(f"{path}: holds more than {max_bytes >> 10} KiB, is it the right file?")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{path}: is UTF-16; save it as UTF-8")
    try:
        return data.decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: is not UTF-8; save it as UTF-8") from None
