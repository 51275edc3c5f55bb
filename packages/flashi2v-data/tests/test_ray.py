"""The same work over a Ray cluster: equal bytes, whatever is killed; and one line where there is no cluster to use."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray_nodes

from flashi2v_data.cli import app
from flashi2v_data.curation import meta as meta_module
from flashi2v_data.curation.score import PIECE_ENTRIES
from flashi2v_data.errors import InputError

ray = pytest.importorskip("ray")

HERE = Path(__file__).parent
NUM_CLIPS = 6 * PIECE_ENTRIES + 5
SCORE = [sys.executable, "-m", "flashi2v_data.cli", "score"]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@pytest.fixture(scope="module")
def address():
    """A cluster of one node with two processors."""
    with ray_nodes.cluster(path=str(HERE)) as cluster:
        yield cluster.address


@pytest.fixture(scope="module")
def joined(address):
    """The same, joined by this process, so that commands need not do it again."""
    ray.init(address=address, log_to_driver=False)
    yield address
    ray.shutdown()


@pytest.fixture
def meta(shapes: Path, tmp_path: Path, monkeypatch) -> Path:
    """A meta JSON of many clips, one of which cannot be read; the working directory has signals."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(HERE))
    videos = [entry["path"] for entry in json.loads((shapes / "videos.json").read_text())]
    entries = [
        {"path": str(shapes / videos[number % len(videos)]), "number": number, "note": str(tmp_path / "seen")}
        for number in range(NUM_CLIPS)
    ]
    entries[7]["path"] = "nowhere.mp4"
    path = tmp_path / "meta.json"
    path.write_text(json.dumps(entries))
    return path


def run(*arguments: str) -> None:
    app(["score", *map(str, arguments)], exit_on_error=False, print_error=False, result_action="return_value")


def outputs(name: str) -> tuple[bytes, ...]:
    stem = name.removesuffix(".json")
    return tuple(Path(f"{stem}{suffix}").read_bytes() for suffix in (".json", ".signals.json", ".failed.jsonl"))


SIGNALS = ("--signal", "engine_signals:Mean", "--signal", "engine_signals:Twins")
OVER_RAY = ("--engine", "ray", "--jobs", "2")


def test_a_cluster_writes_the_bytes_of_one_process_also_when_its_driver_was_killed(meta, address, monkeypatch):
    run(meta, "-o", "local.json", *SIGNALS, "--jobs", "1")
    seen = meta.with_name("seen")
    seen.unlink()
    over = (*OVER_RAY, "--address", address)
    process = subprocess.Popen([*SCORE, str(meta), "-o", "ray.json", *SIGNALS, *over], env=ENVIRONMENT)
    while process.poll() is None and not (seen.exists() and len(seen.read_text().split()) > 3 * PIECE_ENTRIES):
        time.sleep(0.02)
    process.kill()
    process.wait()
    with contextlib.suppress(FileNotFoundError):
        seen.unlink()
    run(meta, "-o", "ray.json", *SIGNALS, *over)
    assert outputs("ray.json") == outputs("local.json")
    assert not ray.is_initialized(), "what a command joined it leaves"


def refused(code: str, meta: Path, *options: str) -> str:
    """Return the one line that a command ends with, in a process that runs some code before."""
    program = f"{code}\nimport sys; sys.argv[0] = 'x'\nfrom flashi2v_data.cli import main; main()"
    command = [sys.executable, "-c", program, "score", str(meta), "-o", "scored.json", *SIGNALS, "--engine", "ray"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=ENVIRONMENT)
    lines = [line for line in done.stderr.splitlines() if line.startswith("flashi2v-data")]
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = lines
    return line


def test_another_version_of_ray_is_refused(meta, address):
    line = refused("import ray; ray.__version__ = '2.1.0'", meta, "--address", address)
    assert "install the same Ray and Python on all machines" in line
    assert "2.1.0" in line


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (("--address", "127.0.0.1:9"), "no Ray cluster answers there"),
        (("--address", "nowhere"), "no Ray cluster answers there"),
        (("--address", "ray://127.0.0.1:10001"), "give HOST:PORT, and run this command on a machine of the cluster"),
    ],
)
def test_an_address_without_a_cluster_is_refused_at_once(meta, options, fault):
    with pytest.raises(InputError, match=fault):
        run(meta, "-o", "scored.json", *SIGNALS, "--engine", "ray", *options)


def test_without_ray_one_line_says_how_to_install_it(meta):
    line = refused("import sys; sys.modules['ray'] = None", meta)
    assert line.endswith("--engine ray needs Ray: pip install 'flashi2v-data[ray]'")


def test_filtering_and_importing_do_not_import_ray():
    code = (
        "import sys, flashi2v_data, flashi2v_data.cli, flashi2v_data.curation.filter, flashi2v_data.engines.opening\n"
        "flashi2v_data.filter_records\nassert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_clips_that_do_harm_and_an_actor_that_is_killed_cost_nothing_else(meta, joined):
    entries = json.loads(meta.read_text())[: 4 * PIECE_ENTRIES]
    del entries[7]
    for number, does in ((3, "abort"), (20, "eat"), (36, "hang"), (50, "kill actor")):
        entries[number] |= {"does": does, "note": str(meta.with_name(f"tries {number}"))}
    meta.write_text(json.dumps(entries))
    bounds = ("--timeout", "15", "--memory-gib", "0.5")
    run(meta, "-o", "scored.json", "--signal", "engine_signals:Trap", *bounds, *OVER_RAY)
    failed = [json.loads(line) for line in Path("scored.failed.jsonl").read_text().splitlines()]
    assert [(each["kind"], each["entry"]) for each in failed] == [
        ("crashed", entries[3]),
        ("too_large", entries[20]),
        ("hung", entries[36]),
    ]
    scored = json.loads(Path("scored.json").read_text())
    harmful = {entries[number]["number"] for number in (3, 20, 36)}
    assert [entry["number"] for entry in scored] == [e["number"] for e in entries if e["number"] not in harmful]
    assert all(entry["trapped"] is False for entry in scored)
    tries = [len(meta.with_name(f"tries {number}").read_text().splitlines()) for number in (3, 20, 36, 50)]
    assert tries[:2] == [2, 2]
    assert tries[2] in (1, 2), "another try where it was in flight on the actor that was killed"
    assert tries[3] == 2


def test_what_a_worker_raises_of_its_input_is_one_line_at_the_driver(meta, joined):
    entries = json.loads(meta.read_text())
    entries[2] |= {"does": "another column", "note": str(meta.with_name("tries"))}
    meta.write_text(json.dumps(entries))
    with pytest.raises(InputError, match=r"^signal trap gave .*, not its columns trapped$"):
        run(meta, "-o", "scored.json", "--signal", "engine_signals:Trap", *OVER_RAY)


def test_a_process_that_has_joined_one_cluster_joins_no_other(meta, joined):
    with pytest.raises(InputError, match=f"this process has joined the cluster at {joined} already"):
        run(meta, "-o", "scored.json", *SIGNALS, *OVER_RAY, "--address", "127.0.0.1:9")


def test_the_filter_over_a_cluster_writes_the_bytes_of_one_process(meta, joined, monkeypatch):
    monkeypatch.setattr(meta_module, "PIECE_BYTES", 4000)
    settings = {"ann_txt_path": "videos.txt", "save_path": "lmdb", "sample_height": 32, "sample_width": 48}
    settings |= {"sample_num_frames": 5, "min_hxw": 1, "train_fps": 16}
    Path("filter.yaml").write_text(json.dumps({**settings, "max_h_div_w_ratio": 1.2, "min_h_div_w_ratio": 0.4}))
    Path("videos.txt").write_text(".,meta.json\n")
    meta.write_text(json.dumps([{**entry, "cap": "a"} for entry in json.loads(meta.read_text())]))
    found = []
    for options in (("--jobs", "1"), OVER_RAY):
        app(["filter", "--filter_config", "filter.yaml", *options], exit_on_error=False, result_action="return_value")
        (store,) = Path("lmdb").glob("*.lmdb")
        found.append([(store / "data.mdb").read_bytes(), Path("lmdb/report.json").read_bytes(), store.name])
        shutil.rmtree("lmdb")
    assert found[0] == found[1]
    assert found[0][2] == f"filtered_samples_{NUM_CLIPS - 1}.lmdb"
