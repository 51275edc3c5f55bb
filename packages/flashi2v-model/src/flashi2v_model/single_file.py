"""A transformer from one file of weights: any published layout, and GGUF by diffusers' own loader."""

import os
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders import FromOriginalModelMixin
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from torch import Tensor

from flashi2v_model.errors import InputError

# Parts that read the dtype that they compute in off their weights, or have no layer for quantised ones: kept whole.
_WHOLE = ("patch_embedding", "fourier_embedding", "learnable_proj", "condition_embedder", "proj_out")


class OriginalModel(FromOriginalModelMixin):
    """A model of diffusers that loads from one file, exactly or not at all."""

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path_or_dict: str | os.PathLike[str] | dict[str, Tensor],
        *,
        config: str | os.PathLike[str] | None = None,
        subfolder: str | None = None,
        num_heads: int | None = None,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        quantization_config: Any = None,
    ) -> Any:
        """Load one file of weights; its sizes are read off it, and no code or pickle of it is run.

        Args:
            pretrained_model_link_or_path_or_dict: a `.safetensors`, `.pt`, `.pth`, `.bin` or `.gguf` file in any
                published layout, under any prefix and beside other parts; or such weights.
            config: a directory whose config.json says what weights do not tell.
            subfolder: of that directory.
            num_heads: number of attention heads, if no config.json or header says it and heads are not 128 wide.
            dtype: of the weights; None: as they are stored, and for GGUF what it computes in.
            torch_dtype: an older name of it.
            device: where to; None: the CPU.
            quantization_config: diffusers' `GGUFQuantizationConfig`, for a `.gguf`.

        Raises:
            InputError: there is no such file, or its weights are not those of one whole transformer; every missing,
                unexpected and misshapen key is listed.
        """
        from flashi2v_model.weights.conversion import as_model, convert_state_dict  # which know this class
        from flashi2v_model.weights.reading import read_state_dict
        from flashi2v_model.weights.writing import independent

        given, dtype = pretrained_model_link_or_path_or_dict, dtype or torch_dtype
        where = None if config is None else Path(config, subfolder or "")
        is_gguf = not isinstance(given, dict) and Path(given).suffix == ".gguf"
        if (quantization_config is not None) != is_gguf:
            raise InputError(
                f"{'weights' if isinstance(given, dict) else given}: give "
                "quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=...) with a .gguf file, and only so"
            )
        if is_gguf:
            assert not isinstance(given, dict)
            return cls._from_gguf(Path(given), quantization_config, where, num_heads, dtype, device)
        path = Path("") if isinstance(given, dict) else Path(given)
        ours = convert_state_dict(given if isinstance(given, dict) else read_state_dict(path))
        arguments = _arguments(path, ours, where, num_heads)
        model = as_model(independent(ours), arguments, cls)
        for name, parameter in model.named_parameters():
            kept = any(part in model._keep_in_fp32_modules for part in name.split("."))
            parameter.data = parameter.data.to(device, torch.float32 if kept and dtype else dtype)
        return model.requires_grad_(False).eval()

    @classmethod
    def _from_gguf(
        cls,
        path: Path,
        quantization_config: Any,
        where: Path | None,
        num_heads: int | None,
        dtype: torch.dtype | None,
        device: str | torch.device | None,
    ) -> Any:
        from flashi2v_model.weights.conversion import convert_state_dict
        from flashi2v_model.weights.key_names import detect_layout, is_trunk, translate
        from flashi2v_model.weights.reading import without_prefix

        weights = without_prefix(path, _read_gguf(path))
        shapes = {name: torch.empty(_shape(tensor), device="meta") for name, tensor in weights.items()}
        ours = convert_state_dict(shapes)  # refuses what is not one transformer
        if is_trunk(ours):
            raise InputError(f"{path}: these are weights of a text-to-video trunk, without FlashI2V's new layers")
        arguments = _arguments(path, ours, where, num_heads)
        names = translate(weights, detect_layout(weights), "diffusers")
        whole = [*(quantization_config.modules_to_not_convert or []), *_WHOLE]
        quantization_config.modules_to_not_convert = whole
        # diffusers looks for the class among its own.
        setattr(diffusers, cls.__name__, cls)
        SINGLE_FILE_LOADABLE_CLASSES.setdefault(cls.__name__, {"checkpoint_mapping_fn": _as_it_is})
        with tempfile.TemporaryDirectory() as directory:
            with torch.device("meta"):
                cls(**arguments).save_config(directory)
            return super().from_single_file(
                {names[name]: tensor for name, tensor in weights.items()},
                config=directory,
                quantization_config=quantization_config,
                torch_dtype=dtype,
                device=device,
            )


def _arguments(path: Path, ours: dict[str, Tensor], where: Path | None, num_heads: int | None) -> dict[str, Any]:
    """Return the model's constructor arguments, by its weights and what is written beside them, or in a directory."""
    from flashi2v_model.weights.conversion import model_arguments
    from flashi2v_model.weights.settings import contradictions, stored_settings

    file, said = ("", {}) if where is None else stored_settings(where)
    if where is not None and not file:
        raise InputError(f"config: {where} holds no config.json of such a transformer")
    arguments, assumed = model_arguments(path, ours, num_heads or said.get("num_attention_heads"))
    arguments |= {key: said[key] for key in assumed if key in said}
    if faults := contradictions(file, said, arguments, "the weights have"):
        raise InputError(f"config: {'; '.join(faults)}")
    return arguments


def _as_it_is(checkpoint: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
    return checkpoint


def _read_gguf(path: Path) -> dict[str, Tensor]:
    from diffusers.models.model_loading_utils import load_gguf_checkpoint

    if not path.is_file():
        raise InputError(f"{path} is {'no regular file' if path.exists() else 'not there'}")
    try:
        tensors: dict[str, Tensor] = load_gguf_checkpoint(path)
    except ImportError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:  # whatever the reader raises on damaged bytes
        raise InputError(f"{path} is damaged, or no GGUF: {' '.join(str(error).split())[:200]}") from error
    return tensors


def _shape(tensor: Tensor) -> tuple[int, ...]:
    """Return the shape of the numbers that a tensor of a GGUF file stands for."""
    if (kind := getattr(tensor, "quant_type", None)) is None:
        return tuple(tensor.shape)
    from diffusers.quantizers.gguf.utils import GGML_QUANT_SIZES, _quant_shape_from_byte_shape

    block, size = GGML_QUANT_SIZES[kind]
    return tuple(_quant_shape_from_byte_shape(tuple(tensor.shape), size, block))
