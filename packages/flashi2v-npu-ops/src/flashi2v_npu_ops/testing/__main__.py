"""`python -m flashi2v_npu_ops.testing COMMAND ...`: run a command where the CPU stands for NPUs."""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from flashi2v_npu_ops.testing.stubs import stub_cann


def main() -> int:
    """Build the stubs, run the command, return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m flashi2v_npu_ops.testing",
        description="Run a command on a machine without NPUs as if there were some: torch loads torch_npu, tensors on "
        "npu are computed by the CPU, processes reach each other by HCCL. What Ascend refuses is refused.",
        epilog="Example: python -m flashi2v_npu_ops.testing --devices 2 pytest tests",
    )
    parser.add_argument("--devices", type=int, default=1, help="how many NPUs there seem to be (default: 1)")
    parser.add_argument(
        "--older", action="store_true", help="refuse, too, what only older torch_npu refuse: casts of sharded tensors"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the command and its arguments")
    options = parser.parse_args()
    if not options.command:
        parser.error("which command?")
    with tempfile.TemporaryDirectory(prefix="stub_cann_") as directory:
        try:
            environment = stub_cann(Path(directory), devices=options.devices, compute=True, older=options.older)
        except RuntimeError as error:
            print(f"{parser.prog}: {error}", file=sys.stderr)
            return 2
        environment.pop("TORCH_DEVICE_BACKEND_AUTOLOAD")  # as on an Ascend machine
        return subprocess.run(options.command, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
