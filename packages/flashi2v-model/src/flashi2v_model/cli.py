"""`flashi2v-model inspect | convert | init`."""

import sys
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
        a .safetensors or .pt file, or a diffusers directory
    num_heads
        attention heads, where the width is no multiple of 128
    """
    from flashi2v_model import weights

    state_dict = weights.read_state_dict(path)
    layout = weights.detect_layout(state_dict)
    sizes = weights.architecture(weights.convert_state_dict(state_dict, layout), num_heads)
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
    num_heads: int | None = None,
) -> None:
    """Rewrite a model's weights in another published layout.

    Example: flashi2v-model convert flashi2v_1_3B.pt FlashI2V-1.3B/transformer --to diffusers

    Parameters
    ----------
    source
        a .safetensors or .pt file, or a diffusers directory
    destination
        a new directory for diffusers; otherwise a new .safetensors file
    to
        the layout to write
    num_heads
        attention heads, where the width is no multiple of 128
    """
    from safetensors.torch import save_file

    from flashi2v_model import weights

    if destination.exists():
        raise InputError(f"{destination} exists: name a new place, or remove it first")
    if to != "diffusers" and destination.suffix != ".safetensors":
        raise InputError(f"{destination}: the {to} layout is written as one file that ends in .safetensors")
    state_dict = weights.read_state_dict(source)
    temporary = destination.with_name(destination.name + ".incomplete")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    if to == "diffusers":
        weights.as_diffusers_model(state_dict, num_heads).save_pretrained(temporary)
    else:
        converted = weights.convert_state_dict(state_dict, target=to)
        save_file({key: tensor.contiguous() for key, tensor in converted.items()}, temporary)
    temporary.rename(destination)
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

    from flashi2v_model import presets

    if directory.exists():
        raise InputError(f"{directory} exists: name a new directory, or remove it first")
    temporary = directory.with_name(directory.name + ".incomplete")
    torch.manual_seed(seed)
    presets.save(preset, temporary)
    temporary.rename(directory)
    print(f"wrote {directory} ({preset}, random weights)")


def main() -> None:
    """Run the command line; what the user can mend is one line and exit code 2."""
    try:
        app(exit_on_error=False, print_error=False)
    except (CycloptsError, InputError) as error:
        print(f"{app.name[0]}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
