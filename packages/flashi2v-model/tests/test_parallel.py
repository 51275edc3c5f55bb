"""The transformer with its tokens or matrices shared out among processes against the same in one process."""

import contextlib
import socket
from pathlib import Path

import forked
import pytest
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from golden import small_model, tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from flashi2v_model import InputError
from flashi2v_model.caching import conditions_kept
from flashi2v_model.parallel import check_degree, parallelise_context, parallelise_tensors

pytestmark = pytest.mark.slow

# B, F, H, W; 72 tokens, and 9, which neither 2 nor 4 processes share evenly.
GRIDS = {"even": (2, 3, 8, 12), "uneven": (1, 3, 2, 6)}


def _inputs(grid: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    batch, *latent = grid
    shape = (batch, 16, *latent)
    text = tensor("in:text", (batch, 16, 24))
    return (
        tensor("in:latents", shape, 3**0.5),
        torch.full((batch,), 737.25),
        text,
        tensor("in:condition", (batch, 16, 1, *latent[1:])),
    )


def _run(model: torch.nn.Module, grid: tuple[int, ...]) -> dict[str, torch.Tensor]:
    inputs = _inputs(grid)
    inputs[0].requires_grad_()
    model.zero_grad()
    output = model(*inputs, return_dict=False)[0]
    (output * tensor("weights", output.shape)).sum().backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    return {"output": output.detach(), "input": inputs[0].grad, **gradients}


def _whole(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}


@torch.no_grad()
def _two_steps(model: torch.nn.Module, grid: tuple[int, ...]) -> torch.Tensor:
    latents, timestep, text, condition = _inputs(grid)
    with conditions_kept(model):
        for _ in range(2):
            latents = model(latents, timestep, text, condition, return_dict=False)[0]
    return latents


def _work(rank: int, port: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=4)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    results = {}
    for size, group in ((2, pairs[rank // 2]), (4, dist.group.WORLD)):
        parallel = small_model()
        if size == 4:
            parallel.enable_parallelism(config=ContextParallelConfig(ulysses_degree=4))
        else:
            parallelise_context(parallel, group)
        for name, grid in GRIDS.items():
            shared = _run(parallel, grid)
            for key in sorted(shared.keys() - {"output"}):
                dist.all_reduce(shared[key], group=group)
                shared[key] /= size
            results[size, name] = shared
            results[size, name]["two steps"] = _two_steps(parallel, grid)
        halved = small_model().to(torch.bfloat16)
        parallelise_context(halved, group)
        for name, grid in GRIDS.items():
            results[size, name]["bf16 output"] = _run(halved, grid)["output"]
        with contextlib.suppress(ValueError):
            _two_steps(parallel, (1, 1, 2, 2))
            raise AssertionError("one token cannot be shared")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("context", "tensor"))
    for name, grid in GRIDS.items():
        matrices = small_model()
        parallelise_tensors(matrices, mesh["tensor"])
        results["tensor", name] = _whole(_run(matrices, grid)) | {"two steps": _two_steps(matrices, grid)}
        results["tensor", name]["share"] = matrices.blocks[0].ffn.net[0].proj.weight.to_local().shape[0]
        parallelise_context(matrices, mesh.get_group("context"))
        shared = _whole(_run(matrices, grid))
        for key in sorted(shared.keys() - {"output"}):
            dist.all_reduce(shared[key], group=mesh.get_group("context"))
            shared[key] /= 2
        results["both", name] = shared
    torch.save(results, Path(directory) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    directory = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    forked.call("flashi2v-model", 4, _work, port, str(directory))
    return [torch.load(directory / f"{rank}.pt") for rank in range(4)]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("grid", GRIDS)
def test_processes_that_share_tokens_compute_what_one_computes(results, size, grid):
    single = _run(small_model(), GRIDS[grid]) | {"two steps": _two_steps(small_model(), GRIDS[grid])}
    single["bf16 output"] = _run(small_model().to(torch.bfloat16), GRIDS[grid])["output"]
    for result in results:
        shared = result[size, grid]
        assert shared.keys() == single.keys()
        for key, value in single.items():
            atol = 1e-5 * max(1.0, value.abs().max().item())
            torch.testing.assert_close(shared[key], value, rtol=1e-4, atol=atol, msg=f"{key}: ranks differ")


@pytest.mark.parametrize("kind", ["tensor", "both"])
@pytest.mark.parametrize("grid", GRIDS)
def test_processes_that_share_matrices_compute_what_one_computes(results, kind, grid):
    single = _run(small_model(), GRIDS[grid])
    for result in results:
        shared = result[kind, grid]
        assert shared.pop("share", 64) == 64  # of 128 hidden channels
        if kind == "tensor":
            single["two steps"] = _two_steps(small_model(), GRIDS[grid])
        assert shared.keys() == single.keys()
        for key, value in single.items():
            atol = 1e-5 * max(1.0, value.abs().max().item())
            torch.testing.assert_close(shared[key], value, rtol=1e-4, atol=atol, msg=f"{key}: ranks differ")


def test_a_size_that_does_not_divide_the_heads_says_which_do():
    with pytest.raises(InputError, match=r"size of 5 does not divide the 12 heads: use one of 1, 2, 3, 4, 6, 12$"):
        check_degree(5, 12)
