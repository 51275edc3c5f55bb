"""`flashi2v-npu-ops doctor`: what this machine can run.  argparse, because this package needs nothing but torch."""

import argparse
import dataclasses
import io
import json
import logging
import os
import sys
from functools import partial
from typing import NoReturn

import flashi2v_npu_ops

_EXAMPLES = (
    "Examples: flashi2v-npu-ops doctor;  flashi2v-npu-ops doctor --device npu --probe;  flashi2v-npu-ops doctor --json"
)
_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line, and no more."""
        self.exit(2, f"{self.prog}: {_escaped(' '.join(message.split()))[:400]}\n")


def main() -> int:
    """Run the command line; return its exit code."""
    parser = _Parser(
        prog="flashi2v-npu-ops",
        description="Operators of FlashI2V: what serves them on this machine.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=flashi2v_npu_ops.__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "doctor",
        help="device, versions and whether they match, which backend serves which operator, what to fix",
        description="Print device, versions and whether they match, which backend serves which operator and why not a "
        "faster one, and what to fix. Exits 1 where something asked for cannot work: a device, the backends that "
        "FLASHI2V_OPS_BACKEND names, an installed backend, or torch_npu where it is installed.",
        epilog=_EXAMPLES,
    )
    command.add_argument("--device", choices=("auto", "npu", "cuda", "cpu"), default="auto", help="the device wanted")
    command.add_argument("--json", action="store_true", help="print everything as JSON, for programs")
    command.add_argument(
        "--probe",
        nargs="*",
        metavar="OPERATOR",
        help="run operators (all, unless some are named), at small and at real sizes, against the CPU: minutes",
    )
    command.add_argument("--probe-size", choices=("tiny", "real"), help="run them at this size only")
    command.add_argument("--probe-seconds", type=float, default=300, help="limit of each (default: 300)")
    try:
        options = parser.parse_args()
    except SystemExit as ended:  # help or version may still be in the buffer
        raise SystemExit(_printed("") or ended.code) from None
    if options.probe_seconds <= 0:
        command.error("--probe-seconds must be above 0")
    if options.probe is None and options.probe_size is not None:
        command.error("--probe-size has no effect without --probe")
    return _doctor(options, command)


def _doctor(options: argparse.Namespace, command: _Parser) -> int:
    environment = dict(os.environ)
    # Where torch_npu does not load, torch does not load either, unless it is told to go without. The doctor loads
    # torch_npu afterwards, and says why it fails.
    os.environ[_AUTOLOAD] = "0"
    try:
        from flashi2v_npu_ops import doctor
    finally:
        os.environ.pop(_AUTOLOAD)
        os.environ.update(environment)
    from flashi2v_npu_ops import probe, registry

    logging.getLogger("flashi2v_npu_ops").addHandler(logging.NullHandler())  # what is warned of is in the report
    unknown = [name for name in options.probe or () if name not in registry.operators()]
    if unknown:
        command.error(f"--probe {unknown[0]}: choose among {', '.join(registry.operators())}")
    sizes = probe.SIZES if options.probe_size is None else (options.probe_size,)
    run = partial(probe.probe_all, seconds=options.probe_seconds, names=options.probe, sizes=sizes)
    report = doctor.examine(options.device, environment, None if options.probe is None else run)
    if options.json:
        text = json.dumps(dataclasses.asdict(report) | {"is_at_fault": report.is_at_fault}, indent=2, default=str)
    else:
        text = "\n".join(map(_escaped, doctor.lines(report)))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    return _printed(f"{text}\n") or (1 if report.is_at_fault else 0)


def _printed(text: str) -> int:
    """Print a text and what was printed before; return the exit code, 1 where it cannot be done."""
    try:
        print(text, end="", flush=True)
    except OSError as error:  # a full disk, or a reader that has seen enough: head, say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python would try again when it ends
        if not isinstance(error, BrokenPipeError):
            print(f"flashi2v-npu-ops: cannot print: {error.strerror}", file=sys.stderr)
            return 1
    return 0


def _escaped(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
