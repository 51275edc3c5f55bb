"""The FlashI2V diffusion transformer, flow matching, encoders and weights."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flashi2v_model.errors import InputError

if TYPE_CHECKING:
    from flashi2v_model.transformer import FlashI2VTransformer3DModel
    from flashi2v_model.weights.conversion import convert_state_dict, load_weights

__version__ = "0.1.0"

__all__ = [
    "FlashI2VTransformer3DModel",
    "InputError",
    "convert_state_dict",
    "load_weights",
]

# Importing diffusers takes seconds, so it waits until something needs it.
_HOMES = {
    "FlashI2VTransformer3DModel": "transformer",
    "convert_state_dict": "weights.conversion",
    "load_weights": "weights.conversion",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
