"""What the two modes of the command line do: a batch from a configuration file, or one video."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flashi2v_data.atomic import check_directory
from flashi2v_data.errors import InputError
from flashi2v_data.transforms import center_crop_resize
from flashi2v_infer.batch import Batch, Job, read_batch, unfinished, write_together
from flashi2v_infer.config import InferenceConfig
from flashi2v_infer.errors import SamplingError
from flashi2v_infer.export import check_output, check_picture, save_video, write_picture
from flashi2v_infer.inputs import hash_file, read_image
from flashi2v_infer.layout import film_strip
from flashi2v_infer.load import find_device, load_from_config, load_from_pretrained
from flashi2v_infer.pipeline import FlashI2VPipeline
from flashi2v_infer.records import Source, fingerprint, origin, versions
from flashi2v_infer.sample import Sample, Sampler
from flashi2v_infer.settings import Request
from flashi2v_model.encoders import DTYPES
from flashi2v_model.libraries import quieten

logger = logging.getLogger(__name__)


def sample_batch(
    config: InferenceConfig,
    device: str | None = None,
    seed: int | None = None,
    *,
    resume: bool = False,
    strips: Path | None = None,
) -> None:
    """Sample every prompt and image of a configuration file into its `save_path`.

    Args:
        config: of inference_model.json.
        device: instead of the file's.
        seed: instead of the file's.
        resume: leave videos alone that are finished.
        strips: a directory for film strips of the videos.

    Raises:
        InputError: anything that the user can mend; found before the model is loaded wherever that is possible. At
            the end where some images could not be used: the other videos are written then.
        SamplingError: at the end where some videos could not be sampled.
    """
    if strips is not None:
        if strips.suffix == ".png":
            raise InputError(f"--strip: {strips}: of a batch, name a directory, which gets video_0.png, ...")
        check_directory(strips, "--strip")
    batch = read_batch(config, config.seed if seed is None else seed)
    jobs = unfinished(batch.jobs) if resume else batch.jobs
    if jobs:
        torch_device = find_device(device or config.device)
        quieten()
        pipeline = load_from_config(config, torch_device)
        try:
            sample_jobs(pipeline, jobs)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the same command with --resume goes on from here") from None
    _report(batch, jobs, write_together(batch, strips))


def sample_jobs(pipeline: FlashI2VPipeline, jobs: Sequence[Job]) -> None:
    """Sample some videos of a batch into their files; one that fails is reported, and costs only itself."""
    sampler = Sampler(pipeline)
    with tqdm(total=len(jobs), desc="videos", unit="video", disable=None, smoothing=0) as bar:
        for job in jobs:
            _show_steps(pipeline, job.path.stem)
            try:
                sample = sampler(job.request, job.image)
            except FloatingPointError as error:
                logger.error("%s: %s", job.path.name, error)
            else:
                save_video(job.path, sample.frames, job.request.fps, _record(pipeline, job.origin, sample))
            bar.update()


def _report(batch: Batch, sampled: Sequence[Job], missing: Sequence[Job]) -> None:
    num_there = len(batch.jobs) - len(missing)
    num_kept = len(batch.jobs) - len(sampled)
    if num_there:
        kept = f" ({num_kept} had been finished before)" if num_kept else ""
        print(f"wrote {_videos(num_there - num_kept)}{kept} and video_grid.mp4 to {batch.directory}")
    faults = []
    if missing:
        names = ", ".join(job.path.name for job in missing)
        faults.append(f"{names}: sampling failed, see above")
    if batch.bad_lines:
        lines = ", ".join(map(str, batch.bad_lines))
        word = "line" if len(batch.bad_lines) == 1 else "lines"
        faults.append(
            f"{batch.image_list} {word} {lines}: no usable image, see above: mend this and add --resume to sample only "
            "what is missing"
        )
    if faults:
        raise (SamplingError if missing else InputError)("; ".join(faults))


def _videos(number: int) -> str:
    return f"{number} video{'' if number == 1 else 's'}"


def sample_one(
    model: str, request: Request, output: str, *, strip: Path | None, dtype: str | None, device: str
) -> None:
    """Sample one video.

    Args:
        model: a pipeline directory, or a hub id.
        request: what to sample.
        output: the video: .mp4, .gif or .webp, or a directory for its frames.
        strip: a picture of some frames.
        dtype: of transformer and text encoder; None is bf16 on accelerators and fp32 on the CPU.
        device: as of `flashi2v_npu_ops.device.resolve_device`.

    Raises:
        InputError: anything that the user can mend; found before the model is loaded wherever that is possible.
        SamplingError: sampling ended in NaN or infinity.
    """
    path = check_output(output, request.fps, "--output")
    if strip is not None:
        check_picture(strip, "--strip")
    image, contents = read_image(request.image, "--image"), hash_file(request.image)
    image = center_crop_resize(image[None], request.settings.height, request.settings.width)[0]
    torch_device = find_device(device)
    quieten()
    dtype = dtype or ("fp32" if torch_device.type == "cpu" else "bf16")
    pipeline = load_from_pretrained(model, DTYPES[dtype], torch_device)
    source = Source(model, {"dtype": dtype}, {"pipeline": fingerprint(model)})

    _show_steps(pipeline, path.name)
    try:
        sample = Sampler(pipeline)(request, image)
    except FloatingPointError as error:
        raise SamplingError(str(error)) from None
    record = _record(pipeline, origin(request, contents, source), sample)
    save_video(path, sample.frames, request.fps, record)
    if strip is not None:
        write_picture(strip, film_strip(image, sample.frames), record)
    print(f"wrote {output}" + (f" and {strip}" if strip else ""))


def _show_steps(pipeline: FlashI2VPipeline, name: str) -> None:
    pipeline.set_progress_bar_config(disable=None, desc=name, unit="step", leave=False)


def _record(pipeline: FlashI2VPipeline, origin: dict[str, Any], sample: Sample) -> dict[str, Any]:
    return {
        **origin,
        "first_frame_psnr": round(sample.first_frame_psnr, 2),
        "vae_psnr": round(sample.vae_psnr, 2),
        "dtype": str(pipeline.transformer.dtype).removeprefix("torch."),
        "device": str(pipeline._execution_device),
        "versions": versions(),
    }
