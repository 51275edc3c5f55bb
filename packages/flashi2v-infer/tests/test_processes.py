"""Sampling in several processes of torchrun gives what one process gives."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import forked
import pytest

from flashi2v_data import read_frames
from flashi2v_infer import InputError
from flashi2v_infer.execution import Execution
from flashi2v_infer.processes import join_processes

TORCHRUN = Path(sys.executable).with_name("torchrun")
INFER = Path(sys.executable).with_name("flashi2v-infer")


def started(num_processes: int, *arguments: object) -> list[tuple[str, str]]:
    """What the processes of a run say that started as torchrun starts them, to standard output and standard error."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    world = {"WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes, "MASTER_ADDR": "localhost"}
    environments = [world | {"RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port} for rank in range(num_processes)]
    processes = [
        forked.Command("flashi2v-infer", *arguments, env=os.environ | {key: str(value) for key, value in found.items()})
        for found in environments
    ]
    return [process.communicate() for process in processes]


def torchrun(num_processes: int, *arguments: object) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    command = [TORCHRUN, "--nproc-per-node", num_processes, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command += ["--no-python", INFER, *arguments]
    return subprocess.run(
        [*map(str, command)], capture_output=True, text=True, check=False, env=environment | {"OMP_NUM_THREADS": "1"}
    )


@pytest.fixture
def batch(job):
    """Three videos, the second with an image that is not there, and what one process makes of them."""
    Path("prompts.txt").write_text("a red circle\na blue square\na dark object\na dark object\n")
    Path("images.txt").write_text("first.png\nnowhere.png\nsecond.jpg\nfirst.png\n")
    job(save_path="single")
    assert forked.run("flashi2v-infer", "--mm-model", "inference_model.json").returncode == 2
    return job(save_path="shared")


@pytest.mark.slow
def test_two_pairs_of_processes_sample_the_same_videos(batch):
    (output, errors), *others = started(4, "--mm-model", batch, "--context-parallel-size", 2)
    assert output == "wrote 3 videos and video_grid.mp4 to shared\n"
    assert "flashi2v-infer: images.txt line 2: no usable image" in errors
    assert errors.count("nowhere.png: no such file") == 1
    assert not any(output or "nowhere.png" in errors for output, errors in others)
    names = sorted(path.name for path in Path("single").iterdir())
    assert names == sorted(path.name for path in Path("shared").iterdir())
    assert len(names) == 7
    for name in names:
        ours, theirs = Path("shared") / name, Path("single") / name
        if name.endswith(".mp4"):
            frames = read_frames(ours, range(5)).astype(int)
            assert abs(frames - read_frames(theirs, range(5))).mean() < 0.5
        else:
            record, expected = (json.loads(path.read_text()) for path in (ours, theirs))
            assert record.pop("first_frame_psnr") == pytest.approx(expected.pop("first_frame_psnr"), abs=0.1)
            assert record == expected


@pytest.mark.slow
def test_two_processes_share_one_video(model_directory, job):
    job()
    arguments = ["--model", model_directory, "--image", "first.png", "--prompt", "a red circle"]
    arguments += ["--num-frames", 5, "--height", 32, "--width", 48, "--num-inference-steps", 2, "--device", "cpu"]
    assert forked.run("flashi2v-infer", *arguments, "-o", "one.mp4").returncode == 0
    started(3, *arguments, "-o", "three.mp4", "--context-parallel-size", 3, "--ulysses-degree", 3)  # of 4 heads
    started(4, *arguments, "-o", "four.mp4", "--context-parallel-size", 2, "--guidance-parallel-size", 2)
    expected = read_frames("one.mp4", range(5)).astype(int)
    for name in ("three.mp4", "four.mp4"):
        assert abs(read_frames(name, range(5)).astype(int) - expected).mean() < 0.5


@pytest.mark.slow
def test_devices_starts_the_processes_in_the_best_layout(model_directory, job):
    job()
    arguments = ["--model", model_directory, "--image", "first.png", "--prompt", "a red circle", "--device", "cpu"]
    arguments += ["--num-frames", 5, "--height", 32, "--width", 48, "--num-inference-steps", 2]
    assert forked.run("flashi2v-infer", *arguments, "-o", "one.mp4").returncode == 0
    result = forked.run("flashi2v-infer", *arguments, "-o", "two.mp4", "--devices", "2", "--plan")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("best: ") == 1
    assert result.stdout.count("wrote two.mp4") == 1
    frames, expected = (read_frames(name, range(5)).astype(int) for name in ("two.mp4", "one.mp4"))
    assert abs(frames - expected).mean() < 0.5
    wrong = forked.run("flashi2v-infer", *arguments, "-o", "no.mp4", "--devices", "2", "--context-parallel-size", "4")
    assert wrong.returncode == 2
    assert "does not divide the 2 processes of this run" in wrong.stderr


@pytest.mark.slow
def test_what_is_wrong_is_one_line(job):
    result = torchrun(3, "--mm-model", job(), "--context-parallel-size", 2)
    assert result.returncode == 1  # torchrun's, whatever the code of its processes
    lines = [line for line in result.stderr.splitlines() if line.startswith("flashi2v-infer: ")]
    # The others leave it to the first, who ends them by its end, where a busy machine does not keep torchrun from it.
    assert {*lines} == {
        "flashi2v-infer: --context-parallel-size 2 does not divide the 3 processes of this run: start as many by "
        "--devices 2, or by torchrun"
    }
    assert not Path("samples").exists()


@pytest.mark.parametrize(
    ("num_processes", "arguments", "message"),
    [
        (1, ("cpu", Execution(context_parallel_size=2)), "size 2 does not divide the 1 processes of this run: start"),
        (
            *(2, ("cpu", Execution(context_parallel_size=2, guidance_parallel_size=2))),
            "--context-parallel-size 2 x --guidance-parallel-size 2 does not divide the 2 processes of this run",
        ),
        (2, ("cpu:0", Execution()), "is one device for 2 processes: leave its number out"),
    ],
)
def test_processes_that_do_not_fit_are_refused(monkeypatch, num_processes, arguments, message):
    settings = {"WORLD_SIZE": num_processes, "RANK": 0, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": num_processes}
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(InputError, match=message), join_processes(*arguments):
        pass


def test_one_process_shares_its_videos_with_none():
    with join_processes("cpu", Execution()) as alone:
        assert (alone.is_first, alone.writes, alone.share([1, 2, 3])) == (True, True, [1, 2, 3])


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [2, 3])
def test_processes_that_share_a_video_leave_out_the_same_calls(tmp_path, monkeypatch, num_processes):
    monkeypatch.chdir(tmp_path)
    options = ("--model", "demo", "--device", "cpu", "--guidance-scale", 4, "--num-inference-steps", 8)
    options += ("--speed", 2.5)
    assert forked.run("flashi2v-infer", *options, "-o", "single.mp4").returncode == 0
    shared = ("--context-parallel-size", num_processes, "-o", "shared.mp4")
    (output, errors), *_ = started(num_processes, *options, *shared)
    assert output == "wrote shared.mp4\n", errors
    single, together = (json.loads(Path(f"{name}.json").read_text()) for name in ("single", "shared"))
    assert together["sampling_plan"] == single["sampling_plan"]
    frames = [read_frames(f"{name}.mp4", range(17)).astype(int) for name in ("single", "shared")]
    assert abs(frames[0] - frames[1]).mean() < 1
