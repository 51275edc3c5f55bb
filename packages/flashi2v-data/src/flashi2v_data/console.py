"""What every command line of the project shares: one-line errors, exit codes, logging."""

import logging
import os
import sys
import time
from typing import NoReturn

import cyclopts
import pydantic
from tqdm import tqdm

from flashi2v_data.config import fault_lines
from flashi2v_data.errors import InputError, StorageError


class _Handler(logging.Handler):
    """Write `LEVEL message` to stderr, above any progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        # Other libraries speak only when something is wrong.
        if record.levelno >= logging.WARNING or record.name.startswith("flashi2v"):
            tqdm.write(self.format(record), file=sys.stderr)


def configure_logging(level: int = logging.INFO) -> None:
    """Send log messages to stderr; safe to call again."""
    handler = _Handler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    root = logging.getLogger()
    root.handlers = [kept for kept in root.handlers if not isinstance(kept, _Handler)] + [handler]
    root.setLevel(level)


def run(
    app: cyclopts.App,
    *,
    errors: tuple[type[Exception], ...] = (InputError,),
    failures: tuple[type[Exception], ...] = (StorageError,),
) -> NoReturn:
    """Run a command line and exit: 0 on success, 2 with one line on stderr for wrong usage or `errors`.

    One of `failures` exits 1 with one line, an interrupt 130; any other exception propagates, so Python prints its
    traceback and exits 1.
    """
    configure_logging()
    app.suppress_keyboard_interrupt = False  # cyclopts would exit without a word
    try:
        app(sys.argv[1:], exit_on_error=False, print_error=False)
    except cyclopts.CycloptsError as error:
        _fail(app, _usage_fault(error), 2)
    except errors as error:
        _fail(app, str(error), 2)
    except failures as error:
        _fail(app, str(error), 1)
    except KeyboardInterrupt as interrupt:
        _fail(app, ": ".join(["interrupted", *map(str, interrupt.args)]), 130)
    sys.exit(0)


def _usage_fault(error: cyclopts.CycloptsError) -> str:
    cause = error.__cause__
    argument = getattr(error, "argument", None)
    if isinstance(cause, pydantic.ValidationError) and argument is not None:
        # A pydantic model whose fields are options: name the option, not the field.
        names = {child.keys[-1]: child.name for child in argument.children if child.keys}
        lines = fault_lines(cause, argument.hint)
        return "; ".join(f"{names.get(path, path)}: {line}" if path else line for path, line in lines)
    return str(error)


def _fail(app: cyclopts.App, message: str, code: int) -> NoReturn:
    line = " ".join(message.split())
    if code == 2 and os.environ.get("RANK", "0") != "0":
        # What all processes of torchrun would say alike is said by the first: when it ends, torchrun ends the others.
        # What is wrong in this one alone (a file that its machine lacks) is said after a while.
        time.sleep(5)
    print(f"{app.name[0]}: {line}", file=sys.stderr)
    sys.exit(code)
