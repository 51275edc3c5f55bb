"""`flashi2v-model inspect | convert | init | calibrate`."""

import io
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn

from cyclopts import App, CycloptsError

import flashi2v_model
from flashi2v_model.errors import InputError

_OF_NEW_LAYERS = ("conv3x3x3_proj", "low_freq_proj", "fft_return_abs")

app = App(
    name="flashi2v-model",
    help="""Look into, convert and create FlashI2V models.

    Example: flashi2v-model inspect flashi2v_1_3B.pt
    """,
    help_format="plaintext",
    version=flashi2v_model.__version__,
)


@app.command
def inspect(path: Path, *, num_heads: int | None = None, recipe: str | None = None) -> None:
    """Print a model's layout, architecture and size; of a LoRA adapter spelling, rank, alpha and layers.

    Example: flashi2v-model inspect flashi2v_1_3B.pt

    Parameters
    ----------
    path
        a .safetensors or .pt file, a diffusers directory, or a run of flashi2v-train; or a LoRA adapter
    num_heads
        number of attention heads, if no config.json says it and heads are not 128 wide
    recipe
        module:Class of a variant of the network, or of the recipe that it was trained by (default: FlashI2V's own)
    """
    from flashi2v_model.adapter_commands import describe, find_adapter
    from flashi2v_model.model_commands import Model
    from flashi2v_model.variants import transformer_class
    from flashi2v_model.weights import detect_layout, read_state_dict, weight_files
    from flashi2v_model.weights.checkpoint import checkpoint_directory, has_ema, is_checkpoint
    from flashi2v_model.weights.settings import stored_settings

    if (adapter := find_adapter(path)) is not None:
        _print_facts(describe(adapter))
        return
    network = transformer_class(recipe)
    stored_settings(path, network)  # refuses another variant before its weights are looked at
    state_dict = read_state_dict(path, device="meta")
    layout = detect_layout(state_dict)
    model = Model.understood(path, state_dict, network, num_heads)
    files = weight_files(path)
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state_dict.values()})
    facts: dict[str, object] = {
        "layout": layout + model.lack,
        "parameters": f"{sum(tensor.numel() for tensor in state_dict.values()):,} in {', '.join(dtypes)}",
        "size": f"{sum(file.stat().st_size for file in files) / 1e9:,.3f} GB in {len(files)} file(s)",
    }
    checkpoint = checkpoint_directory(path)
    if is_checkpoint(checkpoint):
        facts["size"] = f"{facts['size']}, the whole checkpoint"
        facts["checkpoint"] = checkpoint.name
        kept = "kept (convert takes it; --weights raw takes the raw weights)"
        facts["moving average"] = kept if has_ema(checkpoint) else "not kept: raw weights only"
    for name, value in model.arguments.items():
        if not (model.lack and name in _OF_NEW_LAYERS):
            assumed = "  (assumed: neither the weights nor a config.json say)" if name in model.assumed else ""
            facts[name] = f"{value}{assumed}"
    _print_facts(facts)
    if layout == "main" and model.arguments["conv3x3x3_proj"]:
        print(
            "note: the code of the FSDP2 release projects one frame and repeats the result; with 3x3x3 convolutions "
            "flashi2v repeats first, as the NPU release does, so its videos differ from that code's"
        )


def _print_facts(facts: Mapping[str, object]) -> None:
    for name, fact in facts.items():
        print(f"{name:<20} {fact}")


@app.command
def convert(
    source: Path,
    destination: Path,
    *,
    to: Literal["diffusers", "wan", "npu", "main", "bare", "peft", "comfyui", "comfyui-ab", "kohya"],
    lora: list[str] | None = None,
    weights: Literal["ema", "raw"] = "ema",
    encoders: Path | None = None,
    shift: float | None = None,
    dtype: Literal["fp32", "bf16", "fp16"] | None = None,
    max_shard_size: str | None = None,
    num_heads: int | None = None,
    recipe: str | None = None,
) -> None:
    """Rewrite a model's weights in another published layout, or turn a training run into a model.

    A LoRA adapter is rewritten in another spelling.

    Examples: flashi2v-model convert flashi2v_1_3B.pt FlashI2V-1.3B/transformer --to diffusers

    flashi2v-model convert runs/first my-model --to diffusers --encoders Wan2.1-T2V-1.3B-Diffusers

    flashi2v-model convert my-model my-model.pt --to npu

    flashi2v-model convert style.safetensors style-comfyui.safetensors --to comfyui

    flashi2v-model convert my-model/transformer styled --to diffusers --lora style.safetensors:0.8

    Parameters
    ----------
    source
        a .safetensors or .pt file, a diffusers directory, or a run of flashi2v-train (its newest checkpoint); or a
        LoRA adapter
    destination
        a new directory for diffusers; otherwise a new .safetensors or .pt file (MindSpeed-MM loads npu as .pt). Of an
        adapter a new .safetensors file; for peft a new directory. Of a run that trained an adapter, a directory for
        diffusers, or npu and main, get the whole model with the adapter in it
    to
        the layout to write: diffusers, wan, npu or main; of an adapter the spelling: diffusers (transformer.*), wan and
        bare (names alone), peft, comfyui (lora_down), comfyui-ab (lora_A) or kohya
    lora
        an adapter to merge into the model, FILE or FILE:SCALE; again for another
    weights
        of a run: the moving average where it kept one, or the raw weights
    encoders
        a directory with vae, text_encoder and tokenizer: write a whole pipeline that flashi2v-infer --model takes,
        with what the run was trained for as its defaults, and a model card
    shift
        of such a pipeline's noise levels (default: the run's, or 7, as released; smaller ones suit smaller videos)
    dtype
        to store the transformer's weights in (default: as they are)
    max_shard_size
        of a file of the diffusers directory, such as 5GB; larger models are sharded (default 10GB)
    num_heads
        number of attention heads, if no config.json says it and heads are not 128 wide
    recipe
        module:Class of a variant of the network, or of the recipe that it was trained by (default: FlashI2V's own)
    """
    from flashi2v_model.adapter_choice import read_choices
    from flashi2v_model.adapter_commands import check_spelling, find_adapter, write_adapter
    from flashi2v_model.model_commands import check_options, read_model
    from flashi2v_model.weights.checkpoint import checkpoint_directory, is_checkpoint
    from flashi2v_model.weights.writing import appearing_whole

    if destination.exists():
        raise InputError(f"{destination} exists: name a new place, or remove it first")
    adapter, ema = find_adapter(source), weights == "ema"
    of_a_run = adapter is not None and adapter.is_dir()
    merges = of_a_run and (to in ("npu", "main") or (to == "diffusers" and destination.suffix != ".safetensors"))
    if weights == "raw" and not of_a_run and not is_checkpoint(checkpoint_directory(source)):
        raise InputError(f"--weights raw is for a run of flashi2v-train, which {source} is not")
    if adapter is not None and not merges:
        options = {"--lora": lora, "--encoders": encoders, "--shift": shift, "--dtype": dtype, "--recipe": recipe}
        check_spelling(destination, to, options | {"--max-shard-size": max_shard_size, "--num-heads": num_heads})
        with appearing_whole(destination) as temporary:
            write_adapter(adapter, temporary, to, ema=ema)
        print(f"wrote {destination} (LoRA adapter, {to})")
        return
    adapters = read_choices(lora or ())
    check_options(destination, to, encoders, shift, max_shard_size)
    model = read_model(source, to, adapter, ema=ema, recipe=recipe, num_heads=num_heads)
    model = model.changed(adapters, dtype)
    with appearing_whole(destination) as temporary:
        if to != "diffusers":
            model.write_file(temporary, to)
        elif encoders is None:
            model.as_transformer().save_pretrained(temporary, max_shard_size=max_shard_size or "10GB")
        else:
            model.write_pipeline(temporary, source, encoders, shift, max_shard_size or "10GB")
    print(f"wrote {destination}{model.lack}")
    for note in model.notes(destination, to):
        print(note)


@app.command
def init(directory: Path, *, preset: Literal["tiny", "1.3b", "14b"], seed: int = 0) -> None:
    """Create a model with random weights, in diffusers' layout.

    `tiny` is a whole pipeline (VAE, text encoder and tokenizer too), for tests and first steps. The large presets
    hold transformer and scheduler; their encoders are those of Wan2.1.

    Example: flashi2v-model init tiny-flashi2v --preset tiny

    Parameters
    ----------
    directory
        a new directory
    preset
        the size
    seed
        of the random weights
    """
    import torch

    from flashi2v_model import presets
    from flashi2v_model.weights import libraries
    from flashi2v_model.weights.writing import appearing_whole

    if directory.exists():
        raise InputError(f"{directory} exists: name a new directory, or remove it first")
    if not 0 <= seed < 2**63:
        raise InputError(f"--seed is a number from 0 to {2**63 - 1}, got {seed}")
    libraries.quieten()
    torch.manual_seed(seed)
    with appearing_whole(directory) as temporary:
        presets.init(preset, temporary)
    print(f"wrote {directory} ({preset}, random weights)")


@app.command
def calibrate(
    directory: Path,
    *,
    pictures: Path,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    device: str = "auto",
    dtype: Literal["fp32", "bf16", "fp16"] | None = None,
    batch: int = 1,
) -> None:
    """Measure how the model's velocities hang together, for `--speed balanced`, `fast` or a number.

    A video is sampled for every picture, whole. What was found is written beside the transformer, as calibration.json;
    it holds for these weights alone.

    Example: flashi2v-model calibrate my-model --pictures first-frames

    Parameters
    ----------
    directory
        a pipeline in diffusers' layout
    pictures
        a folder of first frames, 2 or more (16 to 32 do well), each with a text file of its name beside it that says
        what happens: cat.png and cat.txt
    num_inference_steps
        of the runs (default: the model's, at least 50)
    guidance_scale
        of the runs, above 1 (default: the model's, or 5)
    device
        npu, cuda, cpu, cuda:1, ...
    dtype
        of transformer and text encoder (default: bf16, fp32 on the CPU)
    batch
        videos at once
    """
    if num_inference_steps is not None and num_inference_steps < 3:
        raise InputError(f"--num-inference-steps must be at least 3, got {num_inference_steps}")
    if guidance_scale is not None and not 1 < guidance_scale < float("inf"):
        raise InputError(f"--guidance-scale must be above 1, as both branches are measured; got {guidance_scale}")
    if batch < 1:
        raise InputError(f"--batch must be at least 1, got {batch}")
    from flashi2v_model.speed.directory import calibrate_directory, find_pairs
    from flashi2v_model.weights.libraries import quieten
    from flashi2v_npu_ops.device import resolve_device

    pairs = find_pairs(pictures)
    quieten()
    chosen = resolve_device(device)
    found = calibrate_directory(
        directory,
        pairs,
        num_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        device=chosen,
        dtype=dtype or ("fp32" if chosen.type == "cpu" else "bf16"),
        batch=batch,
    )
    print(f"wrote {directory / 'transformer' / 'calibration.json'}, from {found.made_from}")


def main() -> None:
    """Run the command line: 0, or one line on stderr and the error's `exit_code` (2: what was given, 1: a failure)."""
    app.suppress_keyboard_interrupt = False  # cyclopts would exit without a word
    _make_output_patient()
    try:
        # The result is returned, as cyclopts would exit by itself before everything is written.
        app(sys.argv[1:], exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
    except CycloptsError as error:
        _fail(error, 2)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except OSError as error:  # of the machine: a full disk behind standard output, too many open files
        _drop_output()
        _fail(error, 1)
    except Exception as error:
        if not isinstance(code := getattr(error, "exit_code", None), int):
            raise
        _fail(error, code)


class _Output(io.FileIO):
    """A file to which nothing more is written where its reader has gone: head, say, that has seen enough."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            return len(data)


def _make_output_patient() -> None:
    """Let standard output take any character and outlive its reader; cyclopts would exit 1 without a word."""
    if not isinstance(sys.stdout, io.TextIOWrapper):
        return
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):  # a test's, in memory
        return
    output = io.BufferedWriter(_Output(descriptor, "w", closefd=False))
    sys.stdout = io.TextIOWrapper(output, encoding=sys.stdout.encoding, errors="backslashreplace")


def _drop_output() -> None:
    """Let what could not be written not be tried again when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: object, code: int) -> NoReturn:
    line = " ".join(f"{app.name[0]}: {message}".split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    print(line if len(line) <= 500 else f"{line[:497]}...", file=sys.stderr)
    sys.exit(code)
