"""`flashi2v-model inspect | convert | init`."""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from cyclopts import App, CycloptsError

import flashi2v_model
from flashi2v_model.errors import InputError

app = App(
    name="flashi2v-model",
    help="""Look into, convert and create FlashI2V models.

    Example: flashi2v-model inspect flashi2v_1_3B.pt
    """,
    help_format="plaintext",
    version=flashi2v_model.__version__,
)


@app.command
def inspect(path: Path, *, num_heads: int | None = None) -> None:
    """Print a model's layout, architecture and size.

    Example: flashi2v-model inspect flashi2v_1_3B.pt

    Parameters
    ----------
    path
        a .safetensors or .pt file, a diffusers directory, or a run of flashi2v-train
    num_heads
        attention heads, where neither a config.json nor a width of 128 per head tells them
    """
    from flashi2v_model import weights

    state_dict = weights.read_state_dict(path)
    layout = weights.detect_layout(state_dict)
    sizes = weights.sizes_of(path, weights.convert_state_dict(state_dict, layout), num_heads)
    new_layers = any(key.startswith(weights.NEW_LAYERS) for key in state_dict)
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state_dict.values()})
    print(f"layout      {layout}{'' if new_layers else ' (text-to-video trunk, without the layers of FlashI2V)'}")
    print(f"parameters  {sum(tensor.numel() for tensor in state_dict.values()):,} in {', '.join(dtypes)}")
    for name, value in sizes.items():
        print(f"{name:<20} {value}")


@app.command
def convert(
    source: Path,
    destination: Path,
    *,
    to: Literal["diffusers", "wan", "npu", "main"],
    weights: Literal["ema", "raw"] = "ema",
    encoders: Path | None = None,
    num_heads: int | None = None,
) -> None:
    """Rewrite a model's weights in another published layout, or turn a training run into a model.

    Examples: flashi2v-model convert flashi2v_1_3B.pt FlashI2V-1.3B/transformer --to diffusers

    flashi2v-model convert runs/first my-model --to diffusers --encoders Wan2.1-T2V-1.3B-Diffusers

    Parameters
    ----------
    source
        a .safetensors or .pt file, a diffusers directory, or a run of flashi2v-train (its newest checkpoint)
    destination
        a new directory for diffusers; otherwise a new .safetensors file
    to
        the layout to write
    weights
        of a run: the moving average where it kept one, or the raw weights
    encoders
        a directory with vae, text_encoder and tokenizer: write a whole pipeline that flashi2v-infer --model takes
    num_heads
        attention heads, where neither a config.json nor a width of 128 per head tells them
    """
    from safetensors.torch import save_file

    from flashi2v_model import libraries, presets
    from flashi2v_model import weights as layouts
    from flashi2v_model.checkpoint import checkpoint_directory, is_checkpoint

    if destination.exists():
        raise InputError(f"{destination} exists: name a new place, or remove it first")
    if to != "diffusers" and destination.suffix != ".safetensors":
        raise InputError(f"{destination}: the {to} layout is written as one file that ends in .safetensors")
    if to != "diffusers" and encoders is not None:
        raise InputError("--encoders makes a pipeline, which is always --to diffusers")
    if weights == "raw" and not is_checkpoint(checkpoint_directory(source)):
        raise InputError(f"--weights raw is for a run of flashi2v-train, which {source} is not")
    libraries.quieten()
    state_dict = layouts.read_state_dict(source, ema=weights == "ema")
    with _appearing_whole(destination) as temporary:
        if to == "diffusers":
            state_dict = layouts.convert_state_dict(state_dict)
            model = layouts.as_model(state_dict, layouts.sizes_of(source, state_dict, num_heads))
            if encoders is None:
                model.save_pretrained(temporary)
            else:
                presets.save_pipeline(model, temporary, encoders)
        else:
            converted = layouts.convert_state_dict(state_dict, target=to)
            save_file({key: tensor.contiguous() for key, tensor in converted.items()}, temporary)
    print(f"wrote {destination}")


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

    from flashi2v_model import libraries, presets

    if directory.exists():
        raise InputError(f"{directory} exists: name a new directory, or remove it first")
    libraries.quieten()
    torch.manual_seed(seed)
    with _appearing_whole(directory) as temporary:
        presets.save(preset, temporary)
    print(f"wrote {directory} ({preset}, random weights)")


@contextmanager
def _appearing_whole(path: Path) -> Iterator[Path]:
    """Yield a place to write a file or directory, which gets its name when the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as directory:
        temporary = Path(directory) / path.name
        yield temporary
        temporary.rename(path)


def main() -> None:
    """Run the command line; what the user can mend is one line and exit code 2."""
    try:
        app(exit_on_error=False, print_error=False)
    except (CycloptsError, InputError) as error:
        print(f"{app.name[0]}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
