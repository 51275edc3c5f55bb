"""What our transformer does otherwise than diffusers' models: weights and adapters fit exactly or are refused."""

import inspect
import os
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin

from flashi2v_model.errors import InputError
from flashi2v_model.lora import AdapterModel
from flashi2v_model.weights.comparing import FLOATS, fault_phrases
from flashi2v_model.weights.reading import read_state_dict


def constructor_defaults(model: type[Any]) -> dict[str, Any]:
    """Return the defaults of a class's constructor; where that takes `**config`, those of the class above too."""
    defaults: dict[str, Any] = {}
    for cls in model.__mro__:
        if "__init__" in vars(cls):
            parameters = inspect.signature(vars(cls)["__init__"]).parameters.values()
            named = {p.name: p.default for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
            defaults = named | defaults
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
    del defaults["self"]
    return defaults


def known_names(model: type[Any]) -> set[str]:
    """Return the `_class_name`s whose weights a class may load: its own, those that it comes from, and the trunk's."""
    return {"WanTransformer3DModel", *(cls.__name__ for cls in model.__mro__)}


def check_class(where: str, name: Any, model: type[Any]) -> None:
    """Refuse to load the weights of one variant into another.

    Args:
        where: the class is named.
        name: of the class.
        model: that is to be loaded.

    Raises:
        InputError: saying how to name the class.
    """
    if name is not None and name not in known_names(model):
        raise InputError(
            f"{where} is of a {name!r:.60}, and would be loaded as a {model.__name__}, which computes something else: "
            "name its class, by --recipe module:Class or in Python as transformer="
        )


class StrictModel(ModelMixin, AdapterModel):
    """A model of diffusers that loads exactly or not at all."""

    @staticmethod
    def _get_init_keys(input_class: type[Any]) -> set[str]:
        """Let diffusers know a variant's constructor, which hands on what it does not know."""
        return {"self", *constructor_defaults(input_class)}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Load a directory in diffusers' layout or a model of the hub, exactly or not at all.

        Args:
            pretrained_model_name_or_path: the directory or hub id.
            kwargs: as of `diffusers.ModelMixin.from_pretrained`, which warns where this one raises.

        Returns:
            the model in evaluation mode; with `output_loading_info=True` diffusers' report beside it.

        Raises:
            InputError: listing every missing, unexpected and misshapen key; or `ignore_mismatched_sizes` is asked for;
                or the weights are of another variant.
            OSError: there are no weights, or they cannot be read.
        """
        if kwargs.pop("ignore_mismatched_sizes", False):
            raise InputError("ignore_mismatched_sizes would leave weights at random numbers: name weights that fit")
        wants_report = kwargs.pop("output_loading_info", False)
        path = pretrained_model_name_or_path
        # Quantised weights have shapes of their own, which diffusers' quantisers check.
        config = cls.load_config(path, **kwargs)
        check_class(str(path), config.get("_class_name"), cls)
        quantized = {**config, **kwargs}.get("quantization_config") is not None
        # Ignoring them makes diffusers report them all instead of stopping at the first.
        model, report = super().from_pretrained(
            path, output_loading_info=True, ignore_mismatched_sizes=not quantized, **kwargs
        )
        missing = set(report.get("missing_keys", ()))
        misshapen = [(name, tuple(given), tuple(own)) for name, given, own in report.get("mismatched_keys", ())]
        if kwargs.get("device_map") is None:  # which may leave parameters on the disk
            missing |= {name for name, parameter in model.named_parameters() if parameter.is_meta}
        missing -= {name for name, _, _ in misshapen}
        faults = fault_phrases(
            missing=[name for name in model.state_dict() if name in missing],
            unexpected=sorted(report.get("unexpected_keys", ())),
            misshapen=misshapen,
            mistyped=[] if quantized else _mistyped(Path(path, kwargs.get("subfolder") or ""), kwargs.get("variant")),
        )
        if faults:
            raise InputError(f"{path} does not fit the transformer: {'; '.join(faults)}")
        return (model, report) if wants_report else model


def _mistyped(directory: Path, variant: str | None) -> list[tuple[str, torch.dtype]]:
    """Return the tensors of a directory that are no floats of 16 bits or more, which diffusers would cast."""
    if not directory.is_dir():
        return []  # a hub id
    stored = read_state_dict(directory, device="meta", variant=variant)
    return [(name, tensor.dtype) for name, tensor in stored.items() if tensor.dtype not in FLOATS]
