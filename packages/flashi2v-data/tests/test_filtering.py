"""The command `filter` on what goes wrong: real processes, real signals, real full disks."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import lmdb
import pytest

from flashi2v_data.store.reader import open_store

FILTER = """\
ann_txt_path: videos.txt
save_path: lmdb
sample_height: 32
sample_width: 48
sample_num_frames: 5
min_hxw: 1000
train_fps: 16
max_h_div_w_ratio: 1.2
min_h_div_w_ratio: 0.4
"""
COMMAND = [sys.executable, "-m", "flashi2v_data.cli", "filter", "--filter_config", "filter.yaml"]


@pytest.fixture
def place(tmp_path, shapes):
    """A directory to filter in, by default the shapes with all that entries may leave out left out."""
    (tmp_path / "filter.yaml").write_text(FILTER)
    shutil.copytree(shapes / "videos", tmp_path / "videos")
    entries = [{"path": f"videos/{n:06d}.mp4", "cap": f"clip {n}"} for n in range(12)]
    return _write(tmp_path, entries)


def _write(place: Path, entries: list) -> Path:
    (place / "meta.json").write_text(json.dumps(entries))
    (place / "videos.txt").write_text(f"{place},meta.json\n")
    return place


def _complete(num: int) -> list:
    size = {"height": 32, "width": 48}
    return [
        {"path": f"{n}.mp4", "cap": f"clip {n} " * 60, "resolution": size, "fps": 16, "num_frames": 4 + n % 9}
        for n in range(num)
    ]


def _filter(place: Path, *arguments: str, **more) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, "--jobs", "2", *arguments]
    return subprocess.run(command, cwd=place, capture_output=True, text=True, check=False, **more)


def _num_entries(path: Path) -> int:
    with lmdb.open(str(path), readonly=True) as environment:
        return environment.stat()["entries"]


def _store(place: Path) -> list:
    (path,) = (place / "lmdb").glob("*.lmdb")
    records = list(open_store(path))
    assert path.name == f"filtered_samples_{len(records)}.lmdb"
    return records


def test_a_second_filter_with_other_limits_opens_no_video(place):
    first = _filter(place)
    assert (first.returncode, first.stderr) == (0, "")
    assert len(_store(place)) == 12
    for path in (place / "videos").iterdir():
        status = path.stat()
        path.write_bytes(b"x" * status.st_size)  # whoever opens it fails
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    text = FILTER.replace("frames: 5", "frames: 9").replace("lmdb", "other") + "probe_cache_path: lmdb/probe_cache\n"
    (place / "filter.yaml").write_text(text)
    assert _filter(place).returncode == 0
    assert len(list(open_store(place / "other"))) == 12
    assert not (place / "other/probe_cache").exists()


def test_an_interrupted_filter_goes_on_where_it_stopped_and_opens_no_video_twice(place, write_hanging_video):
    write_hanging_video(place / "videos/hangs.mp4")
    entries = json.loads((place / "meta.json").read_text())
    _write(place, [*entries, {"path": "videos/hangs.mp4", "cap": "never answers"}])
    process = subprocess.Popen(
        [*COMMAND, "--jobs", "2", "--probe-timeout", "100"],
        cwd=place,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Background jobs of a shell, as a CI may be, ignore interrupts and hand that down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    cache = place / "lmdb/probe_cache/data.mdb"
    while not (cache.exists() and cache.stat().st_size) or _num_entries(cache.parent) < len(entries):
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes of the command
    _, errors = process.communicate()
    assert (process.returncode, errors) == (130, "flashi2v-data: interrupted: continue with --resume\n")
    assert sorted(path.name for path in (place / "lmdb").iterdir()) == ["probe_cache", "unfinished"]

    again = _filter(place)
    assert again.returncode == 2
    assert again.stderr == (
        "flashi2v-data: lmdb/unfinished was left by an unfinished run: continue it with --resume, or remove it\n"
    )
    for path in (place / "videos").iterdir():
        if path.name != "hangs.mp4":
            status = path.stat()
            path.write_bytes(b"x" * status.st_size)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    resumed = _filter(place, "--resume", "--probe-timeout", "1")
    assert (resumed.returncode, resumed.stderr) == (0, "")
    assert [record["cap"] for record in _store(place)] == [f"clip {n}" for n in range(12)]
    assert json.loads((place / "lmdb/report.json").read_text())["dropped"]["unreadable"] == 1


def test_a_killed_writer_leaves_no_store_and_resume_gives_what_an_uninterrupted_run_gives(place):
    _write(place, _complete(40_000))
    (place / "filter.yaml").write_text(FILTER + "compression: zstd\n")
    killed = False
    for _ in range(4):
        process = subprocess.Popen([*COMMAND, "--jobs", "1", *["--resume"] * killed], cwd=place, start_new_session=True)
        part = place / "lmdb/unfinished/data.mdb"
        before = part.stat().st_size if part.exists() else 0
        while process.poll() is None and (not part.exists() or part.stat().st_size < before + 4_000_000):
            time.sleep(0.002)
        if process.poll() is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        killed = True
        assert not list((place / "lmdb").glob("*.lmdb"))
    assert killed
    if not list((place / "lmdb").glob("*.lmdb")):
        assert _filter(place, "--resume").returncode == 0
    assert not (place / "lmdb/unfinished").exists()
    resumed, report = _store(place), (place / "lmdb/report.json").read_text()
    shutil.rmtree(place / "lmdb")
    assert _filter(place).returncode == 0
    assert resumed == _store(place)
    assert report == (place / "lmdb/report.json").read_text()
    assert json.loads(report)["total"] == 40_000


def test_a_part_is_continued_only_for_the_same_input_and_settings(place):
    resource = pytest.importorskip("resource")  # of Unix
    _write(place, _complete(40_000))
    limit = (8_000_000, 8_000_000)
    _filter(place, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    assert (place / "lmdb/unfinished").exists()
    (place / "filter.yaml").write_text(FILTER.replace("min_hxw: 1000", "min_hxw: 1001"))
    changed = _filter(place, "--resume")
    assert changed.returncode == 2
    assert "was begun with another min_hxw: use the same, or remove it" in changed.stderr
    (place / "filter.yaml").write_text(FILTER)
    _write(place, _complete(40_001))
    changed = _filter(place, "--resume")
    assert changed.returncode == 2
    assert "was begun with another meta JSON" in changed.stderr


def test_a_full_disk_says_one_line_and_the_run_goes_on_when_there_is_room(place):
    _write(place, _complete(40_000))
    (place / "lmdb").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "none", place / "lmdb"], check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        full = _filter(place)
        assert full.returncode == 1
        assert full.stderr.startswith("flashi2v-data: lmdb/unfinished: cannot be written: the disk is full")
        assert full.stderr.endswith("; free some space and continue with --resume\n")
        assert full.stderr.count("\n") == 1
        assert [path.name for path in (place / "lmdb").iterdir()] == ["unfinished"]
        assert (place / "lmdb/unfinished/data.mdb").stat().st_size > 4_000_000
        subprocess.run(["mount", "-o", "remount,size=100m", place / "lmdb"], check=True)
        assert _filter(place, "--resume").returncode == 0
        records = _store(place)
        assert [record["path"] for record in records[:2]] == [f"{place}/1.mp4", f"{place}/2.mp4"]
        assert len(records) == json.loads((place / "lmdb/report.json").read_text())["kept"]
    finally:
        subprocess.run(["umount", place / "lmdb"], check=True)


def test_a_file_size_limit_is_a_full_disk(place):
    resource = pytest.importorskip("resource")  # of Unix
    _write(place, _complete(40_000))
    limit = (8_000_000, 8_000_000)
    full = _filter(place, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    assert full.returncode == 1
    assert full.stderr.count("\n") == 1
    assert "free some space and continue with --resume" in full.stderr
    assert _filter(place, "--resume").returncode == 0
    assert len(_store(place)) == json.loads((place / "lmdb/report.json").read_text())["kept"] > 0


def test_a_probe_cache_that_cannot_grow_says_one_line_and_goes_on_when_it_can(place):
    resource = pytest.importorskip("resource")  # of Unix
    entries = [{"path": f"videos/{number:06d}.mp4", "cap": "moves"} for number in range(12)]
    links = [{"path": f"videos/{number}.mp4", "cap": "moves"} for number in range(300)]
    for entry in links:
        os.link(place / "videos/000000.mp4", place / entry["path"])
    _write(place, entries + links)
    limit = (20_000, 20_000)
    full = _filter(place, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    assert full.returncode == 1
    assert full.stderr.count("\n") == 1
    assert "lmdb/probe_cache: cannot be written: " in full.stderr
    assert "free some space and continue with --resume" in full.stderr
    assert _filter(place, "--resume").returncode == 0
    assert len(_store(place)) == 312


def test_bad_videos_cost_themselves_alone(place, write_hanging_video):
    videos = place / "videos"
    whole = (videos / "000000.mp4").read_bytes()
    (videos / "truncated.mp4").write_bytes(whole[:-300])
    (videos / "empty.mp4").touch()
    (videos / "text.mp4").write_text("no video")
    (videos / "directory.mp4").mkdir()
    os.mkfifo(videos / "fifo.mp4")
    write_hanging_video(videos / "hangs.mp4")
    with open(os.fsencode(videos) + b"/caf\xe9.mp4", "wb") as file:
        file.write(whole)
    names = ["truncated", "empty", "text", "directory", "fifo", "hangs", "missing", "caf\udce9"]
    entries = [{"path": f"videos/{name}.mp4", "cap": "long " * 20_000} for name in names]
    _write(place, [*entries, {"path": "videos/000001.mp4", "cap": ["a", "b"], "cut": [2, 9]}])
    result = _filter(place, "--probe-timeout", "5")
    assert (result.returncode, result.stderr) == (0, "")
    first, second = _store(place)
    assert os.fsencode(first["path"]).endswith(b"/caf\xe9.mp4")
    assert os.path.isfile(first["path"])
    assert first["cap"] == "long " * 20_000
    assert (second["start_frame_idx"], second["num_frames"]) == (2, 7)
    assert json.loads((place / "lmdb/report.json").read_text())["dropped"]["unreadable"] == 7

    explained = _filter(place, "--explain", "videos/text.mp4")
    assert explained.returncode == 0
    assert "FAILS   unreadable       Invalid data found" in explained.stdout


def test_broken_meta_json_leaves_nothing(place):
    (place / "meta.json").write_text(json.dumps(_complete(20_000))[:-5])
    result = _filter(place)
    assert result.returncode == 2
    assert result.stderr.startswith("flashi2v-data: meta.json: not valid JSON after entry 19999")
    assert list((place / "lmdb").iterdir()) == []


def test_a_dry_run_prints_the_report_and_writes_nothing(place):
    _write(place, [*_complete(9), {"path": "videos/000000.mp4", "cap": "a"}])
    before = sorted(place.rglob("*"))
    dry = _filter(place, "--dry-run")
    assert (dry.returncode, dry.stderr) == (0, "")
    assert sorted(place.rglob("*")) == before
    wet = _filter(place, "--plots")
    assert wet.stdout == dry.stdout + "written to lmdb/filtered_samples_9.lmdb\n"
    assert "1 clip misses sample_num_frames by 80 %; 1 would keep it" in dry.stdout
    assert (place / "lmdb/report.png").exists()


def test_the_fate_of_a_video_is_told_rule_by_rule(place):
    entries = _complete(2)
    entries[0]["resolution"] = {"height": 20, "width": 48}
    entries[1].update(path="0.mp4", fps=None)
    _write(place, entries)
    for path in ("0.mp4", f"{place}/0.mp4"):
        told = _filter(place, "--explain", path)
        assert (told.returncode, told.stderr) == (0, "")
        lines = told.stdout.splitlines()
        assert lines.count(f"{place}/0.mp4, in meta.json") == 2
        assert "passes  no_cap" in lines
        assert "passes  aspect_mismatch  min_h_div_w_ratio 0.4, the clip has 0.4166666667" in lines
        assert "FAILS   res_too_small    min_hxw 1000, the clip has 600" in lines
        assert "FAILS   too_short        sample_num_frames 5, the clip has 4" in lines
        assert "FAILS   no_fps           fps is not a positive number" in lines
    assert not (place / "lmdb").exists()
