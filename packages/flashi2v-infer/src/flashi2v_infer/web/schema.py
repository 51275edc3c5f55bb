"""What a client may ask for, what it is answered, and the limits of both."""

import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from flashi2v_data.errors import InputError
from flashi2v_infer.defaults import fps_of, scale_of, settings_of
from flashi2v_infer.settings import TEMPORAL_MULTIPLE, Request, SamplingSettings
from flashi2v_infer.web.jobs import Job
from flashi2v_model.adapter_choice import AdapterChoice, read_choices
from flashi2v_model.config import Defaults


@dataclass(frozen=True)
class Limits:
    """What a client may ask for at most.

    Attributes:
        max_queue: Jobs that wait at once.
        max_frames: Frames of a video.
        max_pixels: Pixels of a frame.
        max_steps: Steps of the sampler.
        max_upload_mib: MiB of an upload, which must arrive within a minute.
    """

    max_queue: int = 1000
    max_frames: int = 121
    max_pixels: int = 1280 * 720
    max_steps: int = 100
    max_upload_mib: int = 32

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise InputError(f"{field.name} must be at least 1, got {getattr(self, field.name)}")

    def check(self, settings: SamplingSettings) -> None:
        """Refuse what takes too long.

        Raises:
            InputError: naming the field and the limit.
        """
        for name, value, limit in (
            ("num_frames", settings.num_frames, self.max_frames),
            ("num_inference_steps", settings.num_inference_steps, self.max_steps),
            ("size: pixels of a frame", settings.height * settings.width, self.max_pixels),
        ):
            if value > limit:
                raise InputError(f"{name}: this server allows at most {limit:,}, got {value:,}")


class ImageUrl(BaseModel):
    """A picture by its address: data:image/png;base64,..., or https://... of a host that the server allows."""

    model_config = ConfigDict(extra="forbid")

    image_url: str = Field(max_length=2**27)


class Order(BaseModel):
    """A video that a client asks for. What is left out is as the model was trained."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: str = Field(min_length=1, max_length=10_000, description="What happens.")
    model: str | None = Field(None, description="One of /v1/models.")
    input_reference: ImageUrl | None = Field(
        None, description="The first frame; as multipart/form-data a file of this name does as well."
    )
    seconds: float | None = Field(None, gt=0, le=3600, description="In place of num_frames.")
    size: str | None = Field(None, pattern=r"^[1-9]\d{1,4}x[1-9]\d{1,4}$", description="Width x height, as in 832x480.")
    num_frames: int | None = Field(None, description="4k + 1.")
    fps: float | None = Field(None, gt=0, le=240)
    num_inference_steps: int | None = None
    guidance_scale: float | None = Field(None, le=100)
    flow_shift: float | None = Field(None, gt=0, le=100, description="Of the noise levels.")
    low_freq_energy_ratio: float | None = None
    seed: int | None = Field(None, ge=0, lt=2**53, description="Drawn, and told, where it is left out.")
    negative_prompt: str = Field("", max_length=10_000)
    speed: str | float | None = Field(None, description="exact, balanced, fast, or so many times fewer calls.")
    lora: list[str] = Field([], max_length=8, description="Adapters that the server has: NAME or NAME:SCALE.")

    @field_validator("lora", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("prompt")
    @classmethod
    def _some_words(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("must hold words")
        return value


@dataclass(frozen=True)
class Served:
    """What this server has.

    Attributes:
        model: by the name that clients know.
        source: where it comes from.
        defaults: that it was trained for.
        limits: of what may be asked.
        adapters: files by name.
        is_calibrated: calls of the network may be left out.
    """

    model: str
    source: str
    defaults: Defaults
    limits: Limits
    adapters: Mapping[str, str]
    is_calibrated: bool = False

    def request(self, order: Order, image: str) -> dict[str, Any]:
        """Return what a job is to sample, as JSON holds it.

        Args:
            order: of the client.
            image: the file of the first frame.

        Raises:
            InputError: it cannot be used, or is more than the limits allow; the message names the field.
        """
        size: dict[str, int] = {}
        if order.size is not None:
            size["width"], size["height"] = map(int, order.size.split("x"))
        fps = fps_of(self.defaults) if order.fps is None else order.fps
        num_frames = order.num_frames
        if order.seconds is not None:
            if num_frames is not None:
                raise InputError("give one of seconds and num_frames")
            later = round((order.seconds * fps - 1) / TEMPORAL_MULTIPLE)
            num_frames = max(0, later) * TEMPORAL_MULTIPLE + 1
        names = ("num_inference_steps", "guidance_scale", "low_freq_energy_ratio", "speed")
        chosen = {name: getattr(order, name) for name in names}
        settings = settings_of(self.defaults, num_frames=num_frames, **size, **chosen)
        self.limits.check(settings)
        if settings.speed != "exact" and not self.is_calibrated:
            raise InputError("speed: this model is not calibrated: leave it at exact")
        self.choices(order.lora)
        seed = secrets.randbelow(2**31) if order.seed is None else order.seed
        scale = scale_of(self.source, settings)
        request = Request(order.prompt, image, order.negative_prompt, seed, fps=fps, scale=scale, settings=settings)
        return {**asdict(request), "flow_shift": order.flow_shift, "lora": order.lora}

    def choices(self, lora: list[str]) -> tuple[AdapterChoice, ...]:
        """Return the adapters of these names.

        Raises:
            InputError: there is no such adapter.
        """
        found = []
        for text in lora:
            name = text if text in self.adapters else text.rpartition(":")[0]
            if name not in self.adapters:
                known = ", ".join(self.adapters) or "none"
                raise InputError(f"lora: there is no adapter {text[:80]!r}; known are: {known}")
            (choice,) = read_choices([f"{name}{text[len(name) :] or ':1'}"])
            found.append(AdapterChoice(self.adapters[name], choice.scale))
        return tuple(found)


def request_of(job: Job) -> Request:
    """Return what a job is to sample."""
    values = {name: value for name, value in job.request.items() if name not in ("flow_shift", "lora")}
    return Request(**values | {"settings": SamplingSettings(**values["settings"])})


class Fault(BaseModel):
    """What went wrong with a video."""

    code: str
    message: str


class Video(BaseModel):
    """A video, or the job that makes it: OpenAI's fields, and then our own."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"] = Field(
        description="A cancelled one has failed, and the code of its error is `cancelled`."
    )
    progress: int = Field(description="Percent.")
    created_at: int
    completed_at: int | None = None
    expires_at: int | None = None
    error: Fault | None = None
    prompt: str
    seconds: str
    size: str

    num_frames: int
    fps: float
    num_inference_steps: int
    guidance_scale: float
    low_freq_energy_ratio: float
    speed: str | float
    flow_shift: float | None
    seed: int
    negative_prompt: str
    lora: list[str]
    step: int
    seconds_left: float | None = None
    queue_position: int | None = Field(None, description="How many wait before it.")
    pinned: bool
    notes: list[str] = Field(description="What the model warned of.")


_STATUS: dict[str, Any] = {"queued": "queued", "running": "in_progress", "done": "completed"}


def describe(job: Job, model: str, ahead: int | None = None, keep_days: float | None = None) -> Video:
    """Return a job as clients see it."""
    request, settings, fault = job.request, job.request["settings"], None
    if job.state in ("failed", "cancelled"):
        fault = Fault(code=job.code or job.state, message=job.error or "cancelled")
    names = ("guidance_scale", "low_freq_energy_ratio", "num_frames", "num_inference_steps")
    own = {name: request[name] for name in ("prompt", "fps", "flow_shift", "seed", "negative_prompt", "lora")}
    expires = job.ended + keep_days * 86400 if job.ended and keep_days is not None and not job.pinned else None
    return Video(
        id=job.id,
        model=model,
        status=_STATUS.get(job.state, "failed"),
        # The last percent is decoding and writing.
        progress=100 if job.state == "done" else 99 * job.step // max(1, job.num_steps),
        created_at=int(job.created),
        completed_at=int(job.ended) if job.ended and job.state == "done" else None,
        expires_at=int(expires) if expires else None,
        error=fault,
        seconds=f"{settings['num_frames'] / request['fps']:g}",
        size=f"{settings['width']}x{settings['height']}",
        step=job.step,
        seconds_left=job.seconds_left,
        queue_position=ahead,
        pinned=job.pinned,
        notes=job.notes,
        speed=settings.get("speed", "exact"),  # of a queue from before there was a choice
        **{name: settings[name] for name in names},
        **own,
    )
