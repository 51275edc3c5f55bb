"""What a run says of itself: files, curves, and how it is summed up."""

import json
import logging
import math
import time
from pathlib import Path

import forked
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flashi2v_data.errors import InputError
from flashi2v_data.locking import hold
from flashi2v_train import metrics
from flashi2v_train.history import Curve, held_out_table
from flashi2v_train.metrics import MetricsLog
from flashi2v_train.options import TrainOptions
from flashi2v_train.status import describe


def options(directory: Path, **changes) -> TrainOptions:
    return TrainOptions(mm_model="m.json", mm_data="d.json", save=directory, train_iters=300, **changes)


def numbers(step: int, **changes) -> dict[str, float]:
    return {
        "step": step,
        "loss": 1 / step,
        "grad_norm": 0.5,
        "lr": 1e-4,
        "seconds": 2.0,
        "samples_per_second": 4.0,
        "tokens_per_second": 400.0,
        "data_wait_share": 0.25,
        "skipped_videos": step // 2,
        "skipped_steps": 0,
        "peak_memory_bytes": 1000 - step,
        **changes,
    }


def lines(directory: Path, name: str = "metrics.jsonl") -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / name).read_text().splitlines()]


def summary(directory: Path) -> dict[str, object]:
    return json.loads((directory / "train_summary.json").read_text())


def curve(directory: Path, name: str) -> dict[int, float]:
    board = EventAccumulator(str(directory))
    board.Reload()
    return {point.step: point.value for point in board.Scalars(name)}


def test_lines_and_curves_have_intervals_of_their_own(tmp_path):
    with MetricsLog(options(tmp_path, log_interval=2, tensorboard_log_interval=3), 0, {}) as log:
        for step in range(1, 7):
            log.write(numbers(step))
        log.write_validation(6, {"validation_loss": 0.5, "validation_loss/sigma_0.5": 0.25})
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 6]
    assert lines(tmp_path)[0] == numbers(2)
    assert curve(tmp_path, "loss") == pytest.approx({3: 1 / 3, 6: 1 / 6})
    assert curve(tmp_path, "validation_loss/sigma_0.5") == {6: 0.25}
    validation = {"step": 6, "validation_loss": 0.5, "validation_loss/sigma_0.5": 0.25}
    assert lines(tmp_path, "validation.jsonl") == [validation]


def test_what_is_not_finite_is_null_in_files_that_any_reader_takes(tmp_path):
    with MetricsLog(options(tmp_path), 0, {}) as log:
        log.write(numbers(1, loss=2.0))
        log.write(numbers(2, loss=math.nan, grad_norm=math.inf, skipped_steps=1))
        log.finish("done", {})
    text = (tmp_path / "metrics.jsonl").read_text() + (tmp_path / "train_summary.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert (lines(tmp_path)[1]["loss"], lines(tmp_path)[1]["grad_norm"]) == (None, None)
    assert (summary(tmp_path)["final_loss"], summary(tmp_path)["skipped_steps"]) == (2.0, 1)


def test_a_resumed_run_is_summed_up_as_a_whole(tmp_path):
    with MetricsLog(options(tmp_path), 0, {}) as log:
        for step in range(1, 6):
            log.write(numbers(step, loss=0.01 if step == 2 else 1.0))
        log.write_validation(5, {"validation_loss": 0.5})
        log.finish("stopped by SIGTERM", {})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # as a killed process leaves it
    with MetricsLog(options(tmp_path), 3, {}) as log:
        assert not (tmp_path / "train_summary.json").exists()
        assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
        assert lines(tmp_path, "validation.jsonl") == []
        log.write(numbers(4, loss=1.0, seconds=6.0, samples_per_second=1.0))
        log.finish("done", {"layout": "one process"})
    found = summary(tmp_path)
    assert (found["ended"], found["steps"], found["layout"]) == ("done", 4, "one process")
    assert (found["least_loss"], found["least_loss_step"], found["final_loss"]) == (0.01, 2, 1.0)
    assert found["seconds_per_step"] == pytest.approx(12 / 4)
    assert found["samples_per_second"] == pytest.approx((3 * 8 + 6) / 12)
    assert (found["peak_memory_bytes"], found["skipped_videos"]) == (999, 2)


def test_a_run_with_nothing_left_to_do_keeps_its_summary(tmp_path):
    for first in (0, 2):
        with MetricsLog(options(tmp_path), first, {}) as log:
            for step in range(first + 1, 3):
                log.write(numbers(step))
            log.finish("done", {})
    assert (summary(tmp_path)["steps"], summary(tmp_path)["skipped_videos"]) == (2, 1)


def test_a_file_of_metrics_that_is_damaged_costs_its_damaged_lines_alone(tmp_path, caplog):
    good = [json.dumps(numbers(step)).encode() for step in (1, 2, 3)]
    bad = [b"\xff\xfe\0", b"[1]", b"3", b'{"step": "x"}', b'{"loss": 1, "step": 1}', 5000 * b"[", b"null"]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([good[0], *bad, good[1], good[2], b'{"step": 4, "lo']))
    with MetricsLog(options(tmp_path), 2, {}) as log:
        log.finish("done", {})
    assert lines(tmp_path) == [numbers(1), numbers(2)]
    assert f"{len(bad)} of 11 lines are damaged" in caplog.text
    assert summary(tmp_path)["least_loss"] == 0.5


def test_without_a_terminal_a_line_tells_of_a_step_now_and_then(tmp_path, caplog, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    with MetricsLog(options(tmp_path, log_interval=2), 0, {}) as log, caplog.at_level(logging.INFO):
        for step in range(1, 11):
            now[0] += 3
            log.write(numbers(step))
    told = [record.message for record in caplog.records if record.message.startswith("step ")]
    assert [line.split(":")[0] for line in told] == ["step 2 of 300", "step 6 of 300", "step 10 of 300"]
    assert told[0] == "step 2 of 300: loss 0.5000, gradient norm 0.5, rate 0.0001, 2 s a step, 14:54 left"


def test_it_is_told_when_the_first_step_is_done(tmp_path, caplog):
    with MetricsLog(options(tmp_path), 4, {}, started=time.monotonic() - 65) as log, caplog.at_level(logging.INFO):
        log.write(numbers(5))
        log.write(numbers(6))
    assert [line for line in caplog.messages if line.startswith("first step after 01:")] == caplog.messages[:1]
    assert "first step after" not in "".join(caplog.messages[1:])


def test_a_curve_of_any_length_has_few_points_and_the_same_mean():
    curve = Curve()
    for step in range(1, 5001):
        curve.add(step, math.inf if step == 7 else float(step))
    assert curve.steps_per_point == 4
    assert len(curve.points) == 1249  # of 4,999 steps
    assert curve.points[0] == (2.5, 2.5)
    assert all(step == loss for step, loss in curve.points)


def test_held_out_clips_are_compared_before_and_after_training_and_with_real_ones():
    first = {"step": 0, "validation_loss": 0.5, "first_frame_psnr": 10.04, "motion": 0.5, "real_motion": 5.0}
    last = {"step": 90, "validation_loss": None, "first_frame_psnr": 20.0, "motion": 4.0, "real_motion": 5.0}
    lines = held_out_table([first, {"step": 40, "validation_loss": 0.4}, last]).splitlines()
    assert [line.split() for line in lines] == [
        ["held-out", "clips", "before", "training", "at", "step", "90", "real", "clips"],
        ["loss", "0.5000"],
        ["first", "frame", "PSNR", "[dB]", "10.0", "20.0"],
        ["motion", "[levels", "of", "255", "a", "frame]", "0.50", "4.00", "5.00"],
    ]
    assert held_out_table([first]) is None


def test_status_says_where_a_run_is(tmp_path):
    with pytest.raises(InputError, match="no run of flashi2v-train"):
        describe(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"options": {"train_iters": 300}}))
    assert describe(tmp_path).splitlines() == [
        f"run         {tmp_path}: not running: it has been ended",
        "step        0 of 300",
    ]
    with MetricsLog(options(tmp_path), 0, {}) as log:
        for step in range(1, 31):
            log.write(numbers(step))
        log.write_validation(30, {"validation_loss": 0.25})
        with hold(tmp_path / ".lock", "it"):
            # A process does not see its own lock.
            forked.call("others", 1, assert_status, tmp_path, ["running (process", "2 s a step, 09:00 left"])
        log.finish("stopped by SIGTERM", {})
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("20\n")
    told = describe(tmp_path)
    assert "stopped by SIGTERM" in told
    assert "30 of 300, 10%, 2 s a step\n" in told
    assert "loss        0.0333, mean of the last 3 steps 0.0345" in told
    assert "checkpoint  step 20, 00:00 ago" in told
    assert "validation  step 30: loss 0.2500" in told
    assert "train_loss.png" in told


def assert_status(rank, directory, words):
    told = describe(directory)
    assert all(word in told for word in words), told


def test_speed_is_that_of_iterations_100_to_200_and_of_all(tmp_path, caplog):
    with MetricsLog(options(tmp_path), 0, {}) as log, caplog.at_level(logging.INFO):
        for step in range(1, 251):
            seconds = 1.0 if 100 <= step <= 200 else 3.0
            log.write(numbers(step, seconds=seconds, samples_per_second=8 / seconds))
        log.finish("done", {})
    found = summary(tmp_path)
    assert found["timed_steps"] == [100, 200]
    assert (found["seconds_per_step"], found["samples_per_second"]) == (1.0, pytest.approx(8.0))
    assert found["seconds_per_step_overall"] == pytest.approx((101 + 149 * 3) / 250)
    assert found["samples_per_second_overall"] == pytest.approx(8 * 250 / (101 + 149 * 3))
    assert "steps 100 to 200: elapsed time per iteration 1.000 s, 8.000 samples per second" in caplog.text


def test_a_resumed_run_goes_on_in_the_same_wandb_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for first in (0, 1):
        with MetricsLog(
            options(tmp_path, wandb_project="p", wandb_save_dir=tmp_path / "w"), first, {"a": first}
        ) as log:
            log.write(numbers(first + 1))
            log.finish("done", {})
    name = (tmp_path / "wandb_id.txt").read_text().strip()
    runs = list((tmp_path / "w").rglob("*.wandb"))
    assert runs
    assert {file.name for file in runs} == {f"run-{name}.wandb"}
