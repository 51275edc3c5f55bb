import logging
import sys
from typing import Annotated, Literal

import pytest
from cyclopts import App, Parameter
from pydantic import BaseModel, Field

from flashi2v_data.console import run
from flashi2v_data.errors import InputError


class Options(BaseModel):
    learning_rate: float = Field(default=1e-5, gt=0)
    schedule: Literal["constant", "cosine"] = "constant"


class CustomError(Exception):
    pass


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
    logging.getLogger("flashi2v_data.somewhere").info("working on %s", mode)
    logging.getLogger("other").info("chatter")
    print(options)


def _run(monkeypatch, capsys, *arguments: str, errors=(InputError,)) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["tool", *arguments])
    with pytest.raises(SystemExit) as caught:
        run(app, errors=errors)
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


def test_further_errors_may_be_named(monkeypatch, capsys):
    assert _run(monkeypatch, capsys, "custom", errors=(InputError, CustomError))[0] == 2


def test_an_interrupt_exits_130_with_one_line(monkeypatch, capsys):
    code, _, err = _run(monkeypatch, capsys, "interrupt")
    assert (code, err) == (130, "tool: interrupted\n")


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tool", "bug"])
    with pytest.raises(RuntimeError, match="a bug"):
        run(app)


@pytest.fixture(autouse=True)
def _restore_logging():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers, root.level = handlers, level
