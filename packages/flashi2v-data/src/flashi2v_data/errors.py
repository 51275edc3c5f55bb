"""The errors that this package raises for what it was given.

An error with a class attribute `exit_code` is not a bug: a command line ends with that code and the error's one line. 2
says that the user can put it right by giving something else, 1 that something failed while running.
"""


class InputError(ValueError):
    """Something the user gave is wrong; the message is one line that names it and says what to change."""

    exit_code = 2


class StorageError(RuntimeError):
    """Something could not be written (a full disk, say); the message is one line that says what to do."""

    exit_code = 1


class DecodeError(RuntimeError):
    """A video file that cannot be read, or not far enough.

    Attributes:
        path: of the file.
        reason: what is wrong with it.
        is_partial: whether other frames of it may be readable.
        is_of_record: whether the file may be fine, and is only not what a record says or a run needs.
    """

    exit_code = 2

    def __init__(self, path: str, reason: str, *, is_partial: bool = False, is_of_record: bool = False) -> None:
        super().__init__(f"cannot read video {path}: {reason}")
        self.path = path
        self.reason = reason
        self.is_partial = is_partial
        self.is_of_record = is_of_record

    def __reduce__(self) -> tuple[type["DecodeError"], tuple[str, str], dict[str, bool]]:
        # Between processes it travels pickled; the default would call __init__ with the message alone.
        flags = {"is_partial": self.is_partial, "is_of_record": self.is_of_record}
        return DecodeError, (self.path, self.reason), flags
