"""Memory against time: what the recompute options keep for the backward pass, and what a step then takes."""

import argparse
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import mse_loss

from flashi2v_model import FlashI2VTransformer3DModel
from flashi2v_npu_ops.device import peak_memory, reset_peak_memory
from flashi2v_train.options import MemoryOptions
from flashi2v_train.parallelise import Stage
from flashi2v_train.recompute import save_memory

LAYERS, LATENT, TEXT, TEXT_DIM = 8, (16, 9, 32, 32), 64, 256
MODEL = {"num_attention_heads": 4, "attention_head_dim": 64, "ffn_dim": 1024, "text_dim": TEXT_DIM, "text_len": TEXT}
FULL = {"recompute_granularity": "full"}
BLOCK = {**FULL, "recompute_method": "block"}
SKIP = {"recompute_num_layers": 0, "recompute_skip_core_attention": True}
MODES = {
    "none": {},
    "selective": {"recompute_granularity": "selective"},
    "all but attention": {**BLOCK, **SKIP, "recompute_num_layers_skip_core_attention": LAYERS},
    "block, half": {**BLOCK, "recompute_num_layers": LAYERS // 2},
    "uniform 1": {**FULL, "recompute_method": "uniform", "recompute_num_layers": 1},
    "uniform 2": {**FULL, "recompute_method": "uniform", "recompute_num_layers": 2},
}


def measure(options: dict) -> tuple[int, int, float]:
    """Return the bytes that autograd keeps, those that the process grows by at most, and the seconds of a step."""
    device = torch.device("cpu")
    torch.manual_seed(0)
    model = FlashI2VTransformer3DModel(num_layers=LAYERS, **MODEL)
    save_memory(model, MemoryOptions(**options), offload_attention=False, device=device)
    stage = Stage(model, LATENT)
    inputs = (
        torch.randn(1, *LATENT),
        1000 * torch.rand(1),
        torch.randn(1, TEXT, TEXT_DIM),
        torch.randn(1, LATENT[0], 1, *LATENT[2:]),
        torch.rand(1),
    )
    wanted = torch.randn(1, *LATENT)
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    def step() -> None:
        mse_loss(stage(*inputs), wanted).backward()

    step()  # gradients are there from now on
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = mse_loss(stage(*inputs), wanted)
    num_bytes = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    kept.clear()
    del loss
    reset_peak_memory(device)
    before, started = peak_memory(device), time.perf_counter()
    step()
    return num_bytes, peak_memory(device) - before, time.perf_counter() - started


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    tokens = LATENT[1] * LATENT[2] * LATENT[3] // 4
    print(f"{LAYERS} layers, {tokens} tokens, fp32; what skipped attention keeps is not in the first column")
    print(f"{'recompute':<18} {'kept':>6} {'peak':>6} {'step':>6}")
    base = None
    for name, options in MODES.items():
        # A process of its own: what one has once allocated, it keeps.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            measured = fresh.submit(measure, options).result()
        base = base or measured
        print(f"{name:<18} " + " ".join(f"{own / first:5.2f}x" for own, first in zip(measured, base)))


if __name__ == "__main__":
    main()
