"""Building the pipeline from a configuration file or from a directory in diffusers' layout."""

import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import AutoencoderKLWan
from transformers import UMT5EncoderModel

from flashi2v_data.captions.tokenizer import load_model
from flashi2v_data.errors import InputError
from flashi2v_infer.config import InferenceConfig
from flashi2v_infer.execution import Execution
from flashi2v_infer.model_index import check_model_index
from flashi2v_infer.pipeline import FlashI2VPipeline
from flashi2v_infer.placement import home, place
from flashi2v_model import FlashI2VTransformer3DModel, load_weights
from flashi2v_model.config import PredictorConfig, check_pretrained
from flashi2v_model.encoders import DTYPES, load_pretrained, load_text_encoder, load_vae
from flashi2v_model.errors import named
from flashi2v_model.layers import use_fused_rms_norm
from flashi2v_model.parallel import check_degree
from flashi2v_model.scheduler import make_scheduler
from flashi2v_model.variants import transformer_class
from flashi2v_model.weights.reading import check_directory, weight_files
from flashi2v_npu_ops import UnsupportedError
from flashi2v_npu_ops.device import claim_device, resolve_device
from flashi2v_npu_ops.registry import check_environment

logger = logging.getLogger(__name__)

_AS_THE_FILE_SAYS = Execution()


def find_device(name: str, *, claim: bool = False) -> torch.device:
    """Return the device called `name`; `claim` makes it this process's own (`device.claim_device`).

    Raises:
        InputError: this machine lacks it; the message says how to choose another.
        flashi2v_npu_ops.UnsupportedError: FLASHI2V_OPS_BACKEND makes no sense on it.
    """
    try:
        device = claim_device(name) if claim else resolve_device(name)
    except UnsupportedError as error:
        raise InputError(f'{error}; or choose another: "device": "auto" in the file, or --device auto') from None
    check_environment(device.type)
    return device


def settled_device(execution: Execution, file: str = "auto") -> torch.device:
    """Return the device to compute on; `file` is what a configuration file says.

    Raises:
        InputError: this machine lacks it, or the execution makes no sense on it.
    """
    device = find_device(execution.device or file)
    execution.check_device(device.type)
    return device


def load_from_config(
    config: InferenceConfig, execution: Execution = _AS_THE_FILE_SAYS, context: dist.ProcessGroup | None = None
) -> FlashI2VPipeline:
    """Build the pipeline that a configuration file describes.

    Args:
        config: of inference_model.json.
        execution: how to compute; what it leaves open is as the file says.
        context: the processes that share each video.

    Raises:
        InputError: parts do not fit each other, the tokenizer is missing or damaged, or the device is.
        flashi2v_model.InputError: another part is missing or damaged.
    """
    device = settled_device(execution, config.device)
    where = home(execution, device)
    config = settled_config(config, execution)
    predictor, encoder, ae = config.predictor, config.text_encoder, config.ae
    check_degree(execution.context_parallel_size, predictor.num_heads)
    if device.type == "cpu" and predictor.dtype not in ("fp32", "float32"):
        logger.warning("%s is slow on most CPUs: set predictor.dtype to fp32", predictor.dtype)
    for note in predictor.notes():
        logger.info(note)
    transformer = _load_transformer(predictor, where, transformer_class(execution.recipe))
    tokenizer = _load_tokenizer(config.tokenizer.from_pretrained)
    text_encoder = load_text_encoder(encoder, where)
    vae = load_vae(ae, where)
    for ours, theirs, what in (
        (predictor.text_dim, text_encoder.config.d_model, "predictor.text_dim is {}, the text encoder's is {}"),
        (predictor.in_dim, vae.config.z_dim, "predictor.in_dim is {}, the VAE has {} latent channels"),
    ):
        if ours != theirs:
            raise InputError(what.format(ours, theirs))
    pipeline = FlashI2VPipeline(
        tokenizer,
        text_encoder,
        vae,
        transformer,
        make_scheduler(config.diffusion.scheduler, config.diffusion.shift),
        use_attention_mask=encoder.use_attention_mask,
    )
    place(pipeline, execution, device, context)
    return pipeline


def settled_config(config: InferenceConfig, execution: Execution) -> InferenceConfig:
    """Return the configuration with the dtypes that the execution asks for instead of the file's."""
    dtypes = {
        "predictor": execution.dtype or config.predictor.dtype,
        "text_encoder": execution.dtype or config.text_encoder.dtype,
        "ae": execution.settled_vae_dtype(config.ae.dtype),
    }
    # Of the two names of one dtype always the same, as records are compared.
    names = {part: "fp32" if dtype == "float32" else dtype for part, dtype in dtypes.items()}
    parts = {part: getattr(config, part).model_copy(update={"dtype": name}) for part, name in names.items()}
    return config.model_copy(update=parts)


def check_parts(config: InferenceConfig) -> None:
    """Refuse a part that is not there; none is read.

    Raises:
        InputError: the tokenizer is missing.
        flashi2v_model.InputError: another part is.
    """
    assert config.predictor.from_pretrained is not None
    weight_files(Path(config.predictor.from_pretrained))
    check_pretrained(config.text_encoder.from_pretrained, "text_encoder.from_pretrained")
    check_pretrained(config.ae.from_pretrained, "ae.from_pretrained")
    _check_tokenizer(config.tokenizer.from_pretrained)


def load_from_pretrained(
    model: str, execution: Execution = _AS_THE_FILE_SAYS, context: dist.ProcessGroup | None = None
) -> FlashI2VPipeline:
    """Load a whole pipeline, every part strictly.

    Args:
        model: a directory in diffusers' layout, or a hub id.
        execution: how to compute.
        context: the processes that share each video.

    Raises:
        InputError: there is no such directory, it holds no whole pipeline, or there is no such device.
        flashi2v_model.InputError: a part's weights are not those of the part.
    """
    directory = check_model(model)
    if directory is not None:
        with named("--model"):
            check_model_index(directory)
            for name in ("tokenizer", "scheduler"):
                if (directory / name).is_dir():
                    check_directory(directory / name)
    device = settled_device(execution)
    where = home(execution, device)
    dtype = DTYPES[execution.settled_dtype(device.type)]

    def part(cls: Any, name: str, dtype: torch.dtype) -> Any:
        loaded = load_pretrained(cls, model, "--model", dtype, where, subfolder=name)
        return loaded.requires_grad_(False).eval()

    parts = {
        "transformer": part(transformer_class(execution.recipe), "transformer", dtype),
        "text_encoder": part(UMT5EncoderModel, "text_encoder", dtype),
        "vae": part(AutoencoderKLWan, "vae", DTYPES[execution.settled_vae_dtype()]),
    }
    try:
        pipeline = FlashI2VPipeline.from_pretrained(model, **parts)
    except Exception as error:  # whatever the libraries raise on what they cannot read
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise InputError(f"--model: cannot load {model}: {reason}") from error
    place(pipeline, execution, device, context)
    return pipeline


def check_model(model: str) -> Path | None:
    """Return the pipeline's directory, or None for what has the form of a hub id.

    Raises:
        InputError: it is neither.
    """
    path = Path(model)
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise InputError(f"--model: {model} holds no model_index.json, so it is no pipeline in diffusers' layout")
        return path
    if path.exists() or path.is_absolute() or model.startswith(".") or model.count("/") != 1:
        raise InputError(f"--model: no directory {model!r}: give one in diffusers' layout, or a hub id (owner/name)")
    return None


def _load_transformer(
    config: PredictorConfig, device: torch.device, network: type[FlashI2VTransformer3DModel]
) -> FlashI2VTransformer3DModel:
    with torch.device("meta"):  # random start values of a large model would take minutes
        transformer = network(**config.transformer_arguments())
    use_fused_rms_norm(transformer, config.use_fused_rmsnorm)
    cast(transformer, DTYPES[config.dtype])
    assert config.from_pretrained is not None
    load_weights(transformer, config.from_pretrained)  # the file's own tensors, so that there is no second copy
    return transformer.to(device).requires_grad_(False).eval()


def cast(transformer: FlashI2VTransformer3DModel, dtype: torch.dtype) -> None:
    """Set dtypes as `from_pretrained` does: some parameters stay in fp32, so that both ways of loading are equal."""
    for name, parameter in transformer.named_parameters():
        kept = any(part in transformer._keep_in_fp32_modules for part in name.split("."))
        parameter.data = parameter.data.to(torch.float32 if kept else dtype)


def _check_tokenizer(path: str) -> None:
    if not Path(path).is_dir():
        raise InputError(f"tokenizer.from_pretrained: no directory {path!r}")


def _load_tokenizer(path: str) -> Any:
    _check_tokenizer(path)
    with named("tokenizer.from_pretrained"):
        check_directory(Path(path))
    return load_model(path, "tokenizer.from_pretrained")
