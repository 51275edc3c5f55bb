"""Weights on disk: read, compared, renamed from one published layout to another, loaded, written.

`read_state_dict` takes whatever holds weights, `convert_state_dict` gives them the names of a layout, `load_weights`
fills a model, exactly or not at all, `write_file` writes one file.
"""

from typing import TYPE_CHECKING

from flashi2v_model.lazy import public_names

if TYPE_CHECKING:
    from flashi2v_model.weights.comparing import compare
    from flashi2v_model.weights.conversion import (
        architecture,
        as_model,
        convert_state_dict,
        load_weights,
        model_arguments,
    )
    from flashi2v_model.weights.key_names import LAYOUTS, NEW_LAYERS, detect_layout, translate
    from flashi2v_model.weights.reading import read_state_dict, weight_files
    from flashi2v_model.weights.writing import write_file

__all__ = [
    "LAYOUTS",
    "NEW_LAYERS",
    "architecture",
    "as_model",
    "compare",
    "convert_state_dict",
    "detect_layout",
    "load_weights",
    "model_arguments",
    "read_state_dict",
    "translate",
    "weight_files",
    "write_file",
]

__getattr__, __dir__ = public_names(
    __name__,
    {
        name: f"{__name__}.{module}"
        for module, names in {
            "comparing": ("compare",),
            "conversion": ("architecture", "as_model", "convert_state_dict", "load_weights", "model_arguments"),
            "key_names": ("LAYOUTS", "NEW_LAYERS", "detect_layout", "translate"),
            "reading": ("read_state_dict", "weight_files"),
            "writing": ("write_file",),
        }.items()
        for name in names
    },
)
