"""The queue on disk, and the processes that work on it."""

import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import forked
import pytest

from flashi2v_data.errors import InputError
from flashi2v_infer import demo, read_record
from flashi2v_infer.defaults import read_defaults
from flashi2v_infer.execution import Execution
from flashi2v_infer.web.jobs import Job, Jobs
from flashi2v_infer.web.schema import Limits, Order, Served, describe
from flashi2v_infer.web.worker import Setup
from flashi2v_infer.web.workers import Workers

SERVED = Served("demo", demo.NAME, read_defaults("demo"), Limits(), {"style": "/adapters/style.safetensors"})
DAY = 86400.0


@pytest.fixture
def jobs(tmp_path) -> Jobs:
    return Jobs(tmp_path / "data")


def add(jobs: Jobs, owner: str = "", image: str = "images/none", max_queue: int = 10**6, **order: object) -> Job | None:
    order = {"prompt": demo.PROMPT, "seed": 1, **order}
    return jobs.add(owner, SERVED.request(Order(**order), image), max_queue)


def finish(jobs: Jobs, job: Job, size: int = 0) -> None:
    """Do what a worker does, without sampling."""
    while (taken := jobs.claim("w")).id != job.id:
        jobs.end(taken, "failed")
    jobs.video(job).write_bytes(bytes(size))
    jobs.video(job).with_suffix(".json").write_text("{}")
    jobs.end(taken, "done")


def test_a_queue_is_served_in_order_and_each_job_once(jobs):
    with ThreadPoolExecutor(8) as pool:
        added = list(pool.map(lambda number: add(jobs, seed=number), range(200)))
    several = [jobs, Jobs(jobs.directory), Jobs(jobs.directory)]  # as several processes have it
    taken: list[list[int]] = [[], [], []]

    def work(index: int) -> None:
        while job := several[index].claim(str(index)):
            taken[index].append(job.number)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(number for numbers in taken for number in numbers) == Counter(job.number for job in added)
    assert all(numbers == sorted(numbers) for numbers in taken)
    assert len({job.id for job in added}) == 200


def test_no_more_wait_than_may(jobs):
    assert [add(jobs, max_queue=2) is not None for _ in range(3)] == [True, True, False]
    jobs.claim("w")
    assert add(jobs, max_queue=2) is not None


def test_nobody_sees_or_touches_the_jobs_of_others(jobs):
    job = add(jobs, "alice")
    for act in (jobs.cancel, jobs.delete, lambda id, owner: jobs.pin(id, owner, True)):
        act(job.id, "bob")
    assert jobs.get(job.id, "bob") is None
    assert jobs.find("bob", limit=9) == []
    assert jobs.get(job.id, "alice") == job


def test_jobs_are_found_by_pages_and_by_words(jobs):
    added = [add(jobs, prompt=f"a star_{number} moves") for number in range(5)]
    first = jobs.find("", limit=2)
    assert [job.number for job in first] == [added[4].number, added[3].number]
    assert [job.number for job in jobs.find("", limit=9, after=first[-1].number)] == [
        job.number for job in added[2::-1]
    ]
    assert [job.number for job in jobs.find("", limit=2, ascending=True)] == [job.number for job in added[:2]]
    assert [job.number for job in jobs.find("", limit=9, words="STAR_3")] == [added[3].number]
    assert jobs.find("", limit=9, words="%") == []
    assert jobs.ahead_of(added[3]) == 3


def test_a_waiting_job_is_cancelled_at_once_and_a_running_one_by_its_worker(jobs):
    running, waiting = add(jobs), add(jobs)
    taken = jobs.claim("w")
    for job in (running, waiting):
        jobs.cancel(job.id, "")
    assert jobs.get(waiting.id, "").state == "cancelled"
    assert jobs.get(running.id, "").state == "running"
    assert jobs.is_cancelled(taken)
    jobs.end(taken, "cancelled")
    assert jobs.get(running.id, "").state == "cancelled"
    assert jobs.claim("w") is None


def test_what_a_dead_worker_left_is_done_where_its_record_is_there_and_else_named(jobs):
    written, cut = add(jobs), add(jobs)
    for job in (written, cut):
        jobs.claim("w")
        jobs.progress(job, 3, 25, 1.0)
    jobs.video(written).with_suffix(".json").write_text("{}")
    assert [job.id for job in jobs.interrupted("w", "signal 9")] == [cut.id]
    assert jobs.get(written.id, "").state == "done"
    assert jobs.get(cut.id, "").error == "interrupted at step 3 of 25: signal 9; queue it again"
    # Should it live after all, it has no say any more.
    jobs.end(jobs.get(cut.id, ""), "done")
    assert jobs.get(cut.id, "").state == "failed"


def test_a_server_that_ends_on_purpose_puts_its_work_back(jobs):
    first, second, third = add(jobs), add(jobs), add(jobs)
    jobs.claim("w")
    jobs.claim("v")
    jobs.cancel(second.id, "")
    assert jobs.interrupted(None, "the server ended", again=True) == []
    assert [jobs.get(job.id, "").state for job in (first, second, third)] == ["queued", "cancelled", "queued"]
    assert jobs.claim("w").number == first.number


def test_limits_by_age_and_size_remove_the_oldest_but_nothing_that_is_pinned_or_unfinished(jobs, monkeypatch):
    now = time.time()
    added = []
    for age in (5, 4, 3, 2):
        monkeypatch.setattr(time, "time", lambda age=age: now - age * DAY)
        image = jobs.add_image(b"picture %d" % age)
        os.utime(jobs.directory / image, (now - age * DAY,) * 2)
        added.append(add(jobs, image=image))
        finish(jobs, added[-1], 1000)
    monkeypatch.undo()
    waiting = add(jobs, image=jobs.add_image(b"of one that waits"))
    jobs.pin(added[0].id, "", True)
    jobs.sweep(keep_days=3.5)
    assert [jobs.get(job.id, "") is not None for job in added] == [True, False, True, True]
    before = jobs.num_bytes()
    jobs.sweep(keep_bytes=before - 1)
    assert [jobs.get(job.id, "") is not None for job in added] == [True, False, False, True]
    jobs.sweep(keep_bytes=1)
    assert [jobs.get(job.id, "") is not None for job in added] == [True, False, False, False]
    assert jobs.get(waiting.id, "").state == "queued"
    images = {path.name for path in (jobs.directory / "images").iterdir()}
    assert images == {Path(job.request["image"]).name for job in (added[0], waiting)}
    assert {path.stem for path in (jobs.directory / "videos").iterdir()} == {added[0].id}


def test_a_deleted_job_is_gone_from_sight_and_its_files_soon(jobs):
    job, other = add(jobs), add(jobs)
    finish(jobs, job, 10)
    for each in (job, other):
        jobs.delete(each.id, "")
        assert jobs.get(each.id, "") is None
    jobs.sweep()
    assert jobs.counts() == {}
    assert not list((jobs.directory / "videos").iterdir())


def test_jobs_of_another_version_are_refused(jobs):
    jobs._run("PRAGMA user_version = 7")
    with pytest.raises(InputError, match="another version of flashi2v-web"):
        Jobs(jobs.directory)
    other = jobs.directory / "other"
    other.mkdir()
    (other / "jobs.sqlite3").write_bytes(b"no database" * 100)
    with pytest.raises(InputError, match=r"--data: cannot use .*jobs.sqlite3: file is not a database"):
        Jobs(other)


def test_orders_are_filled_in_from_what_the_model_was_trained_for():
    request = SERVED.request(Order(prompt="a star", seconds=2, size="80x64", seed="7", lora="style:0.5"), "images/none")
    settings = request["settings"]
    assert (settings["num_frames"], settings["height"], settings["width"], request["fps"]) == (33, 64, 80, 16)
    assert (settings["num_inference_steps"], settings["guidance_scale"], request["seed"]) == (6, 3.0, 7)
    assert str(*SERVED.choices(request["lora"])) == "/adapters/style.safetensors:0.5"
    first, second = (SERVED.request(Order(prompt="a star"), "")["seed"] for _ in range(2))
    assert first != second


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        ({"num_frames": 18}, "num_frames must be 4k \\+ 1, got 18: use 17 or 21"),
        ({"num_frames": 401}, "num_frames: this server allows at most 121, got 401"),
        ({"size": "1920x1072"}, "size: pixels of a frame: this server allows at most 921,600"),
        ({"size": "70x64"}, "width must be divisible by 16"),
        ({"num_inference_steps": 101}, "num_inference_steps: this server allows at most 100"),
        ({"seconds": 1, "num_frames": 17}, "give one of seconds and num_frames"),
        ({"negative_prompt": "blur", "guidance_scale": 1}, "negative_prompt has no effect with guidance_scale 1"),
        ({"lora": "../../etc/passwd"}, "lora: there is no adapter '../../etc/passwd'; known are: style"),
        ({"lora": "style:nan"}, "lora: "),
        ({"prompt": " "}, "prompt\n  Value error, must hold words"),
    ],
)
def test_what_cannot_be_sampled_is_refused_before_it_waits(order, reason):
    with pytest.raises(ValueError, match=reason):
        SERVED.request(Order(**{"prompt": "a star", **order}), "images/none")


@pytest.fixture(scope="module")
def working(tmp_path_factory):
    """A queue with a worker."""
    directory = tmp_path_factory.mktemp("working")
    jobs = Jobs(directory)
    workers = Workers(Setup(directory, SERVED, Execution(device="cpu", keep_text_encoder=True)), jobs, 1)
    workers.start()
    yield jobs, workers
    workers.stop()


def until(is_so: Callable[[], object]) -> None:
    while not is_so():
        time.sleep(0.01)


@pytest.fixture
def order(working):
    """Queue a job of the demo model."""
    jobs, workers = working

    def queue(**more: object) -> Job:
        job = add(jobs, image=jobs.add_image(demo.IMAGE.read_bytes()), **more)
        workers.wake()
        return job

    return queue


def ended(jobs: Jobs, job: Job) -> Job:
    until(lambda: jobs.get(job.id, "").has_ended)
    return jobs.get(job.id, "")


def test_a_video_is_that_of_the_command_byte_by_byte(working, order, tmp_path):
    jobs, _ = working
    job = ended(jobs, order(seed=3, num_inference_steps=3, flow_shift=2.5, prompt="a zebra"))
    assert job.state == "done", job.error
    assert any("cannot read a, zebra" in note or "cannot read zebra" in note for note in job.notes), job.notes
    words = ("--model", "demo", "--image", job.request["image"], "--prompt", "a zebra", "--seed", "3")
    words += ("--num-inference-steps", "3", "--flow-shift", "2.5", "--device", "cpu")
    forked.run("flashi2v-infer", *words, "-o", tmp_path / "x.mp4", check=True, cwd=jobs.directory)
    assert (tmp_path / "x.json").read_text() == jobs.video(job).with_suffix(".json").read_text()
    assert (tmp_path / "x.mp4").read_bytes() == jobs.video(job).read_bytes()
    assert read_record(jobs.video(job))["model_settings"]["scheduler"]["shift"] == 2.5
    # The next job starts from the model's own shift again.
    other = ended(jobs, order(seed=3, num_inference_steps=1))
    assert read_record(jobs.video(other))["model_settings"]["scheduler"]["shift"] != 2.5


def test_a_job_shows_how_far_it_is_and_stops_when_it_is_cancelled(working, order):
    jobs, _ = working
    job = order(num_inference_steps=100, num_frames=49)
    until(lambda: jobs.get(job.id, "").step >= 2)
    assert jobs.preview(job).stat().st_size > 100  # within two steps
    shown = describe(jobs.get(job.id, ""), "demo")
    assert (shown.status, shown.seconds_left > 0) == ("in_progress", True)
    jobs.cancel(job.id, "")
    job = ended(jobs, job)
    assert (job.state, job.step < 100) == ("cancelled", True)
    assert not jobs.preview(job).exists()
    assert not jobs.video(job).exists()


def test_a_job_is_cancelled_while_the_vae_decodes(working, order):
    jobs, _ = working
    job = order(num_inference_steps=1, num_frames=49, size="128x128")
    until(lambda: jobs.get(job.id, "").step == 1)
    jobs.cancel(job.id, "")
    assert ended(jobs, job).state == "cancelled"
    assert ended(jobs, order(num_inference_steps=1)).state == "done"  # and what it left does no harm


def test_an_adapter_that_is_not_there_fails_its_own_job_with_one_line(working, order):
    jobs, _ = working
    job = ended(jobs, order(lora="style"))
    assert (job.state, job.code) == ("failed", "invalid_request")
    assert "/adapters/style.safetensors" in job.error
    assert "\n" not in job.error
    assert ended(jobs, order(num_inference_steps=1)).state == "done"


def test_a_killed_worker_costs_its_job_alone_and_the_queue_goes_on(working, order):
    jobs, workers = working
    done = ended(jobs, order(num_inference_steps=1))
    cut, waiting = order(num_inference_steps=100, num_frames=49), order(num_inference_steps=1)
    until(lambda: jobs.get(cut.id, "").step)
    os.kill(workers._groups[0]._processes[0].pid, signal.SIGKILL)
    assert ended(jobs, waiting).state == "done"
    cut = jobs.get(cut.id, "")
    assert (cut.state, cut.code) == ("failed", "interrupted")
    assert "of 100: its worker ended (signal 9); queue it again" in cut.error
    assert jobs.get(done.id, "").state == "done"
    assert jobs.video(done).exists()


def test_processes_that_share_a_video_sample_what_one_does_and_stop_together(working, order, tmp_path):
    jobs, _ = working
    alone = ended(jobs, order(num_inference_steps=2, seed=5))
    directory = Path(shutil.copytree(jobs.directory / "images", tmp_path / "images")).parent
    several = Jobs(directory)
    execution = Execution(device="cpu", keep_text_encoder=True, context_parallel_size=2)
    workers = Workers(Setup(directory, SERVED, execution), several, 1)
    workers.start()
    try:
        cut = add(several, image=alone.request["image"], num_inference_steps=100, num_frames=49)
        job = several.add("", alone.request, 9)
        until(lambda: several.get(cut.id, "").step)
        several.cancel(cut.id, "")
        assert ended(several, job).state == "done", several.get(job.id, "").error
        assert several.get(cut.id, "").state == "cancelled"
        numbers = [read_record(each.video(one))["first_frame_psnr"] for each, one in ((jobs, alone), (several, job))]
        assert numbers[0] == pytest.approx(numbers[1], abs=0.05)
    finally:
        workers.stop()
