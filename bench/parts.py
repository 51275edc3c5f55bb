"""One part of the device report, in a process of its own, row by row.

    python bench/parts.py PART SIZE DEVICE ROWS [SKIPPED ...]

Appends JSON lines to the file ROWS: the names of all rows, then the name of each before it begins and what became of
it. `device_report.py` starts it, and starts it again behind a row that ended the process.
"""

import dataclasses
import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig
from models import (
    SIZES,
    Size,
    alone,
    difference,
    in_turns,
    inputs_of,
    our_network,
    random_vae,
    seconds_of,
    wan_network,
)
from torch import Tensor
from torch._dynamo.utils import counters

from flashi2v_infer.decoding import Decoding, predicted_peak
from flashi2v_infer.execution import DTypes, Execution
from flashi2v_infer.plan.plan import make_plan
from flashi2v_infer.plan.skeleton import build_parts
from flashi2v_infer.settings import SamplingSettings
from flashi2v_model import FlashI2VTransformer3DModel
from flashi2v_model.caching import conditions_kept
from flashi2v_model.cost import count_operations, num_bytes
from flashi2v_model.encoders import decode_video, encode_video
from flashi2v_model.machines import peak_flops
from flashi2v_model.quantization import quantize
from flashi2v_model.sampling import VelocityField
from flashi2v_model.scheduler import euler_scheduler, inference_sigmas
from flashi2v_model.transformer import EMBED_INPUTS
from flashi2v_npu_ops import device as devices
from flashi2v_npu_ops import doctor, probe, registry, split_frequencies
from flashi2v_train.options import MemoryOptions
from flashi2v_train.parallelise import Stage
from flashi2v_train.recompute import save_memory

ROOT = Path(__file__).parents[1]
# What a row holds; where it names others ("of"), a row for each of them.
Values = dict[str, Any]
Rows = dict[str, Callable[[], Values]]
_STEPS = 8  # of a sampling run under a cache


def machine(size: Size, device: torch.device) -> Rows:
    """What this is, and what it multiplies at: the rates that all shares are of."""

    def about() -> Values:
        report = dataclasses.asdict(doctor.examine(str(device)))
        libraries = {name: version(name) for name in ("torch", "diffusers", "transformers")}
        name = devices.name(device.type)
        return {"device": name, "named_rate": peak_flops(name), "libraries": libraries, "doctor": report}

    def product(dtype: torch.dtype) -> Values:
        a, b = (torch.randn(size.matrix, size.matrix, device=device).to(dtype) for _ in range(2))
        return _timed(_word(dtype), lambda: a @ b)

    def product_int8() -> Values:
        a, b = (torch.randint(-99, 99, (size.matrix,) * 2, device=device, dtype=torch.int8) for _ in range(2))
        return _timed("int8", lambda: torch._int_mm(a, b.t()))

    def product_fp8() -> Values:
        a, b = (torch.randn(size.matrix, size.matrix, device=device).to(torch.float8_e4m3fn) for _ in range(2))
        rows, columns = torch.ones(size.matrix, 1, device=device), torch.ones(1, size.matrix, device=device)
        return _timed("fp8", lambda: torch._scaled_mm(a, b.t(), rows, columns, out_dtype=torch.bfloat16))

    def copy() -> Values:
        a = torch.empty(size.matrix, size.matrix, 4, device=device)
        b = torch.empty_like(a)
        b.copy_(a)
        seconds = min(seconds_of(lambda: b.copy_(a), device, 10))
        return {"seconds": seconds, "bytes_per_second": 2 * a.nbytes / seconds}

    def _timed(dtype: str, call: Callable[[], Tensor]) -> Values:
        call()
        seconds = float(np.median(seconds_of(call, device, 10)))
        return {"seconds": seconds, "dtype": dtype, "rate": 2 * size.matrix**3 / seconds}

    return {
        "about": about,
        "product bf16": lambda: product(torch.bfloat16),
        "product fp32": lambda: product(torch.float32),
        "product int8": product_int8,
        "product fp8": product_fp8,
        "copy": copy,
    }


def operators(size: Size, device: torch.device) -> Rows:
    """Every backend of every operator against the reference on the CPU, as the doctor's probe does it."""

    def row(operator: str, dtype: str, backend: str) -> Callable[[], Values]:
        # The inputs of a backend that rounds are rounded, whatever they are stored as.
        allowed = probe.TOLERANCE["bf16" if backend == "bf16" else dtype]
        what = operator, size.probes, dtype, backend, str(device)

        def measured() -> Values:
            found = probe.measure(*what)
            return {"seconds": found["milliseconds"] / 1e3, "error": found["error"], "allowed": allowed}

        return measured

    known = registry.all_backends()
    return {
        f"{operator} {dtype} {backend}": row(operator, dtype, backend)
        for operator in registry.operators()
        for dtype in reversed(probe.DTYPES)
        for backend in registry.backends(operator)
        if backend != "reference" and known[backend].is_for(device.type)
    }


def golden(size: Size, device: torch.device) -> Rows:
    """The numbers of the public FlashI2V code, which the tests hold the CPU to, in fp32 on this device."""
    sys.path.append(str(ROOT / "packages/flashi2v-model/tests"))
    from golden import number, small_model, tensor

    torch.backends.cudnn.allow_tf32 = False  # whose convolutions have 10 bits otherwise

    def steps() -> Values:
        model = small_model().to(device)
        condition = tensor("sc:start", (2, 16, 1, 8, 12), 3**0.5)[:1].to(device)
        texts = [number(f"sampling/in/{name}")[:1].to(device) for name in ("prompt", "neg_prompt")]
        field = VelocityField(model, condition, *texts, 5.0, 0.1)
        scheduler = euler_scheduler(7.0)
        scheduler.set_timesteps(sigmas=inference_sigmas(4), device=device)
        final = field.follow(scheduler, tensor("sc:noise", (2, 16, 3, 8, 12), 3**0.5)[:1].to(device))
        return _error(final, number("sampling/npu/conv333/b1_final"), 1e-3)

    def filtered() -> Values:
        numbers = np.load(ROOT / "packages/flashi2v-npu-ops/tests/golden_fourier.npz")
        high, _, _ = split_frequencies(torch.from_numpy(numbers["odd/x"]).to(device), 0.1)
        return _error(high, torch.from_numpy(numbers["odd/high_0.1_abs1"]), 1e-4)

    def _error(ours: Tensor, theirs: Tensor, allowed: float) -> Values:
        return {"error": float((ours.cpu() - theirs).abs().max()), "allowed": allowed}

    return {"four guided steps": torch.no_grad()(steps), "Fourier filter": filtered}


def network(size: Size, device: torch.device) -> Rows:
    """One call of the network beside diffusers' Wan on the same weights, and what makes it faster."""
    model = our_network(size, device)
    wan = wan_network(model, size)
    inputs = inputs_of(size, model, device)
    latents, timestep, text, _ = inputs
    operations, dtype = _operations(size), _word(size.dtype)
    names = ("FlashI2V", "diffusers' Wan")

    def ours() -> Tensor:
        return model(*inputs, return_dict=False)[0]

    def theirs() -> Tensor:
        return wan(latents.to(size.dtype), timestep, text, return_dict=False)[0]

    def kept() -> Any:
        return conditions_kept(model)

    def rows_of(seconds: dict[str, float], **more: Any) -> Values:
        first = seconds[names[0]]
        rows = {
            name: {"seconds": each, "operations": operations, "dtype": dtype, "ratio": each / first}
            for name, each in seconds.items()
        }
        return {"of": rows, **more}

    def forward() -> Values:
        later = {"FlashI2V, later steps": (ours, kept)}
        return rows_of(in_turns({names[0]: alone(ours), **later, names[1]: alone(theirs)}, device, size.repeats))

    def same() -> Values:
        x, embedded, time_, modulation = model.tokens(latents, timestep, text)
        grid = model.token_grid(latents.shape)
        trunk = model.project(model.run_blocks(x, embedded, modulation, grid), time_, grid)
        return {"error": difference(trunk, theirs()), "allowed": 1e-4 if dtype == "fp32" else 5e-2}

    def memory() -> Values:
        devices.synchronize(device)
        devices.reset_peak_memory(device)
        with kept():
            for _ in range(2):
                ours()
        devices.synchronize(device)
        return {"peak": devices.peak_memory(device), "planned": _planned(size)}

    def fused() -> Values:
        before = in_turns({names[0]: alone(ours)}, device, size.repeats)
        model.fuse_qkv_projections()
        fused = in_turns({"FlashI2V, fused projections": alone(ours)}, device, size.repeats)
        model.unfuse_qkv_projections()
        after = in_turns({names[0]: alone(ours)}, device, size.repeats)
        return rows_of({names[0]: (before[names[0]] + after[names[0]]) / 2, **fused})

    def compiled() -> Values:
        model.compile_repeated_blocks(backend=size.compiler)
        wan.compile_repeated_blocks(backend=size.compiler)
        first = [seconds_of(call, device, 1)[0] for call in (ours, theirs)]
        seconds = in_turns({names[0]: alone(ours), names[1]: alone(theirs)}, device, size.repeats)
        return rows_of(seconds, compiling_seconds=first, compiler=size.compiler)

    def for_all_sizes() -> Values:
        torch._dynamo.reset()
        model.compile_repeated_blocks(backend=size.compiler, dynamic=True)
        (first,) = seconds_of(ours, device, 1)
        seconds = in_turns({names[0]: alone(ours)}, device, size.repeats)
        before, (frames, height, width) = counters["stats"]["unique_graphs"], size.video
        for taller in (16, 32, 48):
            other = dataclasses.replace(size, video=(frames, height + taller, width))
            model(*inputs_of(other, model, device))
        graphs = counters["stats"]["unique_graphs"] - before
        return rows_of(seconds, compiling_seconds=first, compiler=size.compiler, graphs_of_other_sizes=graphs)

    rows = {
        "forward": forward,
        "same weights, same output": same,
        "memory": memory,
        "fused projections": fused,
        "compiled blocks": compiled,
        "compiled blocks, for all sizes": for_all_sizes,
    }
    return {name: torch.no_grad()(row) for name, row in rows.items()}


def caches(size: Size, device: torch.device) -> Rows:
    """A short unguided run under diffusers' caches; with random weights what they decide means nothing."""
    model = our_network(size, device)
    latents, _, text, condition = inputs_of(size, model, device)
    scheduler = euler_scheduler(7.0)
    plain: list[Tensor] = []

    def run() -> Tensor:
        scheduler.set_timesteps(sigmas=inference_sigmas(_STEPS), device=device)
        return VelocityField(model, condition, text).follow(scheduler, latents)

    def row(config: Any) -> Callable[[], Values]:
        @torch.no_grad()
        def measured() -> Values:
            if config is not None:
                model.enable_cache(config)
            try:
                run()
                (seconds,) = seconds_of(lambda: plain.append(run()), device, 1)
            finally:
                if config is not None:
                    model.disable_cache()
            return {"seconds": seconds / _STEPS, "change": difference(plain[-1], plain[0])}

        return measured

    broadcast = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 950),
        spatial_attention_block_identifiers=("blocks",),
        current_timestep_callback=lambda: 500,
    )
    return {
        "none": row(None),
        "FirstBlockCache, 0.1": row(FirstBlockCacheConfig(threshold=0.1)),
        "TaylorSeer, every third step": row(TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=2)),
        "PyramidAttentionBroadcast, every second": row(broadcast),
    }


def quantised(size: Size, device: torch.device) -> Rows:
    """Matrices of 8 bits: stored alone, or multiplied, and then compiled, too."""
    exact: list[Tensor] = []

    def row(kind: Any) -> Callable[[], Values]:
        @torch.no_grad()
        def measured() -> Values:
            model = our_network(size, device)
            inputs = inputs_of(size, model, device)

            def call() -> Tensor:
                return model(*inputs, return_dict=False)[0]

            if not exact:
                exact.append(call())
            if kind is not None:
                quantize(model, kind)
            devices.reset_peak_memory(device)
            found = {"change": difference(call(), exact[0]), "weights": num_bytes(model)}
            eager = in_turns({"eager": alone(call)}, device, size.repeats)["eager"]
            found |= {"peak": devices.peak_memory(device), "seconds": eager}
            found |= {"operations": _operations(size), "dtype": _word(size.dtype)}
            if kind is not None and kind.endswith("_dynamic"):  # whose rounding is a pass over memory, unless fused
                model.compile_repeated_blocks(backend=size.compiler)
                found["compiled_seconds"] = in_turns({"compiled": alone(call)}, device, size.repeats)["compiled"]
            return found

        return measured

    return {"none": row(None)} | {kind: row(kind) for kind in ("int8", "fp8", "int8_dynamic", "fp8_dynamic")}


def training(size: Size, device: torch.device) -> Rows:
    """Forward, backward and AdamW of one clip; weights, gradients and AdamW's sums in the network's dtype."""

    def row(**options: Any) -> Callable[[], Values]:
        def measured() -> Values:
            model = our_network(size, device).requires_grad_(True)
            save_memory(model, MemoryOptions(**options), offload_attention=False, device=device)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
            inputs = (*inputs_of(size, model, device), torch.full((1,), 0.1, device=device))
            stage = Stage(model, size.latents[1:])

            def step() -> None:
                stage(*inputs).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            step()
            devices.reset_peak_memory(device)
            seconds = float(np.median(seconds_of(step, device, size.repeats)))
            more = {"operations": 3 * _operations(size), "dtype": _word(size.dtype)}
            return {"seconds": seconds, "peak": devices.peak_memory(device), **more}

        return measured

    again = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return {"every layer computed again": row(**again), "nothing computed again": row()}


def vae(size: Size, device: torch.device) -> Rows:
    """The VAE in fp32, as the released model has it, and in bf16."""
    frames, height, width = size.video

    def row(dtype: torch.dtype, decodes: bool) -> Callable[[], Values]:
        @torch.no_grad()
        def measured() -> Values:
            model = random_vae(size, dtype, device)
            given = torch.zeros(size.latents if decodes else (1, 3, frames, height, width), device=device)
            run = decode_video if decodes else encode_video
            run(model, given)
            devices.reset_peak_memory(device)
            (seconds,) = seconds_of(lambda: run(model, given), device, 1)
            found: Values = {"seconds": seconds, "peak": devices.peak_memory(device)}
            if decodes:
                found["planned"] = num_bytes(model) + predicted_peak(model, size.latents, Decoding())
            return found

        return measured

    return {
        f"{'decode' if decodes else 'encode'} {_word(dtype)}": row(dtype, decodes)
        for dtype in (torch.float32, torch.bfloat16)
        for decodes in (True, False)
    }


PARTS = {part.__name__: part for part in (machine, operators, golden, network, training, vae, quantised, caches)}


def _word(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def _operations(size: Size) -> float:
    """Return the operations of the first call of the network."""
    device = torch.device("meta")
    with device:
        model = FlashI2VTransformer3DModel(**size.network)
        batch, channels, _, height, width = size.latents
        shapes = size.latents, (batch,), (batch, size.text, model.config.text_dim), (batch, channels, 1, height, width)
        tensors = [torch.empty(shape) for shape in (*shapes, (batch,))]
    return count_operations(model, dict(zip(EMBED_INPUTS, tensors))).forward


def _planned(size: Size) -> int:
    """Return the peak of denoising that `flashi2v-infer --plan` predicts, without the VAE, which is not here."""
    frames, height, width = size.video
    word = _word(size.dtype)
    encoder = {"vocab_size": 384, "d_model": size.network.get("text_dim", 4096), "num_layers": 1, "num_heads": 1}
    parts = build_parts(dict(size.network), encoder, dict(size.vae), DTypes(word, word, "fp32"))
    settings = SamplingSettings(frames, height, width, 2, 1.0, max_sequence_length=size.text)
    plan = make_plan(parts, settings, Execution(), "meta", None)
    (denoising,) = (stage for stage in plan.stages if stage.name == "denoising")
    return denoising.peak - denoising.weights + num_bytes(parts.transformer)


def run(part: str, size: Size, device: torch.device, write: Callable[[Values], None], skipped: Sequence[str]) -> None:
    """Measure the rows of a part; one that fails is kept as failed, and does not end the others."""
    rows = PARTS[part](size, device)
    write({"rows": [*rows]})
    for name, row in rows.items():
        if name in skipped:
            continue
        write({"begins": name})
        started = time.perf_counter()
        try:
            found = {"status": "done", **row()}
        except Exception as error:  # whatever a device, a library or a compiler raises
            status = "refused" if getattr(error, "exit_code", 1) == 2 else "failed"
            found = {"status": status, "words": f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]}
        write({"name": name, **found, "took": time.perf_counter() - started})
        _empty(device)


def _empty(device: torch.device) -> None:
    gc.collect()
    if device.type != "cpu":
        getattr(torch, device.type).empty_cache()


def main(part: str, size: str, device: str, rows: str, *skipped: str) -> None:
    with open(rows, "a") as file:

        def write(line: Values) -> None:
            print(json.dumps(line, default=str), file=file, flush=True)

        run(part, SIZES[size], devices.resolve_device(device), write, skipped)


if __name__ == "__main__":
    main(*sys.argv[1:])
