"""What a device does with FlashI2V, in one command and under nine minutes: one JSON, one table.

    python bench/device_report.py --device cuda

Operators and golden numbers against the CPU; the 1.3B network with random weights at 49x480x832 in bf16, beside
diffusers' Wan on the same weights; training steps; the VAE; 8 bits; caches. Nothing is downloaded. Every part runs in a
process of its own and writes each row as it comes, so that a crash, a lack of memory or the end of the time costs a
row, and one attempt is enough. Exits 1 where something failed or was wrong; the report is whole all the same.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

WORKER = (sys.executable, str(Path(__file__).with_name("parts.py")))
# In the order of what is most worth knowing, with the most seconds that each may take of those below.
PARTS = {
    "machine": 75,
    "network": 180,
    "operators": 120,
    "golden": 30,
    "training": 75,
    "vae": 60,
    "quantised": 120,
    "caches": 60,
}
SECONDS = 530
_LEAST = 5.0  # seconds that are worth starting a part for
_SIZES = {
    "full": "the 1.3B at 49x480x832 in bf16",
    "cpu": "the 1.3B at 17x128x128 in fp32",
    "eight": "8 layers of width 256 at 33x128x128 in fp32",
    "small": "all of it tiny, in three minutes on a CPU",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all parts; return 1 where a row failed or is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="cuda, npu, cpu, cuda:1, ... (default: the best there is)")
    sizes = "; ".join(f"{name}: {what}" for name, what in _SIZES.items())
    parser.add_argument("--size", choices=_SIZES, default="full", help=sizes)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS], metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of the whole (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("device-report.json"), help="the JSON; the table lies beside it as .md"
    )
    options = parser.parse_args(arguments)
    report: dict[str, Any] = {
        "command": shlex.join([Path(sys.argv[0]).name, *(sys.argv[1:] if arguments is None else arguments)]),
        "commit": commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "size": f"{options.size}, {_SIZES[options.size]}",
        "parts": {},
    }
    scale = options.seconds / SECONDS
    limits = {name: scale * limit for name, limit in PARTS.items()}
    what = options.size, options.device
    for _ in run_parts(report["parts"], options.parts, what, options.seconds, limits, WORKER):
        save(report, options.output)
        name, part = [*report["parts"].items()][-1]
        print(f"{name}: {len(part['rows'])} rows, {part['seconds']:.0f} s", file=sys.stderr, flush=True)
    print(table(report))
    print(f"\nthe report is {options.output}, the table {options.output.with_suffix('.md')}: attach both")
    return 1 if any(row["status"] == "failed" or is_wrong(row) for row in rows_of(report)) else 0


def commit() -> str | None:
    """Return what git says of this checkout; None where only files were carried."""
    if shutil.which("git") is None:
        return None
    found = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    return found.stdout.strip() or None


def run_parts(
    found: dict[str, Any],
    parts: Sequence[str],
    what: tuple[str, str],
    seconds: float,
    limits: Mapping[str, float],
    worker: Sequence[str],
) -> Iterator[None]:
    """Run parts one after the other; yield after each process, as the report may be the last one.

    Args:
        found: is filled with what became of each part.
        parts: their names.
        what: size and device, as the worker takes them.
        seconds: of all of them.
        limits: seconds of each part.
        worker: the command that measures a part.
    """
    deadline = monotonic() + seconds
    for name in parts:
        started = monotonic()
        end = min(deadline, started + limits[name])
        part = found[name] = {"seconds": 0.0, "rows": []}
        progress = -1
        # What ended a process is one row: the next process goes on behind it.
        while len(part["rows"]) > progress and not part.get("is_whole"):
            progress = len(part["rows"])
            left = end - monotonic()
            if left < _LEAST:
                if not part["rows"]:
                    part["rows"].append({"name": "all", "status": "left out", "words": "the time was over"})
                break
            run_once(part, (*worker, name, *what), left)
            part["seconds"] = round(monotonic() - started, 1)
            yield
        for row in part.pop("waiting", []):
            part["rows"].append({"name": row, "status": "left out", "words": "the time was over"})
        part.pop("is_whole", None)
        yield


def run_once(part: dict[str, Any], command: Sequence[str], seconds: float) -> None:
    """Run a part's process, behind the rows that there are, and add what it wrote."""
    skipped = [row["name"] for row in part["rows"]]
    with tempfile.TemporaryDirectory() as directory:
        lines, errors = Path(directory, "rows"), Path(directory, "errors")
        with errors.open("w") as file:
            # A session of its own, so that what it started (compilers) ends with it.
            process = subprocess.Popen(
                [*command, str(lines), *skipped], stdout=file, stderr=file, start_new_session=True
            )
            try:
                code: int | None = process.wait(seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                end(process)
        # What is behind the last line's end was cut off while it was written.
        whole, _, _ = (lines.read_text() if lines.exists() else "").rpartition("\n")
        written = [json.loads(line) for line in whole.splitlines()]
        words = last_words(errors, code, seconds)
    begun = None
    for line in written:
        if "rows" in line:
            part["waiting"] = line["rows"]
        begun = line.get("begins")
        if "status" in line:
            part["rows"].append(line)
    if begun is not None:
        part["rows"].append({"name": begun, "status": "failed", "words": words})
    elif code != 0 and "waiting" not in part:  # it did not come as far as its first row
        part["rows"].append({"name": "all", "status": "failed", "words": words})
    done = {row["name"] for row in part["rows"]}
    part["waiting"] = [name for name in part.get("waiting", []) if name not in done]
    part["is_whole"] = not part["waiting"]


def end(process: subprocess.Popen[Any]) -> None:
    """End a process and what it started, if it is still there."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def last_words(errors: Path, code: int | None, seconds: float) -> str:
    """Return why a process ended: the time, the signal, or the last line that it wrote."""
    if code is None:
        return f"not done when its {seconds:.0f} s were over"
    lines = [line for line in errors.read_text(errors="replace").splitlines() if line.strip()]
    ended = f"{signal.Signals(-code).name} " if code < 0 else ""
    return f"{ended}{lines[-1] if lines else f'exit code {code}'}"[:400]


def save(report: Mapping[str, Any], path: Path) -> None:
    """Write the JSON and the table; what was there before stays whole until then."""
    for file, text in ((path, json.dumps(report, indent=1) + "\n"), (path.with_suffix(".md"), table(report) + "\n")):
        partial = file.with_name(f"{file.name}.partial")
        partial.write_text(text)
        partial.replace(file)


def rows_of(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield all rows."""
    for part in report["parts"].values():
        yield from part["rows"]


def is_wrong(row: Mapping[str, Any]) -> bool:
    """Say whether a row's error is above what is allowed, or no number at all."""
    return "error" in row and not row["error"] <= row["allowed"]


def table(report: Mapping[str, Any]) -> str:
    """Return the report for people to read, in Markdown."""
    measured = {row["name"]: row for row in report["parts"].get("machine", {}).get("rows", [])}
    about = measured.get("about", {})
    rates = {row["dtype"]: row["rate"] for row in measured.values() if "rate" in row}
    libraries = " ".join(f"{name} {number}," for name, number in about.get("libraries", {}).items())
    lines = [
        f"# {about.get('device', 'a device that did not tell its name')}",
        "",
        f"{libraries} Python {report['python']}, {report['platform']}; commit {report['commit']}; {report['started']}",
        "",
        f"`{report['command']}`: {report['size']}. Shares count the operations of a whole call of the network.",
    ]
    for name, part in report["parts"].items():
        lines += ["", f"## {name}, {part['seconds']:.0f} s", "", "| what | seconds | of matrices | of the named peak |"]
        lines[-1] += " peak memory | planned | else |"
        lines += ["|---|---|---|---|---|---|---|"]
        for row in part["rows"]:
            shown = {row["name"]: row} if "of" not in row else {row["name"]: {**row, "of": None}, **row["of"]}
            lines += [line(label, values, rates, about.get("named_rate")) for label, values in shown.items()]
    return "\n".join(lines)


def line(label: str, row: Mapping[str, Any], rates: Mapping[str, float], named: float | None) -> str:
    """Return a row of the table."""
    shares = ["", ""]
    if "operations" in row:
        rate = row["operations"] / row["seconds"]
        peaks = rates.get(row["dtype"]), named if row["dtype"] == "bf16" else None
        shares = ["" if peak is None else f"{rate / peak:.0%}" for peak in peaks]
    sizes = [f"{row[key] / 2**30:.2f} GiB" if key in row else "" for key in ("peak", "planned")]
    seconds = f"{row['seconds']:.4g}" if "seconds" in row else ""
    status = row.get("status", "done")
    notes = [] if status == "done" else [f"**{status}**: {row['words']}"]
    if is_wrong(row):
        notes.append("**wrong**")
    for key, form in (
        *(("error", "off by {:.1e}"), ("ratio", "{:.2f}x"), ("change", "changed by {:.1e}")),
        *(("rate", "{:.3g} operations a second"), ("bytes_per_second", "{:.3g} bytes a second")),
        *(("weights", "{:.4g} bytes of weights"), ("compiled_seconds", "compiled {:.4g} s")),
        *(
            ("compiler", "by {}"),
            ("compiling_seconds", "compiled in {} s"),
            ("graphs_of_other_sizes", "{} graphs more for three other sizes"),
        ),
    ):
        if key in row:
            notes.append(form.format(row[key]))
    return f"| {label} | {seconds} | {' | '.join((*shares, *sizes))} | {'; '.join(notes).replace('|', '/')} |"


if __name__ == "__main__":
    sys.exit(main())
