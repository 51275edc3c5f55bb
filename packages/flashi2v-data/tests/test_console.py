import errno
import logging
import os
import sys
import threading
from typing import Annotated, Literal

import pytest
from cyclopts import App, Parameter
from pydantic import BaseModel, Field

from flashi2v_data.console import configure_logging, one_line, run
from flashi2v_data.errors import InputError


class Options(BaseModel):
    learning_rate: float = Field(default=1e-5, gt=0)
    schedule: Literal["constant", "cosine"] = "constant"


class CustomError(Exception):
    exit_code = 7


app = App(name="tool", help_format="plaintext")


@app.default
def command(mode: str, *, options: Annotated[Options | None, Parameter(name="*")] = None) -> None:
    if mode == "input":
        raise InputError("file.json: what\nis wrong")
    if mode == "custom":
        raise CustomError("asked for")
    if mode == "interrupt":
        raise KeyboardInterrupt
    if mode == "bug":
        raise RuntimeError("a bug")
    if mode == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "videos/a.mp4")
    if mode == "controls":
        raise InputError("\x1b[2J" + 300 * "xxx ")
    logging.getLogger("flashi2v_data.somewhere").info("working on %s", mode)
    logging.getLogger("other").info("chatter")
    print(options)


def _run(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["tool", *arguments])
    with pytest.raises(SystemExit) as caught:
        run(app)
    output = capsys.readouterr()
    return caught.value.code or 0, output.out, output.err


def test_success_exits_0_and_only_this_project_logs_its_progress(monkeypatch, capsys):
    code, out, err = _run(monkeypatch, capsys, "work", "--learning_rate", "0.5")
    assert code == 0
    assert "0.5" in out
    assert err == "INFO working on work\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["input"], "tool: file.json: what is wrong\n"),
        ([], "tool: "),
        (["x", "--unknown", "1"], "tool: Unknown option"),
        (["x", "--learning-rate", "-1"], "tool: --learning-rate: input should be greater than 0"),
        (
            ["x", "--learning-rate", "q", "--schedule", "z"],
            'tool: --learning-rate: input should be a valid number, unable to parse string as a number, got "q"; '
            "--schedule: input should be 'constant' or 'cosine', got \"z\"\n",
        ),
    ],
)
def test_wrong_usage_and_bad_input_exit_2_with_one_line(monkeypatch, capsys, arguments, expected):
    code, _, err = _run(monkeypatch, capsys, *arguments)
    assert code == 2
    assert err.count("\n") == 1
    assert err.startswith(expected)


def test_another_process_than_the_first_of_torchrun_lets_it_speak_before_it_says_the_same(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(
        "flashi2v_data.console.time.sleep", lambda seconds: waited.append((seconds, capsys.readouterr()))
    )
    monkeypatch.setenv("RANK", "0")
    _run(monkeypatch, capsys, "input")
    assert waited == []
    monkeypatch.setenv("RANK", "1")
    code, _, err = _run(monkeypatch, capsys, "input")
    assert (code, err) == (2, "tool: file.json: what is wrong\n")
    assert [(seconds, said.err) for seconds, said in waited] == [(5, "")]


def test_an_error_of_any_package_ends_with_its_own_exit_code(monkeypatch, capsys):
    assert _run(monkeypatch, capsys, "custom") == (7, "", "tool: asked for\n")


def test_what_the_machine_refuses_is_told_in_words_that_name_the_file(monkeypatch, capsys):
    assert _run(monkeypatch, capsys, "full") == (1, "", "tool: the disk is full: videos/a.mp4\n")


def test_a_printed_error_is_one_short_line_without_control_characters(monkeypatch, capsys):
    code, _, err = _run(monkeypatch, capsys, "controls")
    assert code == 2
    assert err.startswith("tool: \\x1b[2Jxxx xxx")
    assert len(err) == 501
    assert err.endswith("...\n")


def test_an_interrupt_exits_130_with_one_line(monkeypatch, capsys):
    code, _, err = _run(monkeypatch, capsys, "interrupt")
    assert (code, err) == (130, "tool: interrupted\n")


def test_a_long_path_does_not_hide_what_is_wrong_with_it():
    line = one_line(f"tool: /data/{'deep/' * 900}a.json: no such\nfile")
    assert len(line) < 200
    assert line.startswith("tool: /data/deep/deep/")
    assert line.endswith("deep/a.json: no such file")
    assert len(one_line("word " * 900)) == 500
    assert one_line("a" * 480) == "a" * 480


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tool", "bug"])
    with pytest.raises(RuntimeError, match="a bug"):
        run(app)


def test_what_the_machine_refuses_to_a_thread_is_one_line_and_a_bug_there_keeps_its_traceback(capsys):
    def fail(error):
        raise error

    configure_logging()
    for error in (OSError(errno.ENOSPC, "No space", "events"), ValueError("a bug")):
        thread = threading.Thread(target=fail, args=(error,))
        thread.start()
        thread.join()
    first, *rest = capsys.readouterr().err.splitlines()
    assert first == "ERROR the disk is full: events"
    assert rest[-1] == "ValueError: a bug"
    assert any("Traceback" in line for line in rest)


@pytest.fixture(autouse=True)
def _restore_logging(monkeypatch):
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers, root.level = handlers, level
