"""What a run of flashi2v-train says of the model that came of it: its config.json, and the name of its checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydantic

from flashi2v_model.config import Defaults
from flashi2v_model.errors import InputError
from flashi2v_model.weights.checkpoint import checkpoint_directory, is_checkpoint
from flashi2v_model.weights.reading import read_json


@dataclass(frozen=True)
class Run:
    """What is known of a run; nothing of weights that come from elsewhere.

    Attributes:
        defaults: what it was trained for.
        shift: of its noise levels.
        words: a sentence on what it was trained on.
    """

    defaults: Defaults = field(default_factory=Defaults)
    shift: float | None = None
    words: str = ""


def run_of(path: Path) -> Run:
    """Return what is known of the run at `path`, or of the run that a checkpoint there belongs to.

    Raises:
        InputError: its config.json is damaged.
    """
    checkpoint = checkpoint_directory(path)
    file = checkpoint.parent / "config.json"
    if not is_checkpoint(checkpoint) or not file.is_file():
        return Run()
    written = read_json(file)
    data, diffusion = _part(written, "data", "dataset_param"), _part(written, "model", "diffusion")
    given = {
        "num_frames": data.get("sample_num_frames"),
        "height": data.get("sample_height"),
        "width": data.get("sample_width"),
        "fps": data.get("train_fps"),
        "num_inference_steps": diffusion.get("num_inference_steps"),
        "guidance_scale": diffusion.get("guidance_scale"),
    }
    try:
        defaults = Defaults(**given)
    except pydantic.ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        raise InputError(f"{file} is damaged: {key}: {error.errors()[0]['msg']}") from None
    steps = checkpoint.name.removeprefix("iter_")
    source = data.get("metafile_or_dir_path") or data.get("features_path")
    words = f"{int(steps):,} steps" if steps.isdecimal() else ""
    words += f" on `{Path(str(source)).name}`" if source else ""
    shift = diffusion.get("shift")
    return Run(defaults, float(shift) if isinstance(shift, (int, float)) else None, words.strip())


def _part(values: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    for name in names:
        found = values.get(name)
        values = found if isinstance(found, dict) else {}
    return values
