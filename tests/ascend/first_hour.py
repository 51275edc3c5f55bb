"""The first hour on an Ascend machine: everything once, in order, and one JSON to attach to a report.

first_hour.py REPORT. Nothing stops at a failure: what comes later may work, and the report says so.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

PYTEST = (sys.executable, "-m", "pytest", "-q")
OPERATORS = "packages/flashi2v-npu-ops/tests"
NETWORK, COMMANDS = "tests/ascend/test_npu_network.py", "tests/ascend/test_npu_commands.py"
STEPS = {
    "doctor": ("flashi2v-npu-ops", "doctor", "--device", "npu", "--probe", "--json"),
    "operators": (*PYTEST, OPERATORS, f"--ignore={OPERATORS}/conformance"),
    "network and VAE": (*PYTEST, NETWORK),
    "a sampled video": (*PYTEST, COMMANDS, "-k", "sampled"),
    "twenty training steps and a resume": (*PYTEST, COMMANDS, "-k", "training_is"),
    "two processes": (*PYTEST, COMMANDS, "-k", "two_processes or sharded"),
    "features": (*PYTEST, COMMANDS, "-k", "features"),
}
LAST_LINES = 40


def main(report: Path) -> int:
    results = {}
    for name, command in STEPS.items():
        print(f"== {name}: {' '.join(command)}", flush=True)
        start = time.monotonic()
        finished = subprocess.run(
            command,
            env=os.environ | {"FLASHI2V_TEST_DEVICE": "npu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        results[name] = {
            "passed": finished.returncode == 0,
            "exit_code": finished.returncode,
            "seconds": round(time.monotonic() - start, 1),
            "output": finished.stdout if name == "doctor" else finished.stdout.splitlines()[-LAST_LINES:],
        }
        report.write_text(json.dumps(results, indent=1))
        print(f"   {'passed' if finished.returncode == 0 else 'FAILED'}", flush=True)
    print(f"the report is {report}: attach it, whether or not all passed")
    return 0 if all(result["passed"] for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
