"""Wan's VAE by each form of its 3-D convolutions: operations, memory, and how far from the plain VAE in fp32.

python -m flashi2v_npu_ops.testing python tests/ascend/convolutions.py

Memory is the largest that torch_npu's allocator gave out beyond weights and input, without what kernels use inside.
"""

import copy

import torch
from diffusers import AutoencoderKLWan
from torch.utils.flop_counter import FlopCounterMode

from flashi2v_npu_ops import route_conv3d, use_backend

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VIDEO = (1, 3, 9, 48, 48)
MIB = 2**20


def measure(vae, call, given):
    """Return the result, the operations in units of 10^9, and the memory in MiB, None on a CPU."""
    on_npu = given.device.type == "npu"
    if on_npu:
        torch.npu.reset_peak_memory_stats()
    before = torch.npu.memory_allocated()
    with FlopCounterMode(display=False) as count:
        out = call(vae, given).float().cpu()
    memory = (torch.npu.max_memory_allocated() - before) / MIB if on_npu else None
    return out, count.get_total_flops() / 1e9, memory


def decode(vae, latents):
    return vae.decode(latents).sample


def encode(vae, video):
    return vae.encode(video).latent_dist.mode()


def main():
    torch.manual_seed(0)
    plain = AutoencoderKLWan(base_dim=32).requires_grad_(False).eval()
    video = torch.rand(VIDEO) * 2 - 1
    latents = encode(plain, video)
    expected = {"decoding": decode(plain, latents), "encoding": latents}
    print("| form | dtype | | operations | memory | largest difference | root mean square |")
    print("|---|---|---|---|---|---|---|")
    for form in ("plain", "taps", "unfold"):
        for label, dtype in DTYPES.items():
            # In bf16 NPUs refuse the plain one, so the CPU computes it.
            device = "cpu" if (form, label) == ("plain", "bf16") else "npu"
            vae = copy.deepcopy(plain).to(device, dtype)
            if form != "plain":
                route_conv3d(vae)
            for name, call, given in (("decoding", decode, latents), ("encoding", encode, video)):
                with use_backend("conv3d", "auto" if form == "plain" else form):
                    out, operations, memory = measure(vae, call, given.to(device, dtype))
                off = out - expected[name]
                cells = (f"{operations:.1f} G", "" if memory is None else f"{memory:.0f} MiB")
                cells += (f"{off.abs().max():.1e}", f"{off.square().mean().sqrt():.1e}")
                print(f"| {form} | {label} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
