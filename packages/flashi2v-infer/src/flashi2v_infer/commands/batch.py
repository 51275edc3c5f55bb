"""The videos that a command was asked for: what each is made from, which are finished, and what they are together.

Nothing here samples: what is finished is read off the files alone, so any number of processes may have made them.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flashi2v_data import read_frames
from flashi2v_data.atomic import check_directory
from flashi2v_data.errors import DecodeError, InputError
from flashi2v_data.loading.transforms import center_crop_resize
from flashi2v_data.video.strips import film_strip
from flashi2v_infer.config import InferenceConfig
from flashi2v_infer.errors import SamplingError
from flashi2v_infer.files.export import (
    Frames,
    check_name,
    check_output,
    check_picture,
    check_spared,
    read_record,
    record_path,
    write_mp4,
    write_picture,
)
from flashi2v_infer.files.inputs import clean_prompt, hash_file, read_pairs
from flashi2v_infer.files.pictures import Pixels, read_image
from flashi2v_infer.files.records import Source, differences, origin
from flashi2v_infer.files.video_grid import video_grid
from flashi2v_infer.settings import Request

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One video.

    Attributes:
        request: what to sample.
        image: (H, W, 3), of the video's size.
        path: of the video.
        origin: the part of its record that is known before the model is loaded.
        strip: where a picture of some of its frames goes, if anywhere.
    """

    request: Request
    image: Pixels
    path: Path
    origin: dict[str, Any]
    strip: Path | None = None


@dataclass(frozen=True)
class Batch:
    """The videos of a command.

    Attributes:
        jobs: those that can be sampled; any subset of them may be, in any order and by any process.
        name: of what is written: the directory of a batch, or the one video.
        directory: of a batch, which gets a grid of all videos; None for one video.
        num_videos: lines of the lists.
        bad_lines: of the list of images, by number from 1, with what is wrong with each.
        image_list: its file.
    """

    jobs: list[Job]
    name: str
    directory: Path | None = None
    num_videos: int = 1
    bad_lines: dict[int, str] = field(default_factory=dict)
    image_list: str = ""

    def describe(self, num_videos: int, num_kept: int | None = None) -> str:
        """Say what is written where, if `num_videos` are sampled; at the end, how many were finished before."""
        if self.directory is None:
            strip = self.jobs[0].strip if num_kept is not None else None
            return self.name + (f" and {strip}" if strip else "")
        kept = f" ({num_kept} had been finished before)" if num_kept else ""
        grid = "" if num_kept is None else " and video_grid.mp4"
        return f"{num_videos} video{'' if num_videos == 1 else 's'}{kept}{grid} to {self.name}"

    def raise_faults(self, missing: Sequence[Job] = ()) -> None:
        """Raise what kept videos from being sampled, if anything did.

        Args:
            missing: jobs whose sampling failed.

        Raises:
            SamplingError: there are some.
            InputError: images could not be used.
        """
        faults = []
        if missing:
            faults.append(f"{', '.join(job.path.name for job in missing)}: sampling failed, see above")
        if self.bad_lines:
            word = "line" if len(self.bad_lines) == 1 else "lines"
            faults.append(
                f"{self.image_list} {word} {', '.join(map(str, self.bad_lines))}: no usable image, see above: fix this "
                "and add --resume to sample only what is missing"
            )
        if faults:
            raise (SamplingError if missing else InputError)("; ".join(faults))


def read_one(request: Request, output: str, strip: Path | None = None) -> Batch:
    """Check the names of files that one video takes, and read its image.

    Args:
        request: what to sample.
        output: the video: .mp4, .gif or .webp, or a directory for its frames.
        strip: a picture of some frames.

    Raises:
        InputError: a name or the image cannot be used.
    """
    path = check_output(output, request.fps, "--output")
    check_spared(path, "--output", request.image)
    if strip is not None:
        check_picture(strip, "--strip")
        check_spared(strip, "--strip", request.image)
    image, contents = read_image(request.image, "--image"), hash_file(request.image)
    image = center_crop_resize(image[None], request.settings.height, request.settings.width)[0]
    return Batch([Job(request, image, path, origin(request, contents), strip)], output)


def read_batch(config: InferenceConfig, source: Source, seed: int | None = None, strips: Path | None = None) -> Batch:
    """Read prompts and images; an image that cannot be used is reported, and only its own video is left out.

    Args:
        config: of inference_model.json.
        source: the model that it describes.
        seed: of the noise, instead of the file's.
        strips: a directory for film strips of the videos.

    Raises:
        InputError: the lists, a prompt or a name cannot be used, or no image can.
    """
    check_name(config.save_path, "save_path")
    directory = Path(config.save_path)
    check_directory(directory, "save_path")
    if strips is not None:
        if strips.suffix == ".png":
            raise InputError(f"--strip: {strips}: of a batch, name a directory, which gets video_0.png, ...")
        check_name(str(strips), "--strip")
        check_directory(strips, "--strip")
    seed = config.seed if seed is None else seed
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
        strip = None if strips is None else strips / f"video_{index}.png"
        if strip is not None:
            check_spared(strip, "--strip", image_path)
        request = Request(
            prompt, image_path, config.negative_prompt, seed, index, fps=config.save_fps, settings=config.sampling
        )
        path = directory / f"video_{index}.mp4"
        jobs.append(Job(request, pixels, path, origin(request, contents, source), strip))
    if not jobs:
        reasons = "; ".join(list(bad_lines.values())[:3])
        more = f"; and {len(bad_lines) - 3} more" if len(bad_lines) > 3 else ""
        raise InputError(f"image: no video can be sampled: {reasons}{more}")
    for reason in bad_lines.values():
        logger.warning("%s: this video is left out", reason)
    return Batch(jobs, config.save_path, directory, len(pairs), bad_lines, config.image)


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


def write_together(batch: Batch) -> list[Job]:
    """Write what shows all videos of a batch: the grid, and film strips; return the jobs that are not finished.

    All of it is drawn from the files, so that a batch that was resumed ends as one that was not.
    """
    assert batch.directory is not None
    jobs = {job.request.index: job for job in batch.jobs}
    missing: list[Job] = []

    def videos() -> Iterator[Frames | None]:
        for index in tqdm(range(batch.num_videos), "grid", leave=False, disable=None):
            job = jobs.get(index)
            frames = None if job is None else read_back(job)
            if job is not None and frames is None:
                missing.append(job)
            elif job is not None and frames is not None and job.strip is not None:
                write_picture(job.strip, film_strip(job.image, frames), read_record(job.path))
            yield frames

    grid = video_grid(videos(), batch.num_videos)
    if grid.size:
        write_mp4(batch.directory / "video_grid.mp4", grid, batch.jobs[0].request.fps)
    return missing
