"""The errors that this package raises for what it was given.

An error with a class attribute `exit_code` is not a bug: a command line ends with that code and the error's one line. 2
says that the user can put it right by giving something else, 1 that something failed while running.
"""


class InputError(ValueError):
    """Something the user gave is wrong; the message is one line that names it and says what to change."""

    exit_code = 2


class RecordError(InputError):
    """A record of a store is damaged, or is not a clip.

    Attributes:
        path: of the store.
        reason: which record it is, and what is wrong with it.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        """Return the message, one line."""
        return f"{self.path}: {self.reason}"


class StorageError(RuntimeError):
    """Something could not be written (a full disk, say); the message is one line that says what to do."""

    exit_code = 1


class DecodeError(RuntimeError):
    """A video file that cannot be read, or not far enough, or a clip whose record is at fault.

    Attributes:
        path: of the file; of a record that cannot be read, where it lies.
        reason: what is wrong with it.
        is_partial: whether other frames of it may be readable.
        is_of_record: whether the file may be fine, and is only not what a record says or a run needs.
    """

    exit_code = 2

    def __init__(self, path: str, reason: str, *, is_partial: bool = False, is_of_record: bool = False) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason
        self.is_partial = is_partial
        self.is_of_record = is_of_record

    def __str__(self) -> str:
        """Return the message, one line."""
        return f"{'record at fault,' if self.is_of_record else 'cannot read video'} {self.path}: {self.reason}"


class EngineError(RuntimeError):
    """Work that was spread over processes or machines failed there; the message is one line that says what to do."""

    exit_code = 1
