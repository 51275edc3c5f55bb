"""Every console command, held to what README and help promise: exit codes, one line, odd outputs, full disks.

A command that is added without a line here fails the first test.
"""

import importlib.metadata
import json
import os
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import forked
import pytest
import world
from PIL import Image

# A name that no file has, and no terminal should be given as it is.
ABSENT = "absent\x1b[2J\n夜" + "/deep" * 300
CONFIGS = ("--mm-model", "model.json", "--mm-data", "data.json", "--device", "cpu")
SIZES = ("--num-frames", "5", "--height", "32", "--width", "32", "--num-inference-steps", "1", "--device", "cpu")


class Command(NamedTuple):
    """Arguments: bad ones, those with which it prints something, those with which it writes `new`."""

    bad: tuple[str, ...]
    prints: tuple[str, ...] = ("--help",)
    writes: tuple[str, ...] | None = None


COMMANDS = {
    "flashi2v-data filter": Command(
        ("--filter_config", ABSENT), ("--filter_config", "filter.yaml"), ("--filter_config", "filter.yaml")
    ),
    "flashi2v-data export": Command((ABSENT, "-o", "new.parquet"), writes=("store", "-o", "new.parquet")),
    "flashi2v-data inspect": Command((ABSENT,), ("store",)),
    "flashi2v-data meta": Command((ABSENT,), writes=("captioned", "-o", "new.json")),
    "flashi2v-data merge": Command((ABSENT,)),
    "flashi2v-data page": Command(
        ("--filter_config", ABSENT), writes=("--filter_config", "filter.yaml", "-o", "new.html")
    ),
    "flashi2v-data score": Command(
        (ABSENT, "-o", "new.json", "--signals", "still"),
        writes=("shapes/videos.json", "-o", "new.json", "--signals", "still"),
    ),
    "flashi2v-data split": Command((ABSENT, "-o", "new.json"), writes=("shapes/videos.json", "-o", "new.json")),
    "flashi2v-data shapes": Command(
        ("new", "--size", ABSENT), writes=("new", "--num", "2", "--size", "32x32", "--frames", "5")
    ),
    "flashi2v-encode": Command(
        ("--mm-model", ABSENT, "--mm-data", "data.json", "--output", "new"), writes=(*CONFIGS, "--output", "new")
    ),
    "flashi2v-infer": Command(
        ("--mm-model", ABSENT),
        ("--model", "model", "--plan", "--dry-run", *SIZES),
        ("--model", "model", "--image", "image.png", "--prompt", "a star", "-o", "new.mp4", *SIZES),
    ),
    "flashi2v-model calibrate": Command(("model", "--pictures", ABSENT)),
    "flashi2v-model convert": Command(
        (ABSENT, "new", "--to", "wan"), writes=("model", "new", "--to", "diffusers", "--encoders", "model")
    ),
    "flashi2v-model init": Command(("new", "--preset", ABSENT), writes=("new", "--preset", "tiny")),
    "flashi2v-model inspect": Command((ABSENT,), ("model",)),
    "flashi2v-npu-ops doctor": Command(("--device", ABSENT), ("--device", "cpu")),
    "flashi2v-train init": Command(
        ("new", "--videos", ABSENT, "--from", "demo"),
        writes=("new", "--videos", "captioned", "--from", "demo", "--device", "cpu", "--memory", "4"),
    ),
    "flashi2v-train status": Command((ABSENT,), ("run",)),
    "flashi2v-train": Command(
        ("--mm-model", ABSENT, "--mm-data", "data.json", "--save", "new"),
        (*CONFIGS, "--save", "new", "--dry-run"),
        (*CONFIGS, "--save", "new", "--train-iters", "1", "--micro-batch-size", "1"),
    ),
    "flashi2v-web": Command(("--lora", ABSENT, "--data", "new", "--device", "cpu")),
}
every_command = pytest.mark.parametrize("name", COMMANDS)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A directory with all that the commands name."""
    place = world.copy_into(tmp_path_factory.mktemp("commands"))
    (place / "filter.yaml").write_text(json.dumps(world.FILTER | {"save_path": "new"}))
    (place / "model.json").write_text(json.dumps(world.model_settings(Path())))
    (place / "data.json").write_text(json.dumps(world.data_settings(Path())))
    Image.new("RGB", (48, 48), "pink").save(place / "image.png")
    (place / "run").mkdir()
    (place / "run/config.json").write_text(json.dumps({"options": {"train_iters": 10}}))
    captioned = Path(shutil.copytree(place / "shapes", place / "captioned"))
    for clip in json.loads((captioned / "videos.json").read_text()):
        (captioned / clip["path"]).with_suffix(".txt").write_text(clip["cap"] * 10)
    return place


@pytest.fixture
def run(place):
    """Run a command there; what it writes is `new`, and gone before and after."""

    def clean() -> None:
        for path in place.glob("*new*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    clean()
    yield lambda name, *words, **more: forked.run(*name.split(), *words, cwd=place, **more)
    clean()


def assert_one_line(errors: str, command: str) -> None:
    """The last line is the command's own, short and fit for a terminal; there is no traceback."""
    line = errors.splitlines()[-1]
    assert line.startswith(f"{command.split()[0]}"), errors
    assert len(line) <= 500
    assert line.isprintable(), line
    assert "Traceback" not in errors


def into_a_closed_pipe() -> None:
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)


def into_a_full_disk() -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def into_ascii() -> None:
    sys.stdout.reconfigure(encoding="ascii", errors="strict")


def test_every_command_has_its_line_here():
    found = set()
    for script in importlib.metadata.entry_points(group="console_scripts"):
        if script.name.startswith("flashi2v-"):
            app = getattr(importlib.import_module(script.module), "app", None)
            names = [name for name in app if not name.startswith("-")] if app else ["doctor"]
            found |= {f"{script.name} {name}" for name in names}
            if not names or (app and app.default_command):
                found.add(script.name)
    assert found == set(COMMANDS)


@every_command
def test_help_shows_an_example(run, name):
    done = run(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(rf"^.*(Example|flashi2v).*{name}", done.stdout.replace("\n", " "))


@every_command
def test_a_mistyped_option_exits_2_with_one_line(run, name):
    done = run(name, "--nonsense", "1")
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.count("\n") == 1
    assert_one_line(done.stderr, name)


@every_command
def test_bad_input_exits_2_with_one_line_and_leaves_nothing(run, place, name):
    done = run(name, *COMMANDS[name].bad)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.count("\n") == 1
    assert_one_line(done.stderr, name)
    assert not list(place.glob("*new*"))


@every_command
def test_a_reader_that_has_seen_enough_is_no_error(run, name):
    for words in {("--help",), COMMANDS[name].prints}:
        done = run(name, *words, prepare=into_a_closed_pipe)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert "Exception" not in done.stderr


@every_command
def test_an_output_that_cannot_encode_all_characters_gets_what_it_can(run, name):
    for words in {("--help",), COMMANDS[name].prints}:
        done = run(name, *words, prepare=into_ascii)
        assert done.returncode == 0, done.stderr
        assert done.stdout.isascii()


@every_command
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a disk that is always full")
def test_a_full_disk_behind_standard_output_exits_1_with_one_line(run, name):
    done = run(name, *COMMANDS[name].prints, prepare=into_a_full_disk)
    assert done.returncode == 1, done.stderr
    assert_one_line(done.stderr, name)


@pytest.mark.parametrize("name", [name for name in COMMANDS if COMMANDS[name].writes])
def test_a_disk_that_cannot_hold_what_is_written_exits_1_with_one_line(run, place, name):
    pytest.importorskip("resource")  # of Unix
    # Python would cut short the compiled forms of modules, too, and fail on them ever after.
    full = (
        "import resource, sys; sys.dont_write_bytecode = True; resource.setrlimit(resource.RLIMIT_FSIZE, (1000,) * 2)"
    )
    done = run(name, *COMMANDS[name].writes, prepare=partial(exec, full))
    assert done.returncode == 1, done.stderr
    assert_one_line(done.stderr, name)
    assert not [path for path in place.glob("new*") if path.is_file()]
