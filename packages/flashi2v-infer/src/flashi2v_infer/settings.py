"""What a sampling run is asked for, checked before anything heavy is loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from flashi2v_data.errors import InputError
from flashi2v_model.config import SPATIAL_STRIDE, TEMPORAL_STRIDE
from flashi2v_model.speed.plan import read_speed

# The transformer's patch is 2 x 2.
SPATIAL_MULTIPLE, TEMPORAL_MULTIPLE = 2 * SPATIAL_STRIDE, TEMPORAL_STRIDE
LARGEST_SIDE = 4096  # pixels of an enlarged file, which H.264's decoders still play


@dataclass(frozen=True)
class SamplingSettings:
    """The numbers of a sampling run; the defaults are those of the released 1.3B model.

    Attributes:
        num_frames: of the video, 4k + 1.
        height: of the video in pixels, divisible by 16.
        width: of the video in pixels, divisible by 16.
        num_inference_steps: of the sampler.
        guidance_scale: weight of the prompt against the negative prompt; up to 1 the negative prompt is not used and
            every step runs the network once.
        low_freq_energy_ratio: in [0, 1], how much of the first frame's low frequencies are kept from guiding the video.
        max_sequence_length: text tokens that the transformer attends to, padding included; the number it was trained
            with, 512 in every release. None: what the transformer's config says.
        conditioning: what a variant of the network asks for, by name.
        speed: which calls of the network are left out: exact, balanced, fast, or so many times fewer.

    Raises:
        InputError: a number cannot be used; the message says which can.
    """

    num_frames: int = 49
    height: int = 480
    width: int = 832
    num_inference_steps: int = 50
    guidance_scale: float = 5.0
    low_freq_energy_ratio: float = 0.1
    max_sequence_length: int | None = None
    conditioning: Mapping[str, float | Sequence[float]] = field(default_factory=dict, hash=False)
    speed: str | float = "exact"

    def __post_init__(self) -> None:
        if self.num_frames < 1 or self.num_frames % TEMPORAL_MULTIPLE != 1:
            raise InputError(f"num_frames must be 4k + 1, got {self.num_frames}: use {_neighbours(self.num_frames, 1)}")
        for name, value in (("height", self.height), ("width", self.width)):
            if value < SPATIAL_MULTIPLE or value % SPATIAL_MULTIPLE:
                raise InputError(f"{name} must be divisible by 16, got {value}: use {_neighbours(value, 0)}")
        for name, count in (
            ("num_inference_steps", self.num_inference_steps),
            ("max_sequence_length", self.max_sequence_length),
        ):
            if count is not None and count < 1:
                raise InputError(f"{name} must be at least 1, got {count}")
        if not 0 <= self.guidance_scale < float("inf"):
            raise InputError(f"guidance_scale must be 0 or more, got {self.guidance_scale}")
        if not 0 <= self.low_freq_energy_ratio <= 1:
            raise InputError(f"low_freq_energy_ratio must lie in [0, 1], got {self.low_freq_energy_ratio}")
        try:
            speed = read_speed(self.speed)
        except ValueError as error:
            raise InputError(str(error)) from None
        object.__setattr__(self, "speed", speed)  # in one spelling, as records are compared

    @property
    def latent_grid(self) -> tuple[int, int, int]:
        """F, H and W of the video's latents."""
        return (
            (self.num_frames - 1) // TEMPORAL_STRIDE + 1,
            self.height // SPATIAL_STRIDE,
            self.width // SPATIAL_STRIDE,
        )

    @property
    def uses_negative_prompt(self) -> bool:
        """Whether there is an unconditional branch."""
        return self.guidance_scale > 1


def _neighbours(value: int, remainder: int) -> str:
    multiple = TEMPORAL_MULTIPLE if remainder else SPATIAL_MULTIPLE
    below = (value - remainder) // multiple * multiple + remainder
    return f"{below} or {below + multiple}" if below > 0 else str(remainder or multiple)


def check_negative_prompt(negative_prompt: str, settings: SamplingSettings) -> None:
    """Refuse a negative prompt that would have no effect.

    Raises:
        InputError: there is one, and the guidance scale leaves it out.
    """
    if negative_prompt and not settings.uses_negative_prompt:
        raise InputError(
            f"negative_prompt has no effect with guidance_scale {settings.guidance_scale}: "
            "leave it out, or set guidance_scale above 1"
        )


def check_text(text: str, name: str) -> None:
    """Refuse the bytes of a command line that are not UTF-8, which neither model nor record could take.

    Raises:
        InputError: naming `name`.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{name}: not UTF-8 text: {text.encode(errors='replace').decode()}") from None


@dataclass(frozen=True)
class Request:
    """All that one video depends on, besides the model.

    Attributes:
        prompt: what happens.
        image: file of the first frame.
        negative_prompt: what should not happen.
        seed: of the run.
        index: of the video in its run; its noise depends on seed and index alone.
        fps: frames per second of the file.
        scale: how many times larger than the video its file is.
        settings: the numbers of the sampling run.

    Raises:
        InputError: the negative prompt would have no effect, `fps` is not positive, `scale` would make a file too
            large, or a text is not UTF-8.
    """

    prompt: str
    image: str
    negative_prompt: str = ""
    seed: int = 0
    index: int = 0
    fps: float = 16.0
    scale: int = 1
    settings: SamplingSettings = SamplingSettings()

    def __post_init__(self) -> None:
        check_negative_prompt(self.negative_prompt, self.settings)
        for name in ("prompt", "image", "negative_prompt"):
            check_text(getattr(self, name), name)
        if not 0 < self.fps < float("inf"):
            raise InputError(f"fps must be positive, got {self.fps}")
        largest = LARGEST_SIDE // max(self.settings.height, self.settings.width)
        if self.scale != 1 and not 1 <= self.scale <= largest:
            raise InputError(f"scale must be 1 to {largest} for {LARGEST_SIDE} pixels at most, got {self.scale}")
