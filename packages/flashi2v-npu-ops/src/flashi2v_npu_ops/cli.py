"""`flashi2v-npu-ops doctor`: what this machine can run.  argparse, because this package needs nothing but torch."""

import argparse

import flashi2v_npu_ops
from flashi2v_npu_ops import doctor

_EXAMPLES = "Examples: flashi2v-npu-ops doctor;  flashi2v-npu-ops doctor --device npu"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="flashi2v-npu-ops",
        description="Operators of FlashI2V: what serves them on this machine.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=flashi2v_npu_ops.__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "doctor",
        help="device, versions and whether they match, which backend serves which operator, what to mend",
        description="Print device, versions and whether they match, which backend serves which operator and why not a "
        "faster one, and what to mend. Exits 1 where something asked for cannot work: a device, the backends that "
        "FLASHI2V_OPS_BACKEND names, or torch_npu where it is installed.",
        epilog=_EXAMPLES,
    )
    command.add_argument("--device", choices=("auto", "npu", "cuda", "cpu"), default="auto", help="the device wanted")
    return doctor.report(parser.parse_args().device)
