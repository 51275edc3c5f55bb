"""What every command line of the project shares: one-line errors, exit codes, logging."""

import errno
import gc
import io
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import cyclopts
import pydantic
from tqdm import tqdm

from flashi2v_data.schema_faults import fault_lines


class _Handler(logging.Handler):
    """Write `LEVEL message` to stderr, above any progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        # Other libraries speak only when something is wrong.
        if record.levelno >= logging.WARNING or record.name.startswith("flashi2v"):
            tqdm.write(f"{escaped(self.format(record))}\n", file=sys.stderr, end="")  # in one: threads speak too


def configure_logging(level: int = logging.INFO) -> None:
    """Send log messages to stderr; safe to call again."""
    handler = _Handler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    root = logging.getLogger()
    root.handlers = [kept for kept in root.handlers if not isinstance(kept, _Handler)] + [handler]
    root.setLevel(level)
    threading.excepthook = _thread_failed


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    """Say in one line what the machine refused to a thread of some library; anything else is a bug."""
    if isinstance(failure.exc_value, OSError) and failure.exc_value.errno in _MACHINE_FAULTS:
        logging.getLogger(__name__).error(machine_fault(failure.exc_value))
    else:
        threading.__excepthook__(failure)


def run(app: cyclopts.App) -> NoReturn:
    """Run a command line and exit: 0 on success, 2 with one line on stderr for wrong usage.

    An error with an `exit_code` (see `flashi2v_data.errors`) ends with that code and one line, so does a machine that
    fails (1: a full disk, too many open files), an interrupt with 130. Any other exception is a bug and propagates, so
    Python prints its traceback and exits 1.
    """
    configure_logging()
    _make_output_patient()
    app.suppress_keyboard_interrupt = False  # cyclopts would exit without a word
    try:
        # The result is returned, as cyclopts would exit by itself before everything is written.
        app(sys.argv[1:], exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
    except cyclopts.CycloptsError as error:
        _fail(app, _usage_fault(error), 2)
    except KeyboardInterrupt as interrupt:
        _fail(app, ": ".join(["interrupted", *map(str, interrupt.args)]), 130)
    except Exception as error:
        told = told_as(error)
        if told is None:
            raise
        _fail(app, told[1], told[0])
    gc.freeze()  # no garbage is looked for in what the system reclaims at once
    sys.exit(0)


@contextmanager
def importing() -> Iterator[None]:
    """Import large libraries while the block runs: nothing of them is garbage, and looking for it takes a second."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def told_as(error: Exception) -> tuple[int, str] | None:
    """Return the exit code and the words that an error ends a command with; None of a bug, which has a traceback."""
    code = getattr(error, "exit_code", None)
    if isinstance(code, int):
        return code, str(error)
    if isinstance(error, OSError) and error.errno in _MACHINE_FAULTS:
        return 1, machine_fault(error)
    return None


# What a machine may refuse to any program, in words; the system's own are sometimes "Input/output error" alone.
_MACHINE_FAULTS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is too large for the disk or a limit (ulimit -f)",
    errno.EROFS: "the disk is read-only",
    errno.EIO: "the disk fails",
    errno.EACCES: "permission denied",
    errno.EPERM: "not permitted",
    errno.EMFILE: "too many open files: raise the limit (ulimit -n)",
    errno.ENFILE: "too many open files on this machine",
    errno.ESTALE: "the network disk lost the file",
}


def machine_fault(error: OSError) -> str:
    """Return what an operating system's error means, the reason first, and the file that it concerns."""
    reason = _MACHINE_FAULTS.get(error.errno or 0) or error.strerror or type(error).__name__
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
    return f"{reason}: {' -> '.join(names)}" if names else reason


class _Output(io.FileIO):
    """A file to which nothing more is written where its reader has gone: head, say, that has seen enough."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            return len(data)


def _make_output_patient() -> None:
    """Let standard output take any character and outlive its reader."""
    if not isinstance(sys.stdout, io.TextIOWrapper):
        return
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):  # a test's, in memory
        return
    sys.stdout.flush()
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(_Output(descriptor, "w", closefd=False)),
        encoding=sys.stdout.encoding,
        errors="backslashreplace",
        line_buffering=sys.stdout.line_buffering,
        write_through=sys.stdout.write_through,
    )


def _usage_fault(error: cyclopts.CycloptsError) -> str:
    cause = error.__cause__
    argument = getattr(error, "argument", None)
    if isinstance(cause, pydantic.ValidationError) and argument is not None:
        # A pydantic model whose fields are options: name the option, not the field.
        names = {child.keys[-1]: child.name for child in argument.children if child.keys}
        lines = fault_lines(cause, argument.hint)
        return "; ".join(f"{names.get(path, path)}: {line}" if path else line for path, line in lines)
    return str(error)


def one_line(text: str, limit: int = 500) -> str:
    """Return text as one line that any terminal may be given: control characters escaped, cut behind `limit`.

    Where that is not enough, long words (paths, mostly) lose their middle first: the reason stands behind them.
    """
    line = escaped(" ".join(text.split()))
    if len(line) > limit:
        line = re.sub(r"(\S{60})\S{40,}(\S{60})", r"\1...\2", line)
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def escaped(text: str) -> str:
    """Return text that no terminal takes for commands: its control characters, but line ends and tabs, escaped.

    What others wrote (file names, captions, messages of libraries) is printed through this.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def _fail(app: cyclopts.App, message: str, code: int) -> NoReturn:
    if code == 2 and os.environ.get("RANK", "0") != "0":
        # What all processes of torchrun would say alike is said by the first: when it ends, torchrun ends the others.
        # What is wrong in this one alone (a file that its machine lacks) is said after a while.
        time.sleep(5)
    sys.stderr.write(one_line(f"{app.name[0]}: {message}") + "\n")
    try:
        sys.stdout.flush()
    except OSError:  # what could not be written is not tried again, with a traceback, when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
