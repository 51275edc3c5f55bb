"""Layouts of processes on this CPU: a guided step as predicted and as measured, and how often the order is right.

All layouts of so many processes run in turns, round after round, in the same processes. Two things are measured: the
shortest of all rounds, which other programs on the machine slow down; and the time that the processes computed, all of
them together over the cores, the median of all rounds, which they hardly do. At rest, and with more processes than
cores, both are the same but for waiting.

    python bench/bench_layouts.py --processes 2 3 4 6 8 --rounds 10
"""

import argparse
import functools
import itertools
import multiprocessing
import os
import socket
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from flashi2v_infer.execution import DTypes, Execution
from flashi2v_infer.plan.layouts import Layout, Ranked, layouts_of, rank_layouts
from flashi2v_infer.plan.plan import make_plan
from flashi2v_infer.plan.skeleton import build_parts
from flashi2v_infer.processes import join_processes
from flashi2v_infer.settings import SamplingSettings
from flashi2v_model import FlashI2VTransformer3DModel
from flashi2v_model.caching import conditions_kept
from flashi2v_model.machines import measure_cpu
from flashi2v_model.parallel import parallelise_context, parallelise_samples
from flashi2v_model.sampling import VelocityField

HEADS = 6
NETWORK = {
    "num_attention_heads": HEADS,
    "attention_head_dim": 48,
    "ffn_dim": 1152,
    "num_layers": 4,
    "text_dim": 64,
    "text_len": 32,
    "freq_dim": 64,
}
SETTINGS = SamplingSettings(num_frames=17, height=192, width=192, num_inference_steps=3)


class Measured(NamedTuple):
    """A layout's seconds per step."""

    predicted: Ranked
    seconds: float
    computed: float


@torch.no_grad()
def work(rank: int, port: int, layouts: list[Layout], rounds: int, directory: str) -> None:
    """Be one process: run all layouts in turns, and save the seconds of each round."""
    torch.set_num_threads(1)
    size = layouts[0].size
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    generator = torch.Generator().manual_seed(0)
    latent = (1, 16, *SETTINGS.latent_grid)
    noise = torch.randn(latent, generator=generator)
    condition = torch.randn(1, 16, 1, *latent[3:], generator=generator)
    texts = torch.randn(2, 1, NETWORK["text_len"], NETWORK["text_dim"], generator=generator)
    with join_processes("cpu", Execution()) as processes, ExitStack() as kept:
        fields = []
        for layout in layouts:
            torch.manual_seed(0)
            network = FlashI2VTransformer3DModel(**NETWORK).requires_grad_(False).eval()
            together = replace(processes, branches=layout.branches, context=layout.context.size)
            sharing = together.sharing(layout.context)
            assert sharing is not None
            if layout.context.size > 1:
                parallelise_context(network, sharing.context)
            if layout.branches > 1:
                parallelise_samples(network, sharing.branches)
            kept.enter_context(conditions_kept(network))  # as all steps but the first have it
            fields.append(VelocityField(network, condition, texts[0], texts[1], 5.0))
        seconds = torch.zeros(2, rounds, len(layouts))
        for number, (place, field) in itertools.product(range(rounds), enumerate(fields)):
            dist.barrier()
            before, computed = time.perf_counter(), time.process_time()
            field(noise, torch.tensor(500.0))
            seconds[1, number, place] = time.process_time() - computed
            dist.barrier()
            seconds[0, number, place] = time.perf_counter() - before
    torch.save(seconds, Path(directory) / f"{rank}.pt")


def measure(layouts: list[Layout], rounds: int, cores: int) -> list[tuple[float, float]]:
    """Return the shortest seconds of each layout's step, and those that the cores computed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as directory:
        start = functools.partial(context.Process, target=work)
        running = [start(args=(rank, port, layouts, rounds, directory)) for rank in range(layouts[0].size)]
        for process in running:
            process.start()
        for process in running:
            process.join()
        found = torch.stack([torch.load(path) for path in sorted(Path(directory).glob("*.pt"))])
    whole, computed = found[:, :, 1:].unbind(1)  # (processes, rounds, layouts); the first round warms up
    busiest = torch.maximum(computed.amax(0), computed.sum(0) / cores)
    return [*zip(whole.amax(0).amin(0).tolist(), busiest.median(0).values.tolist())]


def main() -> None:
    """Print a table of all layouts, and the share of pairs whose order was predicted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 3, 4, 6, 8])
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine = measure_cpu()
    parts = build_parts(NETWORK, None, None, DTypes("fp32", "fp32", "fp32"))
    plan = make_plan(parts, SETTINGS, Execution(device="cpu"), "cpu", None)
    print(f"{plan.num_tokens} tokens, {machine.flops / 1e9:.1f} GFLOP/s a thread, {machine.cores} cores\n")
    print("| processes | layout | predicted | shortest | computed | sent | messages |\n|---|---|---|---|---|---|---|")
    pairs: list[tuple[Measured, Measured]] = []
    for number in options.processes:
        ranked = rank_layouts(parts.transformer, SETTINGS, machine, number, plan)
        assert len(ranked) == len(layouts_of(number, HEADS, is_guided=True))
        assert machine.cores is not None
        measured = measure([one.layout for one in ranked], options.rounds, machine.cores)
        found = [Measured(one, *seconds) for one, seconds in zip(ranked, measured)]
        for one in found:
            layout, traffic = one.predicted.layout, one.predicted.traffic
            print(
                f"| {number} | {layout} | {1000 * one.predicted.seconds:.0f} ms | {1000 * one.seconds:.0f} ms "
                f"| {1000 * one.computed:.0f} ms | {traffic.num_bytes / 2**20:.2f} MiB | {traffic.messages} |",
                flush=True,
            )
        pairs += itertools.combinations(found, 2)
    for least in (1.0, 1.05, 1.1):
        apart = [(a, b) for a, b in pairs if b.predicted.seconds >= least * a.predicted.seconds]
        shortest, computed = (sum(a[one] <= b[one] for a, b in apart) for one in (1, 2))
        print(
            f"\npredicted {least - 1:.0%} apart or more: of {len(apart)} pairs the order is right in {shortest} by the "
            f"shortest, in {computed} by what was computed"
        )


if __name__ == "__main__":
    main()
