"""Any number of processes for one video: tokens by Ulysses and ring, samples by branches, against one process."""

import functools
import socket
from pathlib import Path
from typing import Any, NamedTuple

import forked
import pytest
import torch
import torch.distributed as dist
from golden import small_model, tensor
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from flashi2v_model import InputError
from flashi2v_model.parallel import (
    ContextDegrees,
    ContextGroups,
    Traffic,
    attention_traffic,
    choose_degrees,
    parallelise_context,
    parallelise_samples,
)
from flashi2v_model.parallel.degrees import check_heads, share

HEADS, HEAD_SIZE, LAYERS = 6, 24, 2
GRID = (3, 6, 10)  # of the latent: 45 tokens, which few numbers of processes share evenly
NUM_TOKENS = 45


class Layout(NamedTuple):
    """Degrees; of Ulysses, 4 and 5 do not divide the heads."""

    branches: int
    ulysses: int
    ring: int

    def __str__(self) -> str:
        return f"{self.branches}x{self.ulysses}x{self.ring}"

    @property
    def size(self) -> int:
        return self.branches * self.ulysses * self.ring


# For each table so many processes are started once.
TABLES = {
    4: [Layout(1, 4, 1), Layout(1, 2, 2), Layout(1, 1, 3), Layout(2, 2, 1)],
    8: [
        *(Layout(1, 1, ring) for ring in (2, 4, 5, 8)),
        *(Layout(1, ulysses, 1) for ulysses in (2, 3, 5, 6)),
        *(Layout(1, *degrees) for degrees in ((2, 3), (2, 4), (3, 2), (4, 2))),
        *(Layout(2, *degrees) for degrees in ((1, 1), (3, 1), (4, 1), (1, 2), (1, 3), (1, 4), (2, 2))),
    ],
}
CASES = [
    pytest.param(size, layout, id=str(layout), marks=pytest.mark.long if size == 8 else pytest.mark.slow)
    for size, layouts in TABLES.items()
    for layout in layouts
]


def network() -> torch.nn.Module:
    return small_model(num_attention_heads=HEADS, attention_head_dim=HEAD_SIZE, num_layers=LAYERS)


def run(model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The output for two samples, as both branches of guidance are, and all gradients."""
    latents = tensor("in:latents", (2, 16, *GRID), 3**0.5).requires_grad_()
    output = model(
        hidden_states=latents,
        timestep=torch.tensor([737.25, 12.5]),
        encoder_hidden_states=tensor("in:text", (2, 16, 24)).to(dtype),
        condition=tensor("in:condition", (2, 16, 1, *GRID[1:])),
        low_freq_energy_ratio=torch.tensor([0.1, 0.3]),
        return_dict=False,
    )[0]
    (output * tensor("weights", output.shape)).sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"output": output.detach(), "input": latents.grad, **found}


class Sent(TorchDispatchMode):
    """Counts what attention sends to other processes."""

    def __init__(self) -> None:
        super().__init__()
        self.traffic = Traffic()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        if name == "send":
            self.traffic += Traffic(1, sum(sent.numel() * sent.element_size() for sent in args[0]))
        elif name == "all_to_all_single":
            x, _, sizes, group = args
            found = dist.distributed_c10d._resolve_process_group(group)
            sizes = [size for rank, size in enumerate(sizes) if rank != found.rank()]
            self.traffic += Traffic(len(sizes), sum(sizes) * x.element_size())
        return func(*args, **(kwargs or {}))


def groups_of(layout: Layout, rank: int) -> tuple[ContextGroups, dist.ProcessGroup] | None:
    """Make all groups of a layout, in each process of the table; return those that this process is in."""
    ranks = torch.arange(layout.size).view(layout.branches, layout.ring, layout.ulysses)

    def made(rows: torch.Tensor) -> Any:
        mine = [group_of(tuple(row.tolist())) for row in rows]
        return next((group for group, row in zip(mine, rows) if rank in row.tolist()), None)

    whole, branches = made(ranks.flatten(1)), made(ranks.flatten(1).T)
    ulysses, ring = made(ranks.flatten(0, 1)), made(ranks.movedim(1, 2).flatten(0, 1))
    return (ContextGroups(whole, ulysses, ring), branches) if rank < layout.size else None


@functools.cache
def group_of(ranks: tuple[int, ...]) -> Any:
    return dist.new_group([*ranks])


def work(rank: int, port: int, directory: str, size: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=size)
    results = {}
    for layout in TABLES[size]:
        found = groups_of(layout, rank)
        if found is not None:
            context, branches = found
            model = network()
            parallelise_context(model, context)
            if layout.branches > 1:
                parallelise_samples(model, branches)
            with Sent() as sent:
                shared = run(model)
            for key in sorted(shared.keys() - {"output"}):
                dist.all_reduce(shared[key], group=context.all)
                dist.all_reduce(shared[key], group=branches)
                shared[key] /= layout.size
            results[layout] = (shared, sent.traffic)
    torch.save({str(layout): result for layout, result in results.items()}, Path(directory) / f"{rank}.pt")
    dist.destroy_process_group()


@functools.cache
def results(size: int, directory: Path) -> list[dict]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    forked.call("flashi2v-model", size, work, port, str(directory), size)
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(size)]


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    directories = {size: tmp_path_factory.mktemp(f"table of {size}") for size in TABLES}
    return lambda size: results(size, directories[size])


@pytest.fixture(scope="module")
def single():
    return run(network())


@pytest.mark.parametrize(("size", "layout"), CASES)
def test_every_layout_computes_what_one_process_computes(tables, single, size, layout):
    found = [result[str(layout)] for result in tables(size)[: layout.size]]
    for shared, _ in found:
        assert shared.keys() == single.keys()
        for key, value in single.items():
            atol = 1e-5 * max(1.0, value.abs().max().item())
            torch.testing.assert_close(shared[key], value, rtol=1e-4, atol=atol, msg=f"{key} differs")


@pytest.mark.parametrize(("size", "layout"), CASES)
def test_messages_and_bytes_are_those_of_the_formula(tables, size, layout):
    degrees, batch = ContextDegrees(layout.ulysses, layout.ring), 2 // layout.branches
    expected = [
        attention_traffic(degrees, NUM_TOKENS, HEADS, HEAD_SIZE, batch=batch, itemsize=4, backward=backward)
        for backward in (False, True)
    ]
    for rank, result in enumerate(tables(size)[: layout.size]):
        each = sum((traffic[rank % degrees.size] for traffic in expected), Traffic())
        assert result[str(layout)][1] == each * LAYERS


SIZES = st.integers(1, 24)


@given(SIZES, SIZES)
def test_the_chosen_degrees_share_heads_evenly_with_the_shortest_ring(size, num_heads):
    degrees = choose_degrees(size, num_heads)
    assert degrees.size == size
    assert num_heads % degrees.ulysses == 0
    better = range(degrees.ulysses + 1, num_heads + 1)
    assert not any(size % ulysses == 0 and num_heads % ulysses == 0 for ulysses in better)


@given(st.integers(0, 1000), SIZES)
def test_shares_are_those_of_tensor_split(total, parts):
    assert share(total, parts) == [len(part) for part in torch.arange(total).tensor_split(parts)]


@given(SIZES, st.integers(1, 6), st.integers(1, 200), st.booleans())
def test_what_is_sent_adds_up_to_what_the_others_lack(ulysses, ring, num_tokens, backward):
    """Over all processes: every token's heads once to whoever attends for them, the result back, blocks around."""
    num_heads = ulysses + 3
    degrees = ContextDegrees(ulysses, ring)
    found = attention_traffic(degrees, num_tokens, num_heads, 8, itemsize=4, backward=backward)
    tokens, heads = share(num_tokens, degrees.size), share(num_heads, ulysses)
    foreign = sum(n * (num_heads - heads[rank % ulysses]) for rank, n in enumerate(tokens))
    rounds = (2 * ring - 1 if ring > 1 else 0) if backward else ring - 1
    assert sum(sent.num_bytes for sent in found) == 4 * 8 * (4 * foreign + 2 * rounds * num_tokens * num_heads)
    assert {sent.messages for sent in found} == {2 * (ulysses - 1) + rounds}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((8, 12), "Ulysses 4 x ring 2"),
        ((8, 40), "Ulysses 8 x ring 1"),
        ((5, 12), "Ulysses 1 x ring 5"),
        ((8, 12, 8), "Ulysses 8 x ring 1"),
        ((8, 12, None, 8), "Ulysses 1 x ring 8"),
    ],
)
def test_degrees_that_are_left_open_are_chosen(arguments, expected):
    assert str(choose_degrees(*arguments)) == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((8, 12, 0), "the degree of Ulysses must be at least 1, got 0"),
        ((8, 12, -2), "the degree of Ulysses must be at least 1, got -2"),
        ((8, 12, None, 0), "the degree of a ring must be at least 1, got 0"),
        ((8, 12, 3), "ring of 2 x Ulysses of 3 is not the context parallel size of 8"),
        ((8, 4, 8), r"leaves processes without one of the 4 heads: use at most 4, .*\(Ulysses 4 x ring 2\)"),
    ],
)
def test_degrees_that_cannot_be_are_refused(arguments, words):
    with pytest.raises(InputError, match=words):
        choose_degrees(*arguments)


def test_a_tensor_parallel_size_that_does_not_divide_the_heads_says_which_do():
    with pytest.raises(InputError, match=r"size of 5 does not divide the 12 heads: use one of 1, 2, 3, 4, 6, 12$"):
        check_heads(5, 12)
