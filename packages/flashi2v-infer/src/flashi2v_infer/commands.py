"""What the two modes of the command line do: a batch from a configuration file, or one video."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flashi2v_data.atomic import check_directory
from flashi2v_data.errors import InputError
from flashi2v_data.transforms import center_crop_resize
from flashi2v_infer.config import InferenceConfig
from flashi2v_infer.execution import Execution
from flashi2v_infer.export import (
    Frames,
    check_output,
    film_strip,
    record_path,
    versions,
    video_grid,
    write_image,
    write_mp4,
    write_record,
)
from flashi2v_infer.inputs import Pixels, clean_prompt, read_image, read_pairs
from flashi2v_infer.load import load_from_config, load_from_pretrained
from flashi2v_infer.pipeline import FlashI2VPipeline
from flashi2v_infer.sample import Sample, sample_video
from flashi2v_infer.settings import Request
from flashi2v_model.config import DType
from flashi2v_model.libraries import quieten


def sample_batch(config: InferenceConfig, device: str | None = None, seed: int | None = None) -> None:
    """Sample every prompt and image of a configuration file into its `save_path`.

    Args:
        config: of inference_model.json.
        device: instead of the file's.
        seed: instead of the file's.

    Raises:
        InputError: anything that the user can mend; found before the model is loaded wherever that is possible.
    """
    directory = Path(config.save_path)
    check_directory(directory, "save_path")
    jobs = _read_jobs(config, config.seed if seed is None else seed)
    quieten()
    pipeline = load_from_config(config, Execution(device=device))
    pipeline.set_progress_bar_config(disable=None)
    model = str(config.predictor.from_pretrained)

    def videos() -> Iterator[Frames]:
        for request, image in jobs:
            sample = sample_video(pipeline, request, image)
            _write(directory / f"video_{request.index}.mp4", pipeline, model, request, sample)
            yield sample.frames

    write_mp4(directory / "video_grid.mp4", video_grid(videos(), len(jobs)), config.save_fps)
    print(f"wrote {len(jobs)} videos and video_grid.mp4 to {directory}")


def _read_jobs(config: InferenceConfig, seed: int) -> list[tuple[Request, Pixels]]:
    crop, jobs = config.crop, []
    for index, (prompt, image_path) in enumerate(read_pairs(config.prompt, config.image)):
        if config.use_prompt_preprocess:
            prompt = clean_prompt(prompt, f"{config.prompt} line {index + 1}")
        image = read_image(image_path, f"{config.image} line {index + 1}")
        cropped = center_crop_resize(
            image[None], *config.data_transform.size, crop.interpolation_mode, crop.antialias, crop.align_corners
        )[0]
        request = Request(
            prompt, image_path, config.negative_prompt, seed, index, fps=config.save_fps, settings=config.sampling
        )
        jobs.append((request, cropped))
    return jobs


def sample_one(
    model: str, request: Request, output: Path, *, strip: Path | None, dtype: DType | None, device: str
) -> None:
    """Sample one video.

    Args:
        model: a pipeline directory, or a hub id.
        request: what to sample.
        output: the video.
        strip: a picture of some frames.
        dtype: of transformer and text encoder; None is bf16 on accelerators and fp32 on the CPU.
        device: as of `flashi2v_npu_ops.device.resolve_device`.

    Raises:
        InputError: anything that the user can mend; found before the model is loaded wherever that is possible.
    """
    check_output(output, ".mp4", "--output")
    if record_path(output).exists() and not output.exists():
        raise InputError(f"--output: {record_path(output)} exists, where the video's record would go: choose another")
    if strip is not None:
        check_output(strip, ".png", "--strip")
    image = read_image(request.image, "--image")
    image = center_crop_resize(image[None], request.settings.height, request.settings.width)[0]
    quieten()
    pipeline = load_from_pretrained(model, Execution(device=device, dtype=dtype))
    pipeline.set_progress_bar_config(disable=None)

    sample = sample_video(pipeline, request, image)
    _write(output, pipeline, model, request, sample)
    if strip is not None:
        write_image(strip, film_strip(image, sample.frames))
    print(f"wrote {output}" + (f" and {strip}" if strip else ""))


def _write(path: Path, pipeline: FlashI2VPipeline, model: str, request: Request, sample: Sample) -> None:
    record: dict[str, Any] = {
        **asdict(request),
        "first_frame_psnr": round(sample.first_frame_psnr, 2),
        "vae_psnr": round(sample.vae_psnr, 2),
        "model": model,
        "dtype": str(pipeline.transformer.dtype).removeprefix("torch."),
        "device": str(pipeline.device),
        "versions": versions(),
    }
    write_mp4(path, sample.frames, request.fps, record)
    write_record(path, record)
