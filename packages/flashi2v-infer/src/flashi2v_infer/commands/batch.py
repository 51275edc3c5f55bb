"""The videos of a configuration file: what each is made from, which are finished, and what they are together.

Nothing here samples: what is finished is read off the files alone, so any number of processes may have made them.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flashi2v_data import read_frames
from flashi2v_data.atomic import check_directory
from flashi2v_data.errors import DecodeError, InputError
from flashi2v_data.loading.transforms import center_crop_resize
from flashi2v_data.video.strips import film_strip
from flashi2v_infer.config import InferenceConfig
from flashi2v_infer.files.export import Frames, check_name, read_record, record_path, write_mp4, write_picture
from flashi2v_infer.files.inputs import clean_prompt, hash_file, read_pairs
from flashi2v_infer.files.pictures import Pixels, read_image
from flashi2v_infer.files.records import Source, differences, origin
from flashi2v_infer.files.video_grid import video_grid
from flashi2v_infer.settings import Request
from flashi2v_model.weights.fingerprint import fingerprint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One video of a batch.

    Attributes:
        request: what to sample.
        image: (H, W, 3), of the video's size.
        path: of the video.
        origin: the part of its record that is known before sampling.
    """

    request: Request
    image: Pixels
    path: Path
    origin: dict[str, Any]


@dataclass(frozen=True)
class Batch:
    """All videos of a configuration file.

    Attributes:
        directory: where they go.
        jobs: those that can be sampled; any subset of them may be, in any order and by any process.
        num_videos: lines of the lists.
        bad_lines: of the list of images, by number from 1, with what is wrong with each.
        image_list: its file.
    """

    directory: Path
    jobs: list[Job]
    num_videos: int
    bad_lines: dict[int, str]
    image_list: str


def read_batch(config: InferenceConfig, seed: int, vae_tiling: bool | None = None, recipe: str | None = None) -> Batch:
    """Read prompts and images; an image that cannot be used costs its own video only, and is reported.

    Args:
        config: of inference_model.json, settled.
        seed: of the noise.
        vae_tiling: as of `Execution`: where it was asked for, tiles are a setting like others; a choice by the free
            memory is in the records too, and compared with nothing.
        recipe: as of `Execution`.

    Raises:
        InputError: the lists or a prompt cannot be used, or no image can.
    """
    check_name(config.save_path, "save_path")
    directory = Path(config.save_path)
    check_directory(directory, "save_path")
    source = _source(config, vae_tiling, recipe)
    pictures: dict[str, tuple[Pixels, str]] = {}  # many videos may start with one image
    jobs: list[Job] = []
    bad_lines: dict[int, str] = {}
    pairs = read_pairs(config.prompt, config.image)
    for index, (prompt, image_path) in enumerate(pairs):
        if config.use_prompt_preprocess:
            prompt = clean_prompt(prompt, f"{config.prompt} line {index + 1}")
        try:
            if image_path not in pictures:
                pictures[image_path] = _read_picture(config, image_path, f"{config.image} line {index + 1}")
        except InputError as error:
            bad_lines[index + 1] = str(error)
            continue
        pixels, contents = pictures[image_path]
        request = Request(
            prompt, image_path, config.negative_prompt, seed, index, fps=config.save_fps, settings=config.sampling
        )
        jobs.append(Job(request, pixels, directory / f"video_{index}.mp4", origin(request, contents, source)))
    if not jobs:
        reasons = "; ".join(list(bad_lines.values())[:3])
        more = f"; and {len(bad_lines) - 3} more" if len(bad_lines) > 3 else ""
        raise InputError(f"image: no video can be sampled: {reasons}{more}")
    for reason in bad_lines.values():
        logger.warning("%s: this video is left out", reason)
    return Batch(directory, jobs, len(pairs), bad_lines, config.image)


def _read_picture(config: InferenceConfig, path: str, where: str) -> tuple[Pixels, str]:
    image, resize = read_image(path, where), config.data_transform.crop_resize
    cropped = center_crop_resize(
        image[None],
        *config.data_transform.size,
        resize.interpolation_mode,
        resize.antialias,
        resize.align_corners,
    )[0]
    return cropped, hash_file(path)


def _source(config: InferenceConfig, vae_tiling: bool | None, recipe: str | None) -> Source:
    predictor = str(config.predictor.from_pretrained)
    parts = {
        "predictor": predictor,
        "ae": config.ae.from_pretrained,
        "text_encoder": config.text_encoder.from_pretrained,
        "tokenizer": config.tokenizer.from_pretrained,
    }
    settings = {**config.model_settings, "vae_tiling": vae_tiling, "network": {"recipe": recipe} if recipe else {}}
    return Source(predictor, settings, {part: fingerprint(path) for part, path in parts.items()})


def unfinished(jobs: Sequence[Job]) -> list[Job]:
    """Return the jobs whose videos are still to be sampled.

    A video is finished when the file and its record are whole and were made from what the job would be made from.

    Raises:
        InputError: a file that stands in the way was made from something else.
    """
    conflicts = [conflict for job in jobs for conflict in _conflicts(job)]
    if conflicts:
        more = f" (and {len(conflicts) - 1} more such files)" if len(conflicts) > 1 else ""
        raise InputError(
            f"--resume: {conflicts[0]}{more}: set save_path to another directory, restore the settings, or remove "
            "what is there"
        )
    missing = [job for job in tqdm(jobs, "finished?", leave=False, disable=None) if read_back(job) is None]
    for job in missing:
        if job.path.exists():
            logger.warning("%s is not whole, or lacks its record: it is sampled again", job.path)
    return missing


def _conflicts(job: Job) -> list[str]:
    """Say what is neither this job's nor merely damaged, in at most one line."""
    for path in (record_path(job.path), job.path):
        if not path.exists():
            continue
        try:
            found = differences(read_record(path), job.origin)
        except InputError as error:
            return [str(error)]
        except DecodeError:
            continue
        if found:
            return [f"{path} was made from something else: {'; '.join(found)}"]
    return []


def read_back(job: Job) -> Frames | None:
    """Return the frames of a finished video, (T, H, W, 3); None where it is not finished."""
    try:
        for path in (record_path(job.path), job.path):
            if not path.exists() or differences(read_record(path), job.origin):
                return None
        frames = read_frames(job.path, range(job.request.settings.num_frames))
    except (InputError, DecodeError):
        return None
    return frames if frames.shape[1:] == job.image.shape else None


def strip_path(strips: Path, index: int) -> Path:
    """Return where a video's film strip goes."""
    return strips / f"video_{index}.png"


def write_together(batch: Batch, strips: Path | None = None) -> list[Job]:
    """Write what shows all videos: the grid, and on request film strips; return the jobs that are not finished.

    Args:
        batch: its videos lie in their files.
        strips: a directory for film strips.
    """
    jobs = {job.request.index: job for job in batch.jobs}
    missing: list[Job] = []

    def videos() -> Iterator[Frames | None]:
        for index in tqdm(range(batch.num_videos), "grid", leave=False, disable=None):
            job = jobs.get(index)
            frames = None if job is None else read_back(job)
            if job is not None and frames is None:
                missing.append(job)
            if job is not None and frames is not None and strips is not None:
                write_picture(strip_path(strips, index), film_strip(job.image, frames), job.origin)
            yield frames

    grid = video_grid(videos(), batch.num_videos)
    if grid.size:
        write_mp4(batch.directory / "video_grid.mp4", grid, batch.jobs[0].request.fps)
    return missing
