"""Calibrate the model in a directory on pictures with captions, and store what was found beside its transformer."""

from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLWan, SchedulerMixin
from diffusers.video_processor import VideoProcessor
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm
from transformers import AutoTokenizer

from flashi2v_model.config import SPATIAL_STRIDE, TEMPORAL_STRIDE, Defaults, DType
from flashi2v_model.encoders import DTYPES, encode_text, encode_video, load_pretrained, text_encoder_class
from flashi2v_model.errors import InputError
from flashi2v_model.speed.calibration import FILE, Calibration, as_text
from flashi2v_model.speed.measuring import Start, calibrate
from flashi2v_model.transformer import FlashI2VTransformer3DModel
from flashi2v_model.weights.fingerprint import fingerprint
from flashi2v_model.weights.reading import read_json
from flashi2v_model.weights.writing import appearing_whole
from flashi2v_npu_ops import route_conv3d

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler", "DPMSolverMultistepScheduler")
_LARGEST_PICTURE = 2**26  # pixels


def find_pairs(folder: Path) -> list[tuple[Path, str]]:
    """Return the pictures of a folder, each with what the text file of its name says, by name.

    Raises:
        InputError: there are fewer than two, or one lacks its text.
    """
    if not folder.is_dir():
        raise InputError(f"--pictures: no folder {folder}")
    pictures = sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURES and file.is_file())
    if len(pictures) < 2:
        raise InputError(f"--pictures {folder}: holds {len(pictures)} pictures ({', '.join(PICTURES)}): give 2 or more")
    found = []
    for picture in pictures:
        text = picture.with_suffix(".txt")
        caption = text.read_text(encoding="utf-8", errors="replace")[:10_000].strip() if text.is_file() else ""
        if not caption:
            raise InputError(
                f"--pictures: {picture.name} needs a prompt: write what happens into {text.name} beside it"
            )
        found.append((picture, caption))
    return found


def calibrate_directory(
    directory: Path,
    pairs: Sequence[tuple[Path, str]],
    *,
    num_steps: int | None = None,
    guidance_scale: float | None = None,
    device: torch.device,
    dtype: DType,
    batch: int = 1,
) -> Calibration:
    """Calibrate the pipeline in a directory, and write `calibration.json` beside its transformer.

    Args:
        directory: in diffusers' layout.
        pairs: pictures and prompts.
        num_steps: of the runs; None: the model's default, or 50.
        guidance_scale: of the runs, above 1; None: the model's default where that is above 1, or 5.
        device: where to compute.
        dtype: of transformer and text encoder.
        batch: videos at once.

    Raises:
        InputError: the directory holds no whole pipeline, or a picture cannot be read.
        StorageError: the file cannot be written.
    """
    index = _index(directory)
    defaults = Defaults.model_validate(index.get("defaults") or {})
    network = _part(FlashI2VTransformer3DModel, directory, "transformer", dtype, device)
    scheduler = _scheduler(directory)
    if network.conditioning_names:
        raise InputError(
            f"{directory}: a variant that asks for {', '.join(network.conditioning_names)} has no pictures"
        )
    usual = defaults.guidance_scale or 0.0
    strength = guidance_scale or (usual if usual > 1 else 5.0)
    steps = num_steps or max(defaults.num_inference_steps or 0, 50)
    size = (defaults.num_frames or 49, defaults.height or 480, defaults.width or 832)
    starts = list(_starts(directory, index, network, pairs, size, defaults, device, dtype, batch))
    found = calibrate(
        network,
        scheduler,
        tqdm(starts, "calibrate", unit="batch", disable=None),
        steps,
        strength,
        weights=fingerprint(directory / "transformer"),
        made_from="{} pictures, {} frames of {}x{}, torch {}, diffusers {}".format(
            len(pairs), *size, version("torch"), version("diffusers")
        ),
    )
    with appearing_whole(directory / "transformer" / FILE) as file:
        file.write_text(as_text(found))
    return found


def _index(directory: Path) -> dict[str, Any]:
    file = directory / "model_index.json"
    if not file.is_file():
        raise InputError(f"{directory} holds no model_index.json, so it is not a pipeline in diffusers' layout")
    return read_json(file)


def _part(cls: Any, directory: Path, name: str, dtype: DType, device: torch.device) -> Any:
    loaded = load_pretrained(cls, str(directory), name, DTYPES[dtype], device, subfolder=name)
    return loaded.requires_grad_(False).eval()


def _scheduler(directory: Path) -> SchedulerMixin:
    config = read_json(directory / "scheduler" / "scheduler_config.json")
    name = str(config.get("_class_name"))
    if name not in _SCHEDULERS:
        raise InputError(f"{directory}: its scheduler {name} cannot be calibrated: use one of {', '.join(_SCHEDULERS)}")
    made: SchedulerMixin = getattr(diffusers, name).from_config(config)
    return made


@torch.no_grad()
def _starts(
    directory: Path,
    index: dict[str, Any],
    network: FlashI2VTransformer3DModel,
    pairs: Sequence[tuple[Path, str]],
    size: tuple[int, int, int],
    defaults: Defaults,
    device: torch.device,
    dtype: DType,
    batch: int,
) -> Iterator[Start]:
    """Encode pictures and prompts; what encodes them is let go of at the end."""
    frames, height, width = size
    vae = _part(AutoencoderKLWan, directory, "vae", "fp32", device)
    route_conv3d(vae, skips_zeros=True)
    encoder = _part(text_encoder_class(directory / "text_encoder"), directory, "text_encoder", dtype, device)
    tokenizer = AutoTokenizer.from_pretrained(directory / "tokenizer")
    processor = VideoProcessor(vae_scale_factor=SPATIAL_STRIDE)

    def texts(prompts: list[str]) -> torch.Tensor:
        length = network.config.text_len
        tokens = tokenizer(prompts, max_length=length, padding="max_length", truncation=True, return_tensors="pt")
        use_mask = bool(index.get("use_attention_mask", True))
        return encode_text(encoder, tokens.input_ids.to(device), tokens.attention_mask, use_mask=use_mask)

    grid = ((frames - 1) // TEMPORAL_STRIDE + 1, height // SPATIAL_STRIDE, width // SPATIAL_STRIDE)
    ratio = defaults.low_freq_energy_ratio
    for first in range(0, len(pairs), batch):
        some = pairs[first : first + batch]
        pictures = [
            processor.preprocess(_read(file), height=height, width=width, resize_mode="crop") for file, _ in some
        ]
        noise = [
            torch.randn(network.config.in_channels, *grid, generator=torch.Generator().manual_seed(first + i))
            for i in range(len(some))
        ]
        yield Start(
            torch.stack(noise).to(device),
            encode_video(vae, torch.cat(pictures)[:, :, None].to(device)),
            texts([caption for _, caption in some]),
            texts([""] * len(some)),
            0.1 if ratio is None else ratio,
        )


def _read(file: Path) -> Image.Image:
    try:
        with Image.open(file) as image:
            if image.width * image.height > _LARGEST_PICTURE:
                raise InputError(f"--pictures: {file.name} has {image.width}x{image.height} pixels: make it smaller")
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise InputError(f"--pictures: {file.name} cannot be read: {error}") from None
