"""The FlashI2V diffusion transformer, flow matching, encoders and weights."""

from typing import TYPE_CHECKING

from flashi2v_model.errors import InputError
from flashi2v_model.lazy import public_names

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

__getattr__, __dir__ = public_names(
    __name__,
    {
        "FlashI2VTransformer3DModel": "flashi2v_model.transformer",
        "convert_state_dict": "flashi2v_model.weights.conversion",
        "load_weights": "flashi2v_model.weights.conversion",
    },
)
