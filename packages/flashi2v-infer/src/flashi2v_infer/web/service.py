"""What the HTTP interface and the page stand on: the queue, the model, and what becomes of a finished video."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from starlette.exceptions import HTTPException

from flashi2v_data import read_frames
from flashi2v_data.atomic import atomic_file
from flashi2v_data.errors import InputError
from flashi2v_infer.files.export import check_output, read_record, save_video
from flashi2v_infer.files.pictures import read_image
from flashi2v_infer.web.jobs import Job, Jobs
from flashi2v_infer.web.schema import Order, Served, Video, describe

_THUMBNAIL = 256  # pixels of the longer side


@dataclass(frozen=True)
class Service:
    """What the interface and the page stand on.

    Attributes:
        jobs: the queue.
        served: the model.
        wake: tells workers of news.
        num_ready: how many workers have loaded the model.
        keep_days: how long videos are kept.
        keep_bytes: how much of them is.
        url_hosts: from which pictures may be fetched.
    """

    jobs: Jobs
    served: Served
    wake: Callable[[], None] = lambda: None
    num_ready: Callable[[], int] = lambda: 1
    keep_days: float | None = None
    keep_bytes: float | None = None
    url_hosts: Collection[str] = ()

    def describe(self, job: Job) -> Video:
        """Return a job as clients see it."""
        ahead = self.jobs.ahead_of(job) if job.state == "queued" else None
        return describe(job, self.served.model, ahead, self.keep_days)

    def add(self, owner: str, order: Order, image: bytes) -> Job:
        """Queue a video.

        Raises:
            InputError: it cannot be sampled.
            HTTPException: too many wait.
        """
        request = self.served.request(order, "")  # before anything is stored
        if order.model not in (None, self.served.model):
            raise InputError(f"model: there is {self.served.model}, not {order.model}")
        request["image"] = self.jobs.add_image(image, check_picture)
        job = self.jobs.add(owner, request, self.served.limits.max_queue)
        if job is None:
            raise HTTPException(429, f"{self.served.limits.max_queue} videos wait already: try again later")
        self.wake()
        return job

    def rendition(self, job: Job, kind: str) -> Path:
        """Return the file of a finished video: mp4, gif, webp, thumbnail or spritesheet; made where it is not there.

        Raises:
            InputError: it cannot be of this kind.
            flashi2v_data.errors.StorageError: it cannot be written.
        """
        video = self.jobs.video(job)
        if kind == "mp4":
            return video
        if kind == "spritesheet":
            return video.with_suffix(".png")
        path = video.with_suffix(".thumb.webp" if kind == "thumbnail" else f".{kind}")
        if path.exists():
            return path
        num_frames = job.request["settings"]["num_frames"]
        if kind == "thumbnail":
            picture = Image.fromarray(read_frames(video, [num_frames // 2])[0])
            picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
            with atomic_file(path) as file:
                picture.save(file)
        else:
            check_output(str(path), job.request["fps"], "format")
            save_video(path, read_frames(video, range(num_frames)), job.request["fps"], read_record(video))
        return path


def check_picture(path: Path) -> None:
    """Refuse what is no picture that can be sampled from; it is decoded within the bounds of `files.pictures`.

    Raises:
        InputError: naming `input_reference`.
    """
    try:
        read_image(path, "input_reference")
    except InputError as error:
        raise InputError(str(error).replace(f"{path}: ", "")) from None
