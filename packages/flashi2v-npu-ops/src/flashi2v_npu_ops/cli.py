"""`flashi2v-npu-ops doctor`: what this machine can run.  argparse, because this package needs nothing but torch."""

import argparse
import platform

import torch

import flashi2v_npu_ops
from flashi2v_npu_ops import device, registry


def doctor() -> int:
    """Print device, versions, and the backends of every operator; return the exit code."""
    chosen = device.resolve_device()
    print(f"flashi2v-npu-ops {flashi2v_npu_ops.__version__}, torch {torch.__version__}, {platform.platform()}")
    for kind in ("npu", "cuda", "cpu"):
        print(f"device {kind:<5} {device.missing(kind) or 'available'}")
    print(f"auto picks   {chosen} (collectives: {device.collective_backend(chosen)})")
    width = max(map(len, registry.operators()))
    for operator in registry.operators():
        print(f"operator {operator:<{width}}  {', '.join(registry.backends(operator))}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="flashi2v-npu-ops",
        description="Operators of FlashI2V: what serves them on this machine.",
        epilog="Example: flashi2v-npu-ops doctor",
    )
    parser.add_argument("--version", action="version", version=flashi2v_npu_ops.__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "doctor",
        help="print device, versions, and which backends serve which operator",
        epilog="Example: flashi2v-npu-ops doctor",
    )
    parser.parse_args()
    return doctor()
