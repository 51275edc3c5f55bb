"""The device report: what fails costs a row, the time that is over is said, and every part measures what it says."""

import json
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import device_report
import parts
import pytest
import torch
from models import SIZES, inputs_of, our_network, wan_network

CPU = torch.device("cpu")
WHAT = ("small", "cpu")


@pytest.fixture
def worker(tmp_path):
    """Return what makes a worker of a body, which has `part`, `skipped` and `write`."""

    def make(body: str) -> tuple[str, str]:
        head = """
            import json, os, sys, time
            part, size, device, rows, *skipped = sys.argv[1:]
            def write(**line):
                with open(rows, "a") as file:
                    print(json.dumps(line), file=file)
            """
        path = tmp_path / "worker.py"
        path.write_text(textwrap.dedent(head) + textwrap.dedent(body))
        return sys.executable, str(path)

    return make


def outcome(worker, names=("one",), seconds=60.0, limit=60.0):
    """Run parts; return, for each, the names of its rows, what became of them, and the words."""
    found = {}
    for _ in device_report.run_parts(found, names, WHAT, seconds, dict.fromkeys(names, limit), worker):
        json.dumps(found)
    return {name: [(row["name"], row["status"], row.get("words", "")) for row in found[name]["rows"]] for name in names}


def test_a_row_that_ends_the_process_is_kept_as_failed_and_those_behind_it_are_measured(worker):
    made = worker(
        """
        write(rows=["a", "b", "c"])
        for name in (name for name in "abc" if name not in skipped):
            write(begins=name)
            if name == "b":
                print("RuntimeError: device lost", file=sys.stderr, flush=True)
                os.abort()
            write(name=name, status="done")
        """
    )
    assert outcome(made, ("one", "two"))["two"] == [
        ("a", "done", ""),
        ("b", "failed", "SIGABRT RuntimeError: device lost"),
        ("c", "done", ""),
    ]


def test_a_line_that_was_cut_off_is_that_of_a_row_that_failed(worker):
    made = worker(
        """
        if skipped:
            raise SystemExit
        write(rows=["a"])
        write(begins="a")
        with open(rows, "a") as file:
            file.write('{"name": "a", "sta')
        """
    )
    assert outcome(made)["one"] == [("a", "failed", "exit code 0")]


def test_without_git_the_report_names_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert device_report.commit() is None


def test_a_part_that_does_not_start_is_kept_as_failed_once_and_does_not_end_the_rest(worker):
    made = worker(
        """
        if part == "one":
            raise SystemExit("no device")
        write(rows=["a"])
        write(begins="a")
        write(name="a", status="done")
        """
    )
    assert outcome(made, ("one", "two")) == {"one": [("all", "failed", "no device")], "two": [("a", "done", "")]}


def test_a_row_that_hangs_is_cut_off_and_what_was_left_out_is_said(worker, tmp_path, monkeypatch):
    """The time is over as soon as the worker hangs, however slow this machine is."""
    now, processes = [0.0], []

    class Hanging(subprocess.Popen):
        def wait(self, timeout=None):
            if timeout is None:
                return super().wait()
            processes.append(self)
            while not (tmp_path / "hangs").exists():
                time.sleep(0.01)
            now[0] += timeout
            raise subprocess.TimeoutExpired(self.args, timeout)

    monkeypatch.setattr(device_report.subprocess, "Popen", Hanging)
    monkeypatch.setattr(device_report, "monotonic", lambda: now[0])
    made = worker(
        f"""
        write(rows=["a", "b", "c"])
        write(begins="a")
        write(name="a", status="done")
        write(begins="b")
        open({str(tmp_path / "hangs")!r}, "w").close()
        time.sleep(100000)
        """
    )
    found = outcome(made, ("one", "two"), limit=500.0, seconds=503.0)
    assert found["one"] == [
        ("a", "done", ""),
        ("b", "failed", "not done when its 500 s were over"),
        ("c", "left out", "the time was over"),
    ]
    assert found["two"] == [("all", "left out", "the time was over")]  # 3 seconds are not worth a start
    assert [process.returncode for process in processes] == [-signal.SIGKILL]


def test_a_report_says_in_its_table_what_failed_was_wrong_and_left_out(tmp_path):
    rows = {
        "machine": [
            {"name": "about", "status": "done", "device": "1 x NVIDIA H100", "named_rate": 1e12, "libraries": {}},
            {"name": "product bf16", "status": "done", "seconds": 1.0, "dtype": "bf16", "rate": 8e11},
        ],
        "network": [
            {
                "name": "forward",
                "status": "done",
                "of": {"FlashI2V": {"seconds": 2.0, "operations": 8e11, "dtype": "bf16"}},
            },
            {"name": "memory", "status": "done", "peak": 3 * 2**30, "planned": 2**30},
            {"name": "same", "status": "done", "error": float("nan"), "allowed": 0.1},
            {"name": "compiled", "status": "failed", "words": "no | compiler"},
        ],
    }
    report = {
        **dict.fromkeys(("command", "commit", "python", "platform", "started", "size"), "x"),
        "parts": {name: {"seconds": 1.0, "rows": each} for name, each in rows.items()},
    }
    device_report.save(report, tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["parts"].keys() == rows.keys()
    lines = (tmp_path / "report.md").read_text().splitlines()
    assert "| FlashI2V | 2 | 50% | 40% |  |  |  |" in lines
    assert "| memory |  |  |  | 3.00 GiB | 1.00 GiB |  |" in lines
    assert any(line.startswith("| same ") and "**wrong**" in line for line in lines)
    assert any("**failed**: no / compiler" in line for line in lines)
    assert {line.count("|") for line in lines if line.startswith("|")} == {8}


EXPECTED = {
    "machine": {"product bf16": "rate", "product fp32": "rate", "copy": "bytes_per_second", "about": "doctor"},
    "operators": {"attention fp32 torch": "error", "attention fp32 bf16": "error", "conv3d bf16 torch": "error"},
    "golden": {"four guided steps": "error", "Fourier filter": "error"},
    "network": {"same weights, same output": "error", "memory": "planned", "compiled blocks": "compiling_seconds"},
    "training": {"every layer computed again": "peak", "nothing computed again": "seconds"},
    "vae": {"decode fp32": "planned", "encode bf16": "seconds"},
    "quantised": {"none": "weights"},
    "caches": {"none": "seconds", "FirstBlockCache, 0.1": "change", "TaylorSeer, every third step": "change"},
}


@pytest.mark.parametrize("part", EXPECTED)
def test_a_part_measures_every_row_on_a_cpu(part):
    written = []
    parts.run(part, SIZES["small"], CPU, written.append, skipped=())
    rows = {line["name"]: line for line in written if "status" in line}
    assert [*rows] == written[0]["rows"]
    failed = {name for name, row in rows.items() if row["status"] == "failed" or device_report.is_wrong(row)}
    assert failed <= {"product int8", "product fp8"}, rows  # which not every CPU multiplies
    refused = {name: row["words"] for name, row in rows.items() if row["status"] == "refused"}
    # By what has no effect, where torchao is not installed, or by the CPU.
    reasons = ("rounds fp32 to bf16", "quantize needs torchao", "needs a GPU of compute capability 8.9")
    assert all(any(reason in words for reason in reasons) for words in refused.values()), refused
    for name, value in EXPECTED[part].items():
        assert value in rows[name]
    if part == "network":
        assert rows["compiled blocks, for all sizes"]["graphs_of_other_sizes"] == 0
    json.dumps(written, default=str)


def test_ours_and_wan_compute_the_same_of_the_same_weights():
    """In fp32, where nothing is rounded in another place."""
    size = replace(SIZES["small"], dtype=torch.float32)
    model = our_network(size, CPU)
    wan = wan_network(model, size)
    assert wan.blocks[0].ffn.net[2].weight.data_ptr() == model.blocks[0].ffn.net[2].weight.data_ptr()
    rows = parts.network(size, CPU)
    found = rows["same weights, same output"]()
    assert found["error"] < 1e-5
    assert inputs_of(size, model, CPU)[0].shape == size.latents


def test_the_command_leaves_a_report_and_says_by_its_code_that_something_failed(tmp_path, monkeypatch, capsys, worker):
    made = worker('write(rows=["a"]); write(begins="a"); write(name="a", status="failed", words="x")')
    monkeypatch.setattr(device_report, "WORKER", made)
    output = tmp_path / "report.json"
    assert device_report.main(["--size", "small", "--parts", "golden", "--output", str(output)]) == 1
    assert json.loads(output.read_text())["parts"]["golden"]["rows"][0]["words"] == "x"
    assert "**failed**: x" in capsys.readouterr().out
