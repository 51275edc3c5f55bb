"""One call of the 1.3B network beside diffusers' Wan2.1 transformer of the same size, in one run.

    python bench/bench_full_size.py --device cuda

49x480x832 in bf16 on an accelerator, as the released model samples; 17x128x128 in fp32 on the CPU. Weights are random.
What the device can do is measured by multiplying large matrices in the same dtype, so that the share needs no data
sheet.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flashi2v_model import FlashI2VTransformer3DModel
from flashi2v_model.caching import conditions_kept
from flashi2v_model.presets import TRANSFORMERS
from flashi2v_npu_ops import device as devices

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--size", type=int, nargs=3, metavar=("FRAMES", "HEIGHT", "WIDTH"))
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", choices=DTYPES)
    arguments = parser.parse_args()
    device = devices.resolve_device(arguments.device)
    on_cpu = device.type == "cpu"
    dtype = DTYPES[arguments.dtype or ("fp32" if on_cpu else "bf16")]
    frames, height, width = arguments.size or ((17, 128, 128) if on_cpu else (49, 480, 832))
    sizes = {**TRANSFORMERS["1.3b"], "num_layers": arguments.layers}

    grid = (frames - 1) // 4 + 1, height // 8, width // 8
    latents = torch.randn(1, 16, *grid, device=device)
    timestep = torch.full((1,), 500.0, device=device)
    text = torch.randn(1, 512, 4096, device=device, dtype=dtype)

    def calls_of_ours() -> dict[str, tuple[Callable[[], Tensor], AbstractContextManager[None]]]:
        model, condition = _random(lambda: FlashI2VTransformer3DModel(**sizes), dtype, device), latents[:, :, :1]

        def call() -> Tensor:
            return model(latents, timestep, text, condition, return_dict=False)[0]

        # What is measured comes behind one call that is not.
        return {"FlashI2V, first step": (call, nullcontext()), "FlashI2V, later steps": (call, conditions_kept(model))}

    def calls_of_wan() -> dict[str, tuple[Callable[[], Tensor], AbstractContextManager[None]]]:
        model, noisy = _random(lambda: WanTransformer3DModel(**sizes), dtype, device), latents.to(dtype)
        return {
            "diffusers' WanTransformer3DModel": (
                lambda: model(noisy, timestep, text, return_dict=False)[0],
                nullcontext(),
            )
        }

    results: dict[str, tuple[float, int]] = {}
    for make_calls in (calls_of_ours, calls_of_wan):  # one model at a time in the memory
        for name, (call, context) in make_calls().items():
            with context:
                results[name] = _measure(call, device, arguments.repeats)
    with FlopCounterMode(display=False) as counter:
        calls_of_ours()["FlashI2V, first step"][0]()
    flops = counter.get_total_flops()
    rate = _matmul_rate(dtype, device)

    print(f"{devices.name(device.type)}; torch {version('torch')}, diffusers {version('diffusers')}; {dtype}")
    print(f"{arguments.layers} layers, {frames}x{height}x{width}; ", end="")
    print(f"{flops / 1e12:.1f} TFLOP a call; matrices multiply at {rate / 1e12:.1f} TFLOP/s\n")
    print("| call | seconds | ratio | of the matrices' rate | peak memory |\n|---|---|---|---|---|")
    first = next(iter(results.values()))[0]
    for name, (seconds, peak) in results.items():
        print(f"| {name} | {seconds:.3f} | {seconds / first:.2f} | ", end="")
        print(f"{flops / seconds / rate:.0%} | {peak / 2**30:.1f} GiB |")


def _random(make: Callable[[], nn.Module], dtype: torch.dtype, device: torch.device) -> nn.Module:
    with torch.device("meta"):
        model = make()
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if any(part in name.split(".") for part in kept) else dtype)
    model.to_empty(device=device)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.normal_(0, 0.02)
    return model.eval()


def _measure(call: Callable[[], Tensor], device: torch.device, repeats: int) -> tuple[float, int]:
    """Return the median of seconds, and the peak of memory: of the whole process on the CPU."""
    call()
    devices.synchronize(device)
    devices.reset_peak_memory(device)
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        devices.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds), devices.peak_memory(device)


def _matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    size = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds, _ = _measure(lambda: a @ b, device, 10)
    return 2 * size**3 / seconds


if __name__ == "__main__":
    main()
