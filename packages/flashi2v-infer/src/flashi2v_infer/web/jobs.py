"""Jobs: one ordered queue on disk, which any number of processes may open.

SQLite keeps what is known of each job, files below the same directory hold the rest:

    jobs.sqlite3    images/<hash>    videos/<id>.mp4 .json .png    previews/<id>.webp

Every change is one statement, so a process may be killed at any time. A record beside a video stands for a whole video:
what was interrupted after it was written is done.
"""

import contextlib
import hashlib
import json
import logging
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias

from flashi2v_data.atomic import atomic_file
from flashi2v_data.errors import InputError

logger = logging.getLogger(__name__)

State: TypeAlias = Literal["queued", "running", "done", "failed", "cancelled"]
ENDED = ("done", "failed", "cancelled")

_FOLDERS = ("images", "videos", "previews")
_VERSION = 1
_SCHEMA = """
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, owner TEXT NOT NULL, state TEXT NOT NULL,
    request TEXT NOT NULL, created REAL NOT NULL, started REAL, ended REAL, worker TEXT,
    step INTEGER NOT NULL DEFAULT 0, num_steps INTEGER NOT NULL DEFAULT 0, seconds_left REAL,
    code TEXT, error TEXT, notes TEXT NOT NULL DEFAULT '[]',
    pinned INTEGER NOT NULL DEFAULT 0, cancelling INTEGER NOT NULL DEFAULT 0, deleted INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX by_state ON jobs (state, number);
CREATE INDEX by_owner ON jobs (owner, number);
"""
# An image may be stored a little before the job that names it.
_GRACE_SECONDS = 3600


@dataclass(frozen=True)
class Job:
    """One video that was asked for.

    Attributes:
        number: its place in the order.
        id: that clients know it by.
        owner: who asked for it; nobody else sees it.
        state: queued, running, done, failed or cancelled.
        request: what was asked for, as `schema.Order.request` has it.
        created: seconds since 1970, as `started` and `ended`.
        worker: that took it.
        step: steps that were done, of `num_steps`.
        seconds_left: until it is done, estimated.
        code: of the error, one word.
        error: what went wrong, one line.
        notes: what the library warned of.
        pinned: it is kept whatever the limits are.
        cancelling: it was cancelled, and its worker has yet to notice.
        deleted: it was deleted, and its files have yet to go.
    """

    number: int
    id: str
    owner: str
    state: State
    request: dict[str, Any]
    created: float
    started: float | None
    ended: float | None
    worker: str | None
    step: int
    num_steps: int
    seconds_left: float | None
    code: str | None
    error: str | None
    notes: list[str]
    pinned: bool
    cancelling: bool
    deleted: bool

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state in ENDED


_COLUMNS = ", ".join(field.name for field in fields(Job))


class Jobs:
    """The queue.

    Args:
        directory: of everything; made where it is missing.

    Raises:
        InputError: it holds the jobs of another version.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name in _FOLDERS:
            (directory / name).mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        file = directory / "jobs.sqlite3"
        try:
            self._database = sqlite3.connect(file, timeout=60, isolation_level=None, check_same_thread=False)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = NORMAL")
            self._database.execute("BEGIN IMMEDIATE")
            with self._database:  # which commits
                (version,) = self._database.execute("PRAGMA user_version").fetchone()
                if version == 0:
                    for statement in filter(str.strip, _SCHEMA.split(";")):
                        self._database.execute(statement)
                    self._database.execute(f"PRAGMA user_version = {_VERSION}")
        except sqlite3.DatabaseError as error:
            raise InputError(f"--data: cannot use {file}: {error}") from None
        if version not in (0, _VERSION):
            raise InputError(f"--data: {file} is of another version of flashi2v-web: name another directory")

    def _run(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._database.execute(statement, values).fetchall()

    def _jobs(self, statement: str, *values: Any) -> list[Job]:
        return [_job(row) for row in self._run(statement, *values)]

    # What clients do.

    def add_image(self, contents: bytes, check: Callable[[Path], None] = lambda file: None) -> str:
        """Store a picture, once, and if `check` raises nothing; return its name."""
        name = f"images/{hashlib.sha256(contents).hexdigest()}"
        path = self.directory / name
        if path.exists():
            path.touch()
        else:
            with atomic_file(path) as file:
                file.write_bytes(contents)
                check(file)
        return name

    def add(self, owner: str, request: dict[str, Any], max_queue: int) -> Job | None:
        """Queue a job; None where as many as may wait do."""
        added = self._jobs(
            "INSERT INTO jobs (id, owner, state, request, created, num_steps) SELECT ?, ?, 'queued', ?, ?, ?"
            f" WHERE (SELECT count(*) FROM jobs WHERE state = 'queued') < ? RETURNING {_COLUMNS}",
            *(f"video_{uuid.uuid4().hex}", owner, json.dumps(request), time.time()),
            *(request["settings"]["num_inference_steps"], max_queue),
        )
        return added[0] if added else None

    def get(self, id: str, owner: str) -> Job | None:
        """Return a job of this owner."""
        found = self._jobs(f"SELECT {_COLUMNS} FROM jobs WHERE id = ? AND owner = ? AND NOT deleted", id, owner)
        return found[0] if found else None

    def find(
        self, owner: str, *, limit: int, after: int | None = None, ascending: bool = False, words: str = ""
    ) -> list[Job]:
        """Return jobs of this owner, the newest first.

        Args:
            owner: whose.
            limit: at most so many.
            after: the number of the job that they follow.
            ascending: the oldest first.
            words: that stand in their prompts.
        """
        order, comparison = ("ASC", ">") if ascending else ("DESC", "<")
        escaped = words.replace("\\", "\\\\").replace("%", r"\%").replace("_", r"\_")
        return self._jobs(
            f"SELECT {_COLUMNS} FROM jobs WHERE owner = ? AND NOT deleted AND (? IS NULL OR number {comparison} ?)"
            rf" AND json_extract(request, '$.prompt') LIKE ? ESCAPE '\' ORDER BY number {order} LIMIT ?",
            *(owner, after, after, f"%{escaped}%", limit),
        )

    def image_of(self, owner: str, contents: str) -> str | None:
        """Return the name of a stored picture of these contents (sha256) that this owner has used."""
        name = f"images/{contents}"
        condition = "owner = ? AND NOT deleted AND json_extract(request, '$.image') = ?"
        return name if self._run(f"SELECT 1 FROM jobs WHERE {condition} LIMIT 1", owner, name) else None

    def ahead_of(self, job: Job) -> int:
        """Return how many jobs wait before this one."""
        return int(self._run("SELECT count(*) FROM jobs WHERE state = 'queued' AND number < ?", job.number)[0][0])

    def cancel(self, id: str, owner: str) -> None:
        """Cancel a job that has not ended: at once where it waits, else as soon as its worker notices."""
        self._run(
            "UPDATE jobs SET cancelling = 1, ended = CASE state WHEN 'queued' THEN ? END,"
            " state = CASE state WHEN 'queued' THEN 'cancelled' ELSE state END"
            " WHERE id = ? AND owner = ? AND state IN ('queued', 'running')",
            *(time.time(), id, owner),
        )

    def delete(self, id: str, owner: str) -> None:
        """Cancel a job where it has not ended, and let `sweep` remove it."""
        self.cancel(id, owner)
        self._run("UPDATE jobs SET deleted = 1 WHERE id = ? AND owner = ?", id, owner)

    def pin(self, id: str, owner: str, pinned: bool) -> None:
        """Keep a job whatever the limits are, or no longer."""
        self._run("UPDATE jobs SET pinned = ? WHERE id = ? AND owner = ?", pinned, id, owner)

    def counts(self) -> dict[str, int]:
        """Return how many jobs there are in each state."""
        return dict(self._run("SELECT state, count(*) FROM jobs GROUP BY state"))

    def seconds_done(self) -> tuple[int, float]:
        """Return how many jobs are done, and the seconds that they took together."""
        number, seconds = self._run("SELECT count(*), total(ended - started) FROM jobs WHERE state = 'done'")[0]
        return number, seconds

    def last_done(self) -> Job | None:
        """Return the job that was done last, whoever asked for it."""
        done = self._jobs(f"SELECT {_COLUMNS} FROM jobs WHERE state = 'done' ORDER BY ended DESC LIMIT 1")
        return done[0] if done else None

    # What workers do.

    def claim(self, worker: str) -> Job | None:
        """Take the first job that waits, if any does."""
        taken = self._jobs(
            "UPDATE jobs SET state = 'running', worker = ?, started = ? WHERE number ="
            f" (SELECT min(number) FROM jobs WHERE state = 'queued') RETURNING {_COLUMNS}",
            *(worker, time.time()),
        )
        return taken[0] if taken else None

    def progress(self, job: Job, step: int, num_steps: int, seconds_left: float) -> None:
        """Say how far a job is."""
        values = (step, num_steps, seconds_left, job.number)
        self._run("UPDATE jobs SET step = ?, num_steps = ?, seconds_left = ? WHERE number = ?", *values)

    def is_cancelled(self, job: Job) -> bool:
        """Tell whether a running job is to stop."""
        return bool(self._run("SELECT cancelling FROM jobs WHERE number = ?", job.number)[0][0])

    def end(self, job: Job, state: State, *, code: str | None = None, error: str | None = None) -> None:
        """End a job that this worker took, if it is still its own."""
        self._run(
            "UPDATE jobs SET state = ?, ended = ?, seconds_left = NULL, code = ?, error = ?, notes = ?"
            " WHERE number = ? AND state = 'running' AND worker = ?",
            *(state, time.time(), code, error, json.dumps(job.notes), job.number, job.worker),
        )

    # What the server does.

    def interrupted(self, worker: str | None, reason: str, *, again: bool = False) -> list[Job]:
        """See to what a worker left, or all of them, when its process ended.

        Args:
            worker: its name; None are all.
            reason: in words, why it ended.
            again: it was ended on purpose: what it worked on goes back into the queue.

        Returns:
            the jobs that it did not finish.
        """
        left = self._jobs(f"SELECT {_COLUMNS} FROM jobs WHERE state = 'running' AND worker = ifnull(?, worker)", worker)
        unfinished = []
        for job in left:
            if self.video(job).with_suffix(".json").exists():
                self.end(job, "done")
            elif again and not job.cancelling:
                self._run("UPDATE jobs SET state = 'queued', step = 0 WHERE number = ?", job.number)
            elif job.cancelling:
                self.end(job, "cancelled")
            else:
                at = f"at step {job.step} of {job.num_steps}"
                self.end(job, "failed", code="interrupted", error=f"interrupted {at}: {reason}; queue it again")
                unfinished.append(job)
        return unfinished

    def sweep(self, keep_days: float | None = None, keep_bytes: float | None = None) -> None:
        """Remove what was deleted, then the oldest of what has ended and is not pinned, until the limits are kept."""
        self._remove(self._jobs(f"SELECT {_COLUMNS} FROM jobs WHERE deleted AND state IN {ENDED}"))
        oldest = f"SELECT {_COLUMNS} FROM jobs WHERE NOT pinned AND state IN {ENDED}"
        if keep_days is not None:
            self._remove(self._jobs(f"{oldest} AND ended < ?", time.time() - keep_days * 86400))
        if keep_bytes is not None:
            for job in self._jobs(f"{oldest} ORDER BY number"):
                if self.num_bytes() <= keep_bytes:
                    break
                self._remove([job])
                self._remove_images()
        self._remove_images()

    def num_bytes(self) -> int:
        """Return the bytes of all files but the database's."""
        files = (file for name in _FOLDERS for file in _files(self.directory / name))
        total = 0
        for file in files:
            with contextlib.suppress(FileNotFoundError):  # others remove files, too
                total += file.stat().st_size
        return total

    def _remove(self, jobs: Sequence[Job]) -> None:
        """Remove jobs, first from sight, and then their files."""
        for job in jobs:
            self._run("UPDATE jobs SET deleted = 1 WHERE number = ?", job.number)
            for file in (*self.directory.glob(f"videos/{job.id}.*"), self.preview(job)):
                file.unlink(missing_ok=True)
            self._run("DELETE FROM jobs WHERE number = ?", job.number)

    def _remove_images(self) -> None:
        used = {name for (name,) in self._run("SELECT DISTINCT json_extract(request, '$.image') FROM jobs")}
        for file in _files(self.directory / "images"):
            if f"images/{file.name}" not in used and time.time() - file.stat().st_mtime > _GRACE_SECONDS:
                file.unlink(missing_ok=True)

    # Where its files are.

    def video(self, job: Job) -> Path:
        """Return where the video of a job is, or will be; its record and its film strip lie beside it."""
        return self.directory / f"videos/{job.id}.mp4"

    def preview(self, job: Job) -> Path:
        """Return where a picture of what is being sampled is, if there is any yet."""
        return self.directory / f"previews/{job.id}.webp"


def _job(row: tuple[Any, ...]) -> Job:
    values = dict(zip((field.name for field in fields(Job)), row))
    values |= {name: json.loads(values[name]) for name in ("request", "notes")}
    values |= {name: bool(values[name]) for name in ("pinned", "cancelling", "deleted")}
    return Job(**values)


def _files(directory: Path) -> Iterator[Path]:
    return (file for file in directory.iterdir() if file.is_file())
