"""One clip as signals see it: its entry, and its frames at the rates and sizes that they ask for, decoded in one go."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flashi2v_data.errors import DecodeError
from flashi2v_data.video.images import FPS, is_image, read_image
from flashi2v_data.video.pyav import Video

# Seconds: containers round their times.
_TICK = 1e-3


class Frames(NamedTuple):
    """Which frames of a clip, and how large.

    Attributes:
        fps: so many of each second; None for every frame.
        most: where these are more, so many of them, spread evenly from the first to the last.
        size: (height, width) in pixels, whatever the clip's; or at most so many of the shorter side; None for the
            clip's own.
    """

    fps: float | None = None
    most: int | None = None
    size: tuple[int, int] | int | None = None


ALL = Frames()


class Clip:
    """An entry of a meta JSON and the frames it stands for: those of its `cut`, within its `crop`, upright.

    Use it as a context manager. The file is opened at the first look at it, once for all signals.

    Args:
        entry: of a meta JSON, or a record; its path is absolute or goes by the working directory.
        wanted: all that will be asked for.

    Raises:
        DecodeError: the file cannot be read, here and wherever the file is looked at.
    """

    def __init__(self, entry: Mapping[str, Any], wanted: Sequence[Frames] = ()) -> None:
        self.entry = entry
        self.path = str(entry["path"])
        self._wanted = list(dict.fromkeys(wanted))
        self._decoded: dict[Frames, NDArray[np.uint8]] = {}

    def __enter__(self) -> "Clip":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and forget its frames."""
        if "_video" in self.__dict__ and self._video is not None:
            self._video.__exit__()
        self._decoded.clear()

    @functools.cached_property
    def _video(self) -> Video | None:
        return None if is_image(self.path) else Video(self.path, tone_map=True)

    @functools.cached_property
    def start(self) -> int:
        """The number of the clip's first frame within its file."""
        cut = self.entry.get("cut")
        return int(cut[0]) if cut else int(self.entry.get("start_frame_idx", 0))

    @functools.cached_property
    def num_frames(self) -> int:
        """How many frames the clip has."""
        available = (1 if self._video is None else self._video.num_frames) - self.start
        cut = self.entry.get("cut") or ()
        ends = (
            [int(self.entry["num_frames"])]
            if "num_frames" in self.entry
            else [int(end) - self.start for end in cut[1:]]
        )
        number = min([available, *ends])
        if number <= 0:
            raise DecodeError(self.path, f"has no frame {self.start}", is_of_record=True)
        return number

    @functools.cached_property
    def fps(self) -> float:
        """Frames per second, on average."""
        rate = FPS if self._video is None else self._video.rate
        if not rate:
            raise DecodeError(self.path, "does not say its frames per second")
        return float(rate)

    @functools.cached_property
    def seconds(self) -> NDArray[np.float64]:
        """When each frame of the clip is shown, (num_frames,), the first at 0."""
        times = np.empty(0) if self._video is None else self._video.seconds[self.start : self.start + self.num_frames]
        if len(times) < self.num_frames:  # the file does not say
            return np.arange(self.num_frames) / self.fps
        return np.asarray(times - times[0])

    def indices(self, wanted: Frames) -> NDArray[np.int64]:
        """Return which frames of the clip, counted from its first, are chosen: (T,), ascending."""
        chosen = np.arange(self.num_frames)
        if wanted.fps is not None and wanted.fps < self.fps:
            moments = np.arange(0, self.seconds[-1] + _TICK, 1 / wanted.fps)
            chosen = np.unique(np.searchsorted(self.seconds, moments + _TICK, "right") - 1)
        if wanted.most is not None and len(chosen) > wanted.most:
            chosen = chosen[np.linspace(0, len(chosen) - 1, wanted.most).round().astype(np.int64)]
        return chosen.astype(np.int64)

    def frames(self, wanted: Frames = ALL) -> NDArray[np.uint8]:
        """Return the chosen frames, (T, H, W, 3), uint8 RGB, reduced by averaging."""
        if wanted not in self._decoded:
            group = self._wanted if wanted in self._wanted else [wanted]
            self._decoded.update(self._decode(group))
        return self._decoded[wanted]

    def pictures(self, wanted: Frames = ALL) -> Iterator[NDArray[np.uint8]]:
        """Yield the chosen frames, (H, W, 3) each, as `frames` has them; few are held at a time."""
        return (_resized(picture, wanted.size) for picture in self._pictures(self.indices(wanted)))

    def _decode(self, group: Sequence[Frames]) -> dict[Frames, NDArray[np.uint8]]:
        places = {wanted: self.indices(wanted) for wanted in group}
        union = np.unique(np.concatenate([*places.values()]))
        found: dict[Frames, NDArray[np.uint8]] = {}
        positions = {
            wanted: {int(index): place for place, index in enumerate(chosen)} for wanted, chosen in places.items()
        }
        for index, picture in zip(map(int, union), self._pictures(union)):
            for wanted in group:
                if index in positions[wanted]:
                    frame = _resized(picture, wanted.size)
                    if wanted not in found:
                        found[wanted] = np.empty((len(places[wanted]), *frame.shape), np.uint8)
                    if found[wanted].shape[1:] != frame.shape:
                        raise DecodeError(self.path, "changes its size")
                    found[wanted][positions[wanted][index]] = frame
        return found

    def _pictures(self, indices: NDArray[np.int64]) -> Iterator[NDArray[np.uint8]]:
        crop = self.entry.get("crop")
        if self._video is None:
            pictures: Iterator[NDArray[np.uint8]] = iter([read_image(self.path)])
        else:
            pictures = self._video.pictures([int(index) + self.start for index in indices])
        for picture in pictures:
            if crop:
                left, right, top, bottom = crop
                picture = picture[top:bottom, left:right]
                if not picture.size:
                    raise DecodeError(self.path, f"has no pixels within crop {crop}", is_of_record=True)
            yield picture


def _resized(picture: NDArray[np.uint8], size: tuple[int, int] | int | None) -> NDArray[np.uint8]:
    height, width = picture.shape[:2]
    if isinstance(size, int):
        scale = min(1.0, size / min(height, width))
        size = max(1, round(height * scale)), max(1, round(width * scale))
    if size is None or size == (height, width):
        return picture
    image = Image.fromarray(np.ascontiguousarray(picture))
    return np.asarray(image.resize(size[::-1], Image.Resampling.BOX))
