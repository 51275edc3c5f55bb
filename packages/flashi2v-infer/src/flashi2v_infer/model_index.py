"""What the model_index.json of a pipeline directory may name: the classes of a FlashI2V pipeline, and no others.

diffusers imports and calls what the file names: nothing of it is handed on before it was held against what is known.
"""

from pathlib import Path
from typing import Any

import diffusers
import transformers
from diffusers import AutoencoderKLWan, SchedulerMixin
from transformers import PreTrainedTokenizerBase, T5EncoderModel, UMT5EncoderModel

from flashi2v_data.errors import InputError
from flashi2v_infer.defaults import FILE, KEY, checked
from flashi2v_model import FlashI2VTransformer3DModel
from flashi2v_model.weights.reading import read_json

# Of each part, the libraries by name, and the class that it is, or is derived from.
_LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
_PARTS: dict[str, tuple[tuple[str, ...], tuple[type, ...]]] = {
    "transformer": (("flashi2v_model.transformer", "flashi2v_model"), (FlashI2VTransformer3DModel,)),
    "text_encoder": (("transformers",), (UMT5EncoderModel, T5EncoderModel)),
    "tokenizer": (("transformers",), (PreTrainedTokenizerBase,)),
    "vae": (("diffusers",), (AutoencoderKLWan,)),
    "scheduler": (("diffusers",), (SchedulerMixin,)),
}


def check_model_index(directory: Path, pipeline: str = "FlashI2VPipeline") -> None:
    """Refuse a pipeline directory that is of another pipeline, or names classes or brings code that are not known.

    Args:
        directory: in diffusers' layout.
        pipeline: the class that is to be loaded.

    Raises:
        InputError: naming the part; or the file cannot be read.
    """
    file = directory / FILE
    index = read_json(file)
    if index.get("_class_name") not in ("FlashI2VPipeline", pipeline):
        raise InputError(f"{file} is of a {_short(index.get('_class_name'))}, not of a FlashI2VPipeline")
    for part, entry in index.items():
        if part in _PARTS:
            if entry != [None, None]:
                _check_part(file, part, entry)
        elif part == KEY:
            checked(entry, file)
        elif isinstance(entry, (list, dict)) and not part.startswith("_"):
            raise InputError(f"{file} names {part}, a part that a FlashI2V pipeline does not have")
    if missing := [part for part in _PARTS if part not in index]:
        raise InputError(f"{file} does not name {', '.join(missing)}")


def _check_part(file: Path, part: str, entry: Any) -> None:
    if class_of(part, entry) is None:
        libraries, bases = _PARTS[part]
        known = " or ".join(base.__name__ for base in bases)
        raise InputError(
            f"{file}: {part} is to be loaded as {_short(entry)}, of which nothing is run: "
            f"it must be a {known} of {' or '.join(libraries)}"
        )
    # Some versions of diffusers take a file of this name for the library.
    if (code := file.parent / part / f"{entry[0]}.py").exists():
        raise InputError(f"{code} is code, which is never run: remove it")


def class_of(part: str, entry: Any) -> type | None:
    """Return the class that the entry of a part names, (library, name), if it is one that the part may be of."""
    libraries, bases = _PARTS[part]
    library, name = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
    if library not in libraries or not isinstance(name, str):
        return None
    own = {base.__name__: base for base in bases}
    found = getattr(_LIBRARIES[library], name, None) if library in _LIBRARIES else own.get(name)
    return found if isinstance(found, type) and issubclass(found, bases) else None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
