"""The list of clips that could not be read, kept on disk so that a later run does not try them again."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from flashi2v_data.errors import DecodeError, InputError
from flashi2v_data.textfile import read_text

logger = logging.getLogger(__name__)

# Of a list; a million clips take less.
_MAX_BYTES = 256 << 20


class Quarantine:
    """Unreadable clips, each with its reason, as JSON lines.

    A line holds `path`, `start_frame_idx` (null where the whole file is bad: it hung a decoder, or crashed it),
    `reason`, `is_partial`, and the file's `size` and `mtime_ns`. A file that has changed since, or has come to exist,
    is tried again; so is one whose line is removed, and always one of which other frames may be readable
    (`is_partial`): whether it can be read then depends on the crop in time alone, not on what a run has met before.
    Faults of records (`is_of_record`) do not belong here: a fixed record would still name the same unchanged file.
    Several processes may append to one list.

    Args:
        path: of the list; it is written when the first clip is added.

    Raises:
        InputError: the list is there and cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._reasons: dict[tuple[str, int | None], str | None] = {}  # None for a clip that is to be tried again
        self._writable = True
        try:
            text = read_text(self.path, _MAX_BYTES) if os.path.lexists(self.path) else ""
            for line in text.split("\n")[:-1]:  # what another process is just writing has no end yet
                self._take(json.loads(line))
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise InputError(f"{self.path}: is not a list of unreadable clips, remove it: {error}") from None

    def __len__(self) -> int:
        """Return the number of clips and files listed."""
        return len(self._reasons)

    def reason(self, path: str, start_frame_idx: int) -> str | None:
        """Return why a clip is not to be read, or None."""
        return self._reasons.get((path, None)) or self._reasons.get((path, start_frame_idx))

    def add(self, error: DecodeError, start_frame_idx: int | None) -> None:
        """List a clip, or, with None, a whole file."""
        if (error.path, start_frame_idx) in self._reasons:
            return
        entry = {
            "path": error.path,
            "start_frame_idx": start_frame_idx,
            "reason": error.reason,
            "is_partial": error.is_partial,
            **_state(error.path),
        }
        self._take(entry)
        if self._writable:
            try:
                # ASCII, as a path may hold bytes that are no Unicode; one write, so that lines do not mix.
                with open(self.path, "ab", buffering=0) as file:
                    file.write(json.dumps(entry).encode("ascii") + b"\n")
            except OSError as failure:
                self._writable = False
                logger.warning("%s: unreadable clips cannot be listed: %s", self.path, failure.strerror)

    def _take(self, entry: dict[str, Any]) -> None:
        path, start = entry["path"], entry["start_frame_idx"]
        if {key: entry[key] for key in ("size", "mtime_ns")} == _state(path):
            self._reasons[path, start] = None if entry["is_partial"] else str(entry["reason"])


def _state(path: str) -> dict[str, int | None]:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return {"size": None, "mtime_ns": None}
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
