"""`flashi2v-model inspect | convert | init`."""

import io
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from cyclopts import App, CycloptsError

import flashi2v_model
from flashi2v_model.errors import InputError, StorageError

if TYPE_CHECKING:
    from torch import Tensor

    from flashi2v_model import FlashI2VTransformer3DModel

_TRUNK = " (text-to-video trunk, without the layers of FlashI2V)"
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
    from flashi2v_model.variants import transformer_class
    from flashi2v_model.weights import detect_layout, read_state_dict, weight_files
    from flashi2v_model.weights.checkpoint import checkpoint_directory, has_ema, is_checkpoint
    from flashi2v_model.weights.key_names import is_trunk
    from flashi2v_model.weights.settings import stored_settings

    if (adapter := find_adapter(path)) is not None:
        _print_facts(describe(adapter))
        return
    network = transformer_class(recipe)
    stored_settings(path, network)  # refuses another variant before its weights are looked at
    state_dict = read_state_dict(path, device="meta")
    layout = detect_layout(state_dict)
    _, arguments, assumed = _understood(path, state_dict, "diffusers", network, num_heads)
    files = weight_files(path)
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state_dict.values()})
    trunk = is_trunk(state_dict)
    facts: dict[str, object] = {
        "layout": layout + (_TRUNK if trunk else ""),
        "parameters": f"{sum(tensor.numel() for tensor in state_dict.values()):,} in {', '.join(dtypes)}",
        "size": f"{sum(file.stat().st_size for file in files) / 1e9:,.3f} GB in {len(files)} file(s)",
    }
    checkpoint = checkpoint_directory(path)
    if is_checkpoint(checkpoint):
        facts["size"] = f"{facts['size']}, the whole checkpoint"
        facts["checkpoint"] = checkpoint.name
        kept = "kept (convert takes it; --weights raw takes the raw weights)"
        facts["moving average"] = kept if has_ema(checkpoint) else "not kept: raw weights only"
    for name, value in arguments.items():
        if not (trunk and name in _OF_NEW_LAYERS):
            facts[name] = (
                f"{value}{'  (assumed: neither the weights nor a config.json say)' if name in assumed else ''}"
            )
    _print_facts(facts)
    if layout == "main" and arguments["conv3x3x3_proj"]:
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
    from flashi2v_model import FlashI2VTransformer3DModel
    from flashi2v_model.adapter_choice import read_choices
    from flashi2v_model.adapter_commands import check_spelling, find_adapter, merged, write_adapter
    from flashi2v_model.encoders import DTYPES
    from flashi2v_model.presets import save_pipeline
    from flashi2v_model.variants import transformer_class
    from flashi2v_model.weights import as_model, convert_state_dict, read_state_dict, write_file
    from flashi2v_model.weights.checkpoint import checkpoint_directory, is_checkpoint
    from flashi2v_model.weights.key_names import is_trunk
    from flashi2v_model.weights.libraries import quieten
    from flashi2v_model.weights.runs import run_of
    from flashi2v_model.weights.settings import stored_settings, unusual
    from flashi2v_model.weights.trained_adapters import merged_run
    from flashi2v_model.weights.writing import TORCH_SUFFIXES, independent

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
        with _appearing_whole(destination) as temporary:
            write_adapter(adapter, temporary, to, ema=ema)
        print(f"wrote {destination} (LoRA adapter, {to})")
        return
    adapters = read_choices(lora or ())
    _check_destination(destination, to)
    _check_directory_options(to, encoders, shift, max_shard_size)
    quieten()
    is_variant = (network := transformer_class(recipe)) is not FlashI2VTransformer3DModel
    stored_settings(source, network)  # refuses another variant before its weights are looked at
    stored = read_state_dict(source, ema=ema) if adapter is None else merged_run(adapter, ema=ema)
    ours, arguments, assumed = _understood(source, stored, to, network, num_heads)
    ours = merged(ours, adapters)
    if dtype is not None:
        for key in ours:  # one by one, so that there is no second copy of all
            ours[key] = ours[key].to(DTYPES[dtype])
    if to == "diffusers":
        model = as_model(independent(ours), arguments, network)
        with _appearing_whole(destination) as temporary:
            if encoders is None:
                model.save_pretrained(temporary, max_shard_size=max_shard_size or "10GB")
            else:
                run = run_of(source)
                save_pipeline(
                    model,
                    temporary,
                    encoders,
                    max_shard_size=max_shard_size or "10GB",
                    shift=run.shift if shift is None else shift,
                    defaults=run.defaults,
                    trained_on=run.words,
                )
    else:
        converted = convert_state_dict(ours, "diffusers", to)
        with _appearing_whole(destination) as temporary:
            write_file(converted, temporary, {k: v for k, v in arguments.items() if k not in assumed})
    print(f"wrote {destination}{_TRUNK if is_trunk(ours) and not is_variant else ''}")
    if to == "diffusers" and assumed:
        values = (f"{key} {arguments[key]}" for key in assumed)
        print(f"assumed, as neither the weights nor a config.json say: {', '.join(values)}")
    if destination.suffix in TORCH_SUFFIXES and (found := unusual(arguments)):
        print(f"a {destination.suffix} carries no settings: set {', '.join(found)} where you load it")


def _understood(
    path: Path,
    state_dict: dict[str, "Tensor"],
    to: str,
    network: "type[FlashI2VTransformer3DModel]",
    num_heads: int | None,
) -> tuple[dict[str, "Tensor"], dict[str, Any], list[str]]:
    """Return weights under diffusers' names, the network's arguments, and which of them are assumed.

    Args:
        path: the weights'.
        state_dict: as they are stored.
        to: the layout that they are for.
        network: their class.
        num_heads: as the user says.

    Raises:
        InputError: these are not the weights of such a network, or the layout has no place for them.
    """
    from flashi2v_model import FlashI2VTransformer3DModel
    from flashi2v_model.weights import convert_state_dict, model_arguments
    from flashi2v_model.weights.conversion import check_variant_layout, variant_arguments

    if network is not FlashI2VTransformer3DModel:
        check_variant_layout(state_dict, to, network)
        return state_dict, variant_arguments(path, network), []
    ours = convert_state_dict(state_dict)
    return ours, *model_arguments(path, ours, num_heads)


def _check_destination(destination: Path, to: str) -> None:
    from flashi2v_model.weights.key_names import LAYOUTS
    from flashi2v_model.weights.writing import TORCH_SUFFIXES

    if to not in LAYOUTS:
        raise InputError(f"--to {to} is a spelling of LoRA adapters: a model is written as {', '.join(LAYOUTS)}")
    is_file = destination.suffix in (".safetensors", *TORCH_SUFFIXES)
    if to != "diffusers" and not is_file:
        raise InputError(f"{destination}: the {to} layout is written as one file that ends in .safetensors or .pt")
    if to == "diffusers" and is_file:
        raise InputError(f"{destination}: the diffusers layout is a directory: name one without {destination.suffix}")


def _check_directory_options(to: str, encoders: Path | None, shift: float | None, max_shard_size: str | None) -> None:
    if to != "diffusers" and (encoders is not None or max_shard_size is not None):
        raise InputError("--encoders and --max-shard-size are of a directory, which is always --to diffusers")
    if shift is not None and (encoders is None or not 0 < shift < float("inf")):
        raise InputError(f"--shift is a positive number, of a pipeline, so together with --encoders; got {shift}")
    if max_shard_size is not None and not re.fullmatch(r"\d+(\.\d+)?[KMGT]B", max_shard_size.upper()):
        raise InputError(f"--max-shard-size is a number with KB, MB, GB or TB, such as 5GB; got {max_shard_size}")


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

    if directory.exists():
        raise InputError(f"{directory} exists: name a new directory, or remove it first")
    if not 0 <= seed < 2**63:
        raise InputError(f"--seed is a number from 0 to {2**63 - 1}, got {seed}")
    libraries.quieten()
    torch.manual_seed(seed)
    with _appearing_whole(directory) as temporary:
        presets.init(preset, temporary)
    print(f"wrote {directory} ({preset}, random weights)")


@contextmanager
def _appearing_whole(path: Path) -> Iterator[Path]:
    """Yield a place to write a file or directory, which gets its name when the block succeeds."""
    from safetensors import SafetensorError

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as directory:
            temporary = Path(directory) / path.name
            yield temporary
            # safetensors makes files that only their owner can read; these get the permissions of any new file.
            (usual := Path(directory) / "usual").touch()
            for file in (temporary, *temporary.rglob("*.safetensors")):
                if file.is_file():
                    file.chmod(usual.stat().st_mode)
            temporary.rename(path)
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise StorageError(f"cannot write ({reason}): {path}") from error


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
