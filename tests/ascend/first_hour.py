"""The first hour on an Ascend machine: everything once, in order, and one JSON to attach to a report.

first_hour.py REPORT. Nothing stops at a failure: what comes later may work, and the report says so.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

PYTEST = (sys.executable, "-m", "pytest", "-q", "-rA", "--tb=short", "--show-capture=no")
OPERATORS = "packages/flashi2v-npu-ops/tests"
DOCTOR = ("flashi2v-npu-ops", "doctor", "--device", "npu", "--json", "--probe")
# Where the CPU stands for NPUs, real sizes take hours.
SIZE = ("--probe-size", "tiny") if "STUB_CANN_DEVICES" in os.environ else ()
STEPS = {
    "doctor": (*DOCTOR, *SIZE),
    "operators": (*PYTEST, OPERATORS, f"--ignore={OPERATORS}/conformance"),
    "network, VAE, text encoder": (*PYTEST, "tests/ascend/test_npu_network.py"),
    "sampled videos, features": (*PYTEST, "tests/ascend/test_npu_sampling.py"),
    "twenty training steps, a resume, two processes": (*PYTEST, "tests/ascend/test_npu_training.py"),
}
LAST_LINES = 60


def main(report: Path, steps: Mapping[str, Sequence[str]] = STEPS) -> int:
    """Run all steps; return 1 where one failed."""
    results = {}
    for name, command in steps.items():
        print(f"== {name}: {' '.join(command)}", flush=True)
        start = time.monotonic()
        finished = subprocess.run(
            command,
            env=os.environ | {"FLASHI2V_TEST_DEVICE": "npu"},
            stdout=subprocess.PIPE,
            stderr=None if name == "doctor" else subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        results[name] = {
            "passed": finished.returncode == 0,
            "exit_code": finished.returncode,
            "seconds": round(time.monotonic() - start, 1),
            "output": read_json(finished.stdout) or finished.stdout.splitlines()[-LAST_LINES:],
        }
        report.write_text(json.dumps(results, indent=1))
        print(f"   {'passed' if finished.returncode == 0 else 'FAILED'}", flush=True)
    print(f"the report is {report}: attach it, whether or not all passed")
    return 0 if all(result["passed"] for result in results.values()) else 1


def read_json(text: str) -> object:
    """Return what a step printed as JSON; None where it printed anything else."""
    try:
        return json.loads(text)
    except ValueError:
        return None


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
