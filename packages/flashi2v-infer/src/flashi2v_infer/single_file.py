"""A pipeline from one file: the transformer is the file's, other parts are given, or lie in a directory."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders import FromSingleFileMixin

from flashi2v_data.captions.tokenizer import load_model
from flashi2v_data.errors import InputError
from flashi2v_infer.defaults import FILE, directory_of
from flashi2v_model import FlashI2VTransformer3DModel
from flashi2v_model.config import DiffusionConfig
from flashi2v_model.encoders import load_pretrained, text_encoder_class
from flashi2v_model.scheduler import euler_scheduler
from flashi2v_model.weights.reading import read_json

DTypes = torch.dtype | Mapping[str, torch.dtype] | None


class SingleFileMixin(FromSingleFileMixin):
    """A pipeline that loads from a file of its transformer."""

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path: str | os.PathLike[str],
        *,
        config: str | os.PathLike[str] | None = None,
        num_heads: int | None = None,
        quantization_config: Any = None,
        dtype: DTypes = None,
        torch_dtype: DTypes = None,
        **parts: Any,
    ) -> Any:
        """Load the transformer of one file, and the parts around it; no code or pickle of either is run.

        Args:
            pretrained_model_link_or_path: as of `FlashI2VTransformer3DModel.from_single_file`.
            config: a pipeline's directory, a hub id, or "demo", which the other parts come from; or a directory with
                `vae`, `text_encoder` and `tokenizer`, such as Wan2.1-T2V-1.3B-Diffusers: these then meet the released
                model's sampler.
            num_heads: as of `FlashI2VTransformer3DModel.from_single_file`; the config may say it too.
            quantization_config: likewise.
            dtype: of all parts, or by their names with one for "default", as of `from_pretrained`. None: the
                transformer's as stored, the others' fp32.
            torch_dtype: an older name of it.
            parts: parts of the pipeline, and other arguments of its constructor, in place of the config's.

        Raises:
            InputError: the weights are not those of one whole transformer, or fit no such config; a part is missing.
        """
        known, options = cls._get_signature_keys(cls)
        if unknown := sorted({*parts} - ({*known, *options} - {"transformer"})):
            taken = ", ".join(sorted({*known} - {"transformer"}))
            raise InputError(f"from_single_file: {', '.join(unknown)} cannot be given, only config, dtype and {taken}")
        dtype = dtype or torch_dtype
        directory = directory_of(os.fspath(config)) if config is not None else None
        has_settings = directory is not None and (directory / "transformer" / "config.json").is_file()
        transformer = FlashI2VTransformer3DModel.from_single_file(
            pretrained_model_link_or_path,
            config=directory if has_settings else None,
            subfolder="transformer" if has_settings else None,
            num_heads=num_heads,
            quantization_config=quantization_config,
            dtype=_of_part("transformer", dtype),
        )
        if directory is None:
            if missing := sorted({"vae", "scheduler"} - parts.keys()):
                raise InputError(f"from_single_file: give config=DIRECTORY, or the pipeline's {', '.join(missing)}")
            return cls(**{"tokenizer": None, "text_encoder": None, **parts, "transformer": transformer})
        if not directory.is_dir() or _is_pipeline(directory):
            return cls.from_pretrained(str(directory), transformer=transformer, torch_dtype=dtype, **parts)
        return cls(**_around(directory, dtype, parts), transformer=transformer)


def _of_part(name: str, dtype: DTypes) -> torch.dtype | None:
    return dtype.get(name, dtype.get("default")) if isinstance(dtype, Mapping) else dtype


def _is_pipeline(directory: Path) -> bool:
    file = directory / FILE
    return file.is_file() and read_json(file).get("_class_name") != "WanPipeline"


def _around(directory: Path, dtype: DTypes, parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts that are given, the encoders of a directory, and the released model's sampler."""
    found = dict(parts)
    for name, cls in (("vae", AutoencoderKLWan), ("text_encoder", text_encoder_class(directory / "text_encoder"))):
        if name not in found:
            own = _of_part(name, dtype) or torch.float32
            if not (directory / name / "config.json").is_file():
                raise InputError(f"config: {directory} holds no {name}")
            found[name] = load_pretrained(cls, str(directory), "config", own, torch.device("cpu"), subfolder=name)
    if "tokenizer" not in found:
        found["tokenizer"] = load_model(str(directory / "tokenizer"), "config")
    found.setdefault("scheduler", euler_scheduler(DiffusionConfig(model_id="flow_matching").shift))
    return found
