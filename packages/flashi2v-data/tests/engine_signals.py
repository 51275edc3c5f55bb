"""Signals that the tests of engines score by: harmless ones, and one that does to its process what a clip says."""

# ruff: noqa: RUF012 (columns are read, never changed)
import ctypes
import os
import signal
import time
from pathlib import Path

from flashi2v_data.errors import DecodeError
from flashi2v_data.signals import Frames

SMALL = Frames(most=2, size=(4, 4))
HELD = []


class Mean:
    """The mean of all pixels; notes in a file whose clip it was called with."""

    name, version, licence = "mean", "1", "Apache-2.0"
    columns = {"mean": float, "length": int}
    frames = (SMALL,)

    def __call__(self, clip):
        if "note" in clip.entry:
            with open(clip.entry["note"], "a") as file:
                file.write(f"{clip.entry['number']}\n")
        return {"mean": float(clip.frames(SMALL).mean()), "length": clip.num_frames}


class Twins:
    """The number of the first clip of the set that looks the same."""

    name, version, licence = "twins", "1", "Apache-2.0"
    columns = {"twin_of": int}
    frames = (SMALL,)

    def __call__(self, clip):
        return {"look": clip.frames(SMALL).tobytes().hex()}

    def finish(self, rows):
        first = {}
        for number, row in enumerate(rows):
            twin = first.setdefault(row["look"], number)
            yield {"twin_of": None if twin == number else twin}


class Trap:
    """Does what the entry's key `does` says; notes every try."""

    name, version, licence = "trap", "1", "Apache-2.0"
    columns = {"trapped": bool}
    frames = ()

    def __call__(self, clip):
        does = clip.entry.get("does")
        if does is not None:
            with open(Path(clip.entry["note"]), "a") as file:
                file.write(f"{does}\n")
        if does == "abort":
            os.abort()
        elif does == "kill actor":  # at the first try alone
            if len(Path(clip.entry["note"]).read_text().split("\n")) == 2:
                os.kill(os.getppid(), signal.SIGKILL)
                time.sleep(1000)
        elif does == "segfault":
            ctypes.string_at(0)
        elif does == "hang":
            time.sleep(1000)
        elif does == "eat":
            while True:
                HELD.append(b"x" * (32 << 20))
        elif does == "raise":
            raise ZeroDivisionError("of the signal's own")
        elif does == "unreadable":
            raise DecodeError(clip.path, "is damaged")
        elif does == "another column":
            return {"other": 1}
        return {"trapped": False}
