"""The pipeline's bubble: how long processes wait for each other, of the time that a step takes.

The stages' times are measured, one after the other on this machine; in which order each process runs what is read off
the schedule's own table of actions; when everything ends follows from both. Sending costs nothing here.
"""

import argparse
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, _Action
from torch.testing._internal.distributed.fake_pg import FakeStore

from flashi2v_model import FlashI2VTransformer3DModel
from flashi2v_train.engines import make_schedule
from flashi2v_train.parallel_dims import even_split
from flashi2v_train.parallelise import Stage, keep_layers
from flashi2v_train.splits import best_split, bubble

PROCESSES, MICRO_BATCHES, LAYERS = 4, 16, 12
LATENT, TEXT = (16, 5, 16, 16), 64
MODEL = {"num_attention_heads": 4, "attention_head_dim": 64, "ffn_dim": 1024, "text_dim": 256, "text_len": TEXT}

# Seconds of the forward pass, of the backward pass for inputs, and of that for weights.
Times = tuple[float, float, float]


def measure(stage: Stage, repeats: int = 5) -> Times:
    """Return the least seconds of each pass over one micro batch."""
    forward, inwards, weights = [], [], []
    dim = stage.transformer.config.num_attention_heads * stage.transformer.config.attention_head_dim
    num_tokens = stage.grid[0] * stage.grid[1] * stage.grid[2]
    if stage.embeds:
        arguments = (
            torch.randn(1, *LATENT),
            1000 * torch.rand(1),
            torch.randn(1, TEXT, MODEL["text_dim"]),
            torch.randn(1, LATENT[0], 1, *LATENT[2:]),
            torch.rand(1),
        )
    else:
        shapes = (1, num_tokens, dim), (1, TEXT, dim), (1, dim), (1, 6, dim)
        arguments = tuple(torch.randn(shape, requires_grad=True) for shape in shapes)
    parameters = [*stage.parameters()]
    wanted = [tensor for tensor in arguments if tensor.requires_grad]
    for _ in range(repeats):
        started = time.perf_counter()
        output = stage(*arguments)
        total = output.square().mean() if isinstance(output, torch.Tensor) else sum(o.mean() for o in output)
        forward.append(time.perf_counter() - started)
        started = time.perf_counter()
        torch.autograd.grad(total, [*wanted, *parameters], retain_graph=True, allow_unused=True)
        whole = time.perf_counter() - started
        started = time.perf_counter()
        if wanted:
            torch.autograd.grad(total, wanted, allow_unused=True)
        inwards.append(time.perf_counter() - started)
        weights.append(max(0.0, whole - inwards[-1]))
    return min(forward), min(inwards), min(weights)


def actions(schedule: str, num_stages: int) -> dict[int, list[_Action]]:
    """Return what each process does, in order, by the schedule's own table."""
    group = dist.group.WORLD
    per_process = num_stages // PROCESSES
    stages = [
        PipelineStage(torch.nn.Identity(), v * PROCESSES, num_stages, torch.device("cpu"), group=group)
        for v in range(per_process)
    ]
    made = make_schedule(schedule, stages, MICRO_BATCHES, torch.nn.functional.mse_loss)
    order = made.pipeline_order if isinstance(made, PipelineScheduleMulti) else made._get_pipeline_order()
    rows = {}
    for rank, row in order.items():
        done: Counter[tuple[str, int]] = Counter()
        rows[rank] = []
        for action in row:
            if action is not None and action.microbatch_index is not None:
                # By their order: torch's table of 1F1B counts the last stage's forward passes from 1.
                kind = (action.computation_type.name, action.stage_index)
                rows[rank].append(action._replace(microbatch_index=done[kind]))
                done[kind] += 1
    return rows


def simulate(order: Mapping[int, Sequence[_Action]], times: Sequence[Times]) -> tuple[float, float]:
    """Return the share of a step that a process waits, on average, and the step's seconds."""
    ended: dict[tuple[str, int, int], float] = {}
    clock, busy, position = defaultdict(float), defaultdict(float), defaultdict(int)
    last = len(times) - 1
    while any(position[rank] < len(row) for rank, row in order.items()):
        moved = False
        for rank, row in order.items():
            while position[rank] < len(row):
                kind, stage, batch = _plain(row[position[rank]])
                before = {
                    "F": [("F", stage - 1, batch)] if stage else [],
                    "I": [("F", stage, batch), *([("I", stage + 1, batch)] if stage < last else [])],
                    "W": [("I", stage, batch)],
                }
                parts = ("I", "W") if kind == "B" else (kind,)  # a full backward pass does both
                if any(need not in ended for need in before[parts[0]]):
                    break
                moved = True
                start = max([clock[rank], *(ended[need] for need in before[parts[0]])])
                for part in parts:
                    seconds = times[stage]["FIW".index(part)]
                    start += seconds
                    busy[rank] += seconds
                # What the stage before waits for is there when the whole backward pass is.
                for part in parts:
                    ended[part, stage, batch] = start
                clock[rank] = start
                position[rank] += 1
        assert moved, "the table waits for itself"
    makespan = max(clock.values())
    return 1 - sum(busy.values()) / len(order) / makespan, makespan


def _plain(action: _Action) -> tuple[str, int, int]:
    assert action.microbatch_index is not None
    kinds = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}
    return kinds[action.computation_type.name], action.stage_index, action.microbatch_index


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=PROCESSES)
    whole = FlashI2VTransformer3DModel(num_layers=LAYERS, **MODEL)

    def timed(split: Sequence[int]) -> list[Times]:
        last = len(split) - 1
        begins = [sum(split[:stage]) for stage in range(len(split))]
        parts = [
            keep_layers(whole, range(begin, begin + num), embeds=stage == 0, projects=stage == last)
            for stage, (begin, num) in enumerate(zip(begins, split))
        ]
        return [measure(Stage(part, LATENT)) for part in parts]

    # From whole stages of few layers follows what a layer costs, and what comes beside layers at both ends.
    ends, middle = timed([1, 1, 1, 1]), timed([1, 5, 5, 1])
    layer = (sum(middle[1]) - sum(ends[1])) / 4
    first, last = (max(0.0, sum(ends[i]) - sum(ends[1])) for i in (0, 3))
    print(f"{PROCESSES} processes, {MICRO_BATCHES} micro batches, {LAYERS} layers of {layer * 1e3:.1f} ms")
    print(f"beside its layers the first stage takes {first / layer:.2f} layers, the last one {last / layer:.2f}")
    print(f"{'schedule':<12} {'layers per stage':<26} {'bubble':>7} {'theory':>7} {'step':>6}")
    base = 0.0
    for schedule, virtual in (("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zero-bubble", 1)):
        order = actions(schedule, PROCESSES * virtual)
        best = best_split(LAYERS, PROCESSES, virtual, layer=layer, first=first, last=last)
        for split in dict.fromkeys((even_split(LAYERS, PROCESSES * virtual), best)):
            share, seconds = simulate(order, timed(split))
            base = base or seconds
            theory = bubble(PROCESSES, MICRO_BATCHES, virtual) if schedule != "zero-bubble" else 0.0
            print(f"{schedule:<12} {list(split)!s:<26} {share:7.1%} {theory:7.1%} {seconds / base:5.2f}x")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
