"""Runs that are killed, stopped or starved, through the command, as users and machines do it."""

import json
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from forked import Command

PLAN = {"train_iters": 12, "save_interval": 1, "micro_batch_size": 1, "lr": 1e-3, "ema_decay": 0.9}

pytestmark = pytest.mark.slow


def start(arguments: list[str], **options) -> Command:
    return Command("flashi2v-train", *arguments, **options)


def lines(run: Path) -> list[dict[str, float]]:
    try:
        text = (run / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def wait_for_steps(run: Path, number: int, process: Command) -> None:
    while len(lines(run)) < number and process.poll() is None:
        time.sleep(0.005)


def largest_file(size: int) -> Callable[[], object]:
    """What makes writing fail in a process as on a full disk; Python itself ignores the signal that goes with it."""
    resource = pytest.importorskip("resource")  # of Unix
    return partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in lines(run)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, new_workspace) -> list[float]:
    directory = tmp_path_factory.mktemp("whole")
    run = directory / "run"
    done = start(new_workspace(directory).arguments(save=run, **PLAN))
    _, errors = done.communicate()
    assert done.returncode == 0, errors
    return losses(run)


def test_a_run_killed_again_and_again_computes_what_an_uninterrupted_one_does(workspace, uninterrupted):
    """kill -9 at random moments of steps that all save."""
    run, chance = workspace.directory / "run", random.Random(5)
    arguments = workspace.arguments(save=run, **PLAN)
    for _ in range(3):
        process = start(arguments)
        wait_for_steps(run, min(len(lines(run)) + chance.randint(1, 3), PLAN["train_iters"]), process)
        time.sleep(chance.random() * 0.1)
        process.kill()
        process.communicate()
    process = start(arguments)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert losses(run) == uninterrupted
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_sigterm_saves_and_ends_well(workspace, uninterrupted, num_processes):
    run = workspace.directory / "run"
    plan = {**PLAN, "save_interval": 100, "global_batch_size": num_processes, "train_iters": 1000}
    process = start(workspace.arguments(save=run, nproc_per_node=num_processes, **plan))
    wait_for_steps(run, 2, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    done = len(lines(run))
    assert 2 <= done < 1000
    assert (run / "latest_checkpointed_iteration.txt").read_text() == f"{done}\n"
    assert "SIGTERM" in json.loads((run / "train_summary.json").read_text())["ended"]
    if num_processes == 1:
        assert losses(run)[:2] == uninterrupted[:2]


def test_a_full_disk_ends_the_run_with_one_line_and_costs_no_checkpoint(workspace):
    run = workspace.directory / "run"
    plan = {**PLAN, "train_iters": 2}
    process = start(workspace.arguments(save=run, **plan))
    assert process.wait() == 0
    before = sorted(path.name for path in (run / "iter_0000002").iterdir())

    process = start(workspace.arguments(save=run, **{**plan, "train_iters": 4}), prepare=largest_file(100_000))
    _, errors = process.communicate()
    assert process.returncode == 1, errors
    last = errors.strip().splitlines()[-1]
    assert last.startswith("flashi2v-train: ")
    assert "iter_0000003 could not be written" in last
    assert "iter_0000002 is the last whole one" in last
    assert "Traceback" not in errors
    assert sorted(path.name for path in (run / "iter_0000002").iterdir()) == before
    assert (run / "latest_checkpointed_iteration.txt").read_text() == "2\n"


def test_a_disk_that_fills_up_between_saves_is_one_line_too(workspace):
    run = workspace.directory / "run"

    shrink = largest_file(2_000)  # a few lines of metrics, no config.json
    process = start(workspace.arguments(save=run, **{**PLAN, "save_interval": 100}), prepare=shrink)
    _, errors = process.communicate()
    assert process.returncode == 1, errors
    assert errors.strip().splitlines()[-1].startswith("flashi2v-train: the file is too large for the disk")
    assert "Traceback" not in errors
