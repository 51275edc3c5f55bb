"""Videos as files, each with the record of how it was made. T frames, H W height and width."""

import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from flashi2v_data.atomic import atomic_directory, atomic_file, check_directory
from flashi2v_data.console import machine_fault
from flashi2v_data.errors import DecodeError, InputError, StorageError
from flashi2v_data.video.pictures import UNDECODABLE, opened
from flashi2v_data.video.write import write_video
from flashi2v_infer.files.pictures import AnyImage, as_pixels
from flashi2v_infer.settings import check_text

Frames = NDArray[np.uint8]
AnyVideo = Sequence[AnyImage] | Sequence[Sequence[AnyImage]] | NDArray[np.generic] | Tensor
Record = Mapping[str, Any]

SUFFIXES = (".mp4", ".gif", ".webp")

# GIF counts in hundredths of a second, and browsers slow down what is shown for less than two of them.
_GIF_TICK, _GIF_MAX_FPS = 10, 50
_WEBP_TICK, _WEBP_MAX_FPS = 1, 1000
_NAME, _FIRST = "frame_{:04d}.png", "frame_0000.png"
_LONGEST_NAME, _LONGEST_PATH = 230, 3800  # bytes; of 255 and 4096
_LARGEST_RECORD = 2**23  # bytes; a record takes some kB
_ASCII = b"ASCII\0\0\0"  # how EXIF says which text a user's comment is


def enlarged(frames: Frames, scale: int) -> Frames:
    """Return frames (T, H, W, 3) so many times as large, smoothly."""
    if scale == 1:
        return frames
    size = (frames.shape[2] * scale, frames.shape[1] * scale)
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS)) for frame in frames])


def check_output(text: str, fps: float, option: str) -> Path:
    """Refuse a name that could not be written, before hours of sampling rather than after.

    Args:
        text: a file .mp4, .gif or .webp, or a directory for frames, which ends in "/" or has no suffix.
        fps: frames per second that the file is to have.
        option: that gave `text`.

    Raises:
        InputError: naming `option`.
    """
    check_name(text, option)
    path = Path(text)
    is_directory = text.endswith(("/", "\\")) or not path.suffix
    if is_directory:
        if path.suffix in SUFFIXES or path.name in SUFFIXES:
            raise InputError(f"{option}: {text} is a directory by its form and a {path.suffix or path.name} by its end")
        if path.name in ("", ".."):
            raise InputError(f"{option}: {text!r} has no name: name a new directory for the frames")
        # It will be put in place by renaming, which replaces nothing but an empty directory.
        if path.is_symlink() or path.is_file() or (path.is_dir() and any(path.iterdir())):
            what = "is a link" if path.is_symlink() else "is a file" if path.is_file() else "exists and is not empty"
            raise InputError(f"{option}: {text} {what}: name another directory for the frames")
        check_directory(path.parent, option)
        return path
    if path.suffix not in SUFFIXES:
        raise InputError(f"{option}: {text} must end in .mp4, .gif or .webp, or in / for a directory of PNGs")
    fastest = {".gif": _GIF_MAX_FPS, ".webp": _WEBP_MAX_FPS}.get(path.suffix, fps)
    if fps > fastest:
        raise InputError(f"--fps: {path.suffix} shows at most {fastest} frames per second, got {fps:g}")
    _check_file(path, option)
    beside = record_path(path)
    if beside.exists():
        try:
            read_record(beside)
        except InputError as error:
            raise InputError(f"{option}: {error}: the video's record would go there; choose another name") from None
    return path


def check_name(text: str, option: str) -> None:
    """Refuse a name under which no file could be written, on this machine or at all.

    Raises:
        InputError: naming `option`.
    """
    check_text(text, option)
    if "\0" in text:
        raise InputError(f"{option}: no file's name holds the character 0: {text!r}")
    if "://" in text:
        raise InputError(f"{option}: {text} is an address: name a file or directory of this machine")
    # What is written goes first under a longer name beside it, and its record beside that.
    try:
        whole = os.fsencode(os.path.abspath(text))
    except OSError:
        raise InputError(f"{option}: {text}: the working directory is gone") from None
    if len(whole) > _LONGEST_PATH or any(len(part) > _LONGEST_NAME for part in whole.split(b"/")):
        raise InputError(
            f"{option}: the name is too long, of at most {_LONGEST_NAME} bytes, and {_LONGEST_PATH} with its "
            f"directories: {text}"
        )


def check_picture(path: Path, option: str) -> None:
    """Refuse a picture that could not be written.

    Raises:
        InputError: naming `option`, it does not end in .png, or its directory cannot be written to.
    """
    check_name(str(path), option)
    if path.suffix != ".png":
        raise InputError(f"{option}: {path} must end in .png")
    _check_file(path, option)


def check_spared(path: Path, option: str, image: str) -> None:
    """Refuse to write over the very image that a video is made from.

    Raises:
        InputError: naming `option`.
    """
    if path.exists() and Path(image).exists() and path.samefile(image):
        raise InputError(f"{option}: {path} is the image itself, which would be lost: choose another name")


def _check_file(path: Path, option: str) -> None:
    if path.exists() and not path.is_file():
        what = "a directory" if path.is_dir() else "a pipe or a device"
        raise InputError(f"{option}: {path} is {what}: name a file")
    check_directory(path.parent, option)


def record_path(video: Path) -> Path:
    """Return where a video's record lies: a.json for a.mp4, a.gif.json for a.gif, frames/record.json for frames."""
    if video.suffix == ".mp4":
        return video.with_suffix(".json")
    return video.with_name(f"{video.name}.json") if video.suffix in SUFFIXES else video / "record.json"


def save_video(path: str | Path, frames: AnyVideo, fps: float, record: Record | None = None) -> None:
    """Write a video, and then its record beside it: a record stands for a whole video, whenever a run is killed.

    Args:
        path: .mp4, .gif or .webp; without a suffix a new directory for PNGs.
        frames: as `as_frames` takes them; H and W even.
        fps: frames per second.
        record: how the video was made; it also goes into the file itself. None writes the video alone.

    Raises:
        InputError: frames, fps or the name cannot be used.
        flashi2v_data.errors.StorageError: it cannot be written whole; nothing of it stays.
    """
    path, pixels = Path(path), as_frames(frames)
    if path.suffix not in SUFFIXES:
        write_frames(path, pixels, record)
        return
    with _storing(path):
        record_path(path).unlink(missing_ok=True)
        if path.suffix == ".mp4":
            write_mp4(path, pixels, fps, record)
        else:
            (_write_gif if path.suffix == ".gif" else _write_webp)(path, pixels, fps, record)
        if record is not None:
            with atomic_file(record_path(path)) as file:
                _write_record(file, record)


def as_frames(video: AnyVideo) -> Frames:
    """Return one video as (T, H, W, 3), uint8.

    Args:
        video: a list of T images; an array (T, H, W, 3) or a tensor (T, 3, H, W), uint8 or floats in [0, 1]; or a batch
            of one of these, as the pipeline returns it.

    Raises:
        InputError: it is something else, or holds several videos.
    """
    if len(video) == 1 and (isinstance(video[0], (list, tuple)) or getattr(video[0], "ndim", 0) == 4):
        video = video[0]  # type: ignore[assignment]
    if isinstance(video, np.ndarray) and video.dtype == np.uint8:
        return np.asarray(video, np.uint8)
    is_list = isinstance(video, (list, tuple)) and len(video) > 0 and not isinstance(video[0], (list, tuple))
    if is_list or (isinstance(video, (np.ndarray, Tensor)) and video.ndim == 4):
        return np.stack([as_pixels(frame, "a frame") for frame in video])  # type: ignore[arg-type]
    raise InputError(
        "one video is needed, as a list of images, an array (T, H, W, 3) or a tensor (T, 3, H, W): of a batch give "
        "one, frames[0] for example"
    )


@contextmanager
def _storing(path: Path) -> Iterator[None]:
    """Say in one line what keeps a file from being written: a full disk, a directory that was removed."""
    try:
        yield
    except OSError as error:
        # Pillow's encoders have a number of their own.
        reason = machine_fault(error) if error.errno else f"is the disk full? {error}"
        raise StorageError(f"{reason}: cannot write {path}") from error


def _write_record(path: Path, record: Record) -> None:
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_mp4(path: str | Path, frames: AnyVideo, fps: float, record: Record | None = None) -> None:
    """Write a video, with `record` as JSON in its comment; the file appears only when whole.

    Args:
        path: ends in .mp4.
        frames: as `as_frames` takes them; H and W even.
        fps: frames per second.
        record: what made the video: prompt, seed, settings, versions.

    Raises:
        InputError: frames, fps or the name cannot be used.
        flashi2v_data.errors.StorageError: it cannot be written whole; nothing of it stays.
    """
    comment = {"comment": json.dumps(record, ensure_ascii=False)} if record else None
    path = Path(path)
    with _storing(path):
        write_video(path.absolute(), as_frames(frames), fps, comment)  # FFmpeg reads "12:30.mp4" as an address


def _write_gif(path: Path, frames: Frames, fps: float, record: Record | None) -> None:
    # One palette for all frames: with one for each, still surfaces would flicker.
    sample = frames[np.unique(np.linspace(0, len(frames) - 1, 8).round().astype(int))]
    palette = Image.fromarray(np.concatenate(list(sample))).quantize(256, Image.Quantize.MEDIANCUT)
    pictures = [
        Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for frame in frames
    ]
    comment = {"comment": json.dumps(record).encode("ascii")} if record else {}
    _write_animation(path, pictures, durations(len(frames), fps, _GIF_TICK), comment)


def _write_webp(path: Path, frames: Frames, fps: float, record: Record | None) -> None:
    exif = Image.Exif()
    if record:
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = _ASCII + json.dumps(record).encode("ascii")
    pictures = [Image.fromarray(frame) for frame in frames]
    _write_animation(path, pictures, durations(len(frames), fps, _WEBP_TICK), {"quality": 90, "exif": exif})


def _write_animation(path: Path, pictures: list[Image.Image], milliseconds: list[int], options: Record) -> None:
    first, *others = pictures
    with atomic_file(path) as file:
        first.save(file, save_all=True, append_images=others, duration=milliseconds, loop=0, **options)


def write_frames(path: Path, frames: Frames, record: Record | None = None) -> None:
    """Write frame_0000.png, frame_0001.png, ... and record.json into a new directory, which appears only when whole."""
    with _storing(path), atomic_directory(path) as directory:
        for number, frame in enumerate(frames):
            _write_png(directory / _NAME.format(number), Image.fromarray(frame), record)
        if record is not None:
            _write_record(record_path(directory), record)


def write_picture(path: Path, picture: Image.Image, record: Record | None = None) -> None:
    """Write a .png, with `record` as JSON in its text; the file appears only when whole."""
    with _storing(path), atomic_file(path) as file:
        _write_png(file, picture, record)


def _write_png(path: Path, picture: Image.Image, record: Record | None) -> None:
    text = PngInfo()
    if record is not None:
        text.add_itxt("Comment", json.dumps(record, ensure_ascii=False))
    picture.save(path, pnginfo=text)


def durations(num_frames: int, fps: float, tick: int) -> list[int]:
    """Return for how many milliseconds each frame is shown, in whole ticks that add up to the video's length.

    At 16 frames per second a frame lasts 6.25 hundredths: in a GIF every fourth lasts 7, the others 6.
    """
    ends = [round(number * 1000 / fps / tick) * tick for number in range(num_frames + 1)]
    return [end - start for start, end in itertools.pairwise(ends)]


def read_record(path: str | Path) -> dict[str, Any]:
    """Read how a video was made, from the video itself (or its .json).

    Args:
        path: .mp4, .gif, .webp, .png, .json, or a directory of frames.

    Raises:
        InputError: there is no such file, or it holds no record.
        flashi2v_data.errors.DecodeError: the file is damaged.
    """
    path = Path(path)
    if path.is_dir():
        path = path / _FIRST
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    readers: dict[str, Callable[[Path], str | bytes]] = {".mp4": _mp4_comment, ".json": _start}
    text = readers.get(path.suffix, _picture_comment)(path)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):  # no JSON, or no text
        record = None
    if not isinstance(record, dict) or not record.keys() >= {"prompt", "seed", "settings"}:
        raise InputError(f"{path} holds no record of a sampled video")
    return record


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_LARGEST_RECORD)


def _mp4_comment(path: Path) -> str:
    import av

    # As a file, and no other kind of video, which may name further files.
    options = {"protocol_whitelist": "file"}
    try:
        with av.open(f"file:{path.absolute()}", format="mov", options=options, metadata_errors="replace") as container:
            return str(container.metadata.get("comment", ""))
    except (av.FFmpegError, OSError) as error:
        raise DecodeError(str(path), error.strerror or str(error)) from None


def _picture_comment(path: Path) -> str | bytes:
    try:
        with opened(path) as image:
            if image.format == "PNG":
                image.load()  # text may also stand behind the picture
                return str(image.info.get("Comment", ""))
            if image.format == "GIF":
                return bytes(image.info.get("comment", b""))
            comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, b"")
            return str(comment) if isinstance(comment, str) else bytes(comment).removeprefix(_ASCII)
    except UNDECODABLE as error:
        raise DecodeError(str(path), str(error)) from None
