"""What a model directory says of the size and the numbers that it was trained for, in its model_index.json."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from flashi2v_data.errors import InputError
from flashi2v_data.settings import read_values, validate
from flashi2v_infer import demo
from flashi2v_infer.settings import Request, SamplingSettings
from flashi2v_model.config import Defaults

FILE, KEY = "model_index.json", "defaults"


def checked(values: Any, where: object) -> Defaults:
    """Return defaults as they are written.

    Args:
        values: of the key, or None.
        where: they are written.

    Raises:
        InputError: they are malformed; one line that names `where`, the key and what to change.
    """
    if values is None:
        return Defaults()
    if not isinstance(values, Mapping):
        raise InputError(f"{where}: {KEY} must be an object such as {{'num_frames': 49}}, got {str(values)[:80]!r}")
    found: Defaults = validate(dict(values), Defaults, f"{where}: {KEY}")
    try:
        settings_of(found)
    except InputError as error:
        raise InputError(f"{where}: {KEY}: {error}") from None
    return found


def read_defaults(model: str, *, fetch: bool = False) -> Defaults:
    """Return the defaults of a pipeline.

    Args:
        model: a directory, a hub id, or "demo".
        fetch: the model_index.json of a hub id; where there is none to be had, loading says why.

    Raises:
        InputError: they are malformed.
    """
    file = directory_of(model) / FILE
    if not file.is_file() and fetch and model.count("/") == 1 and not Path(model).exists():
        file = _fetched(model) or file
    if not file.is_file():
        return Defaults()
    index = read_values(file)
    return checked(index.get(KEY) if isinstance(index, dict) else None, file)


def _fetched(model: str) -> Path | None:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model, FILE))
    except Exception:  # whatever a connection or the hub's answer may be
        return None


def directory_of(model: str) -> Path:
    """Return where a model of this name is; "demo" is the one that comes with the package."""
    return demo.DIRECTORY if model == demo.NAME else Path(model)


def settings_of(defaults: Defaults, **given: Any) -> SamplingSettings:
    """Return the numbers of a run: those given, else the model's defaults, else those of the released 1.3B model.

    Raises:
        InputError: a number cannot be used.
    """
    names = {field.name for field in fields(SamplingSettings)}
    known = {name: value for name, value in defaults.model_dump(exclude_none=True).items() if name in names}
    return SamplingSettings(**known | {name: value for name, value in given.items() if value is not None})


def fps_of(defaults: Defaults) -> float:
    """Return the frames per second that a model was trained for, else those of the release."""
    return defaults.fps or Request.fps


def scale_of(model: str, settings: SamplingSettings) -> int:
    """Return how many times a model's video is enlarged for its file, where nobody says so."""
    return demo.scale_of(settings.height, settings.width) if model == demo.NAME else 1


def remark(defaults: Defaults, settings: SamplingSettings) -> str | None:
    """Say that a run has another size than the model was trained for, or nothing."""
    trained = (defaults.num_frames, defaults.height, defaults.width)
    asked = (settings.num_frames, settings.height, settings.width)
    if None in trained or trained == asked:
        return None
    return "sampling {} frames of {}x{}, the model was trained for {} of {}x{}".format(*asked, *trained)
