"""The command line `flashi2v-infer`."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, NoReturn, TypeAlias

from cyclopts import App, Group, Parameter

from flashi2v_data.console import importing, run
from flashi2v_data.errors import InputError
from flashi2v_data.settings import load_config
from flashi2v_infer import __version__, demo
from flashi2v_infer.config import InferenceConfig
from flashi2v_infer.defaults import fps_of, read_defaults, scale_of, settings_of
from flashi2v_infer.execution import Execution
from flashi2v_infer.settings import Request, SamplingSettings
from flashi2v_model.adapter_choice import read_choices
from flashi2v_model.config import Defaults, SchedulerName
from flashi2v_npu_ops.installation import loading_told

logger = logging.getLogger(__name__)

app = App(name="flashi2v-infer", version=__version__, help_format="plaintext")

_Flag: TypeAlias = Annotated[bool, Parameter(negative=())]
_Words: TypeAlias = Annotated[str | None, Parameter(allow_leading_hyphen=True)]


@dataclass(frozen=True)
class BatchOptions:
    """A batch of videos.

    Attributes:
        mm_model: inference_model.json: lists of prompts and images, and every setting. Writes video_0.mp4,
            video_1.mp4, ... and video_grid.mp4 into its save_path.
        resume: Leave finished videos alone: those made from the same prompt, image, seed, settings and model. A video
            made from anything else is an error.
    """

    mm_model: Path | None = None
    resume: _Flag = False


@dataclass(frozen=True)
class VideoOptions:
    """One video.

    Attributes:
        model: A pipeline directory in diffusers' layout, a hub id, or demo: the small model that comes with the
            package, which needs no other option. What a model says that it was trained for is the default of the
            options below; the numbers named there are those of the released model.
        image: The first frame; any size, cropped to that of the video.
        prompt: What happens.
        output: The video: .mp4, .gif or .webp, or a directory of PNGs (frames/).
        negative_prompt: What should not happen (default: nothing).
        num_inference_steps: Steps of the sampler (default 50).
        guidance_scale: Weight of the prompt (default 5); up to 1 there is no negative prompt, and half the work.
        low_freq_energy_ratio: Where the frequencies of the image that guide the video start, 0 to 1 (default 0.1).
        num_frames: Frames of the video, 4k + 1 (default 49).
        height: Height in pixels, divisible by 16 (default 480).
        width: Width in pixels, divisible by 16 (default 832).
        fps: Frames per second of the file (default 16).
        scheduler: The sampler: euler as the reference, or heun, unipc, dpm++, of second order (default: the model's
            own).
        flow_shift: Of the noise levels: above 1, more of the steps go where there is much noise (default: the model's
            own, 7 in the released one).
        speed: Leave calls of the network out: exact (none), balanced, fast, or a number, so many times fewer calls
            (default exact). The model has to be calibrated, as the demo is: flashi2v-model calibrate.
        scale: Enlarge the file so many times, smoothly; a whole number (default 1; of the demo so that the shorter side
            has 384 pixels).
        preview: Show in the terminal what the video will be while it is sampled (default: where there is a terminal).
        conditioning: What a variant of the network (--recipe) asks for: motion_score=0.7, or camera=0,0,1 for a list
            of numbers.
    """

    model: str | None = None
    image: Path | None = None
    prompt: _Words = None
    output: Annotated[str | None, Parameter(name=["--output", "-o"])] = None
    negative_prompt: _Words = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    low_freq_energy_ratio: float | None = None
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    scheduler: SchedulerName | None = None
    flow_shift: float | None = None
    speed: str | None = None
    scale: int | None = None
    preview: bool | None = None
    conditioning: list[str] | None = None

    def given(self) -> list[str]:
        """Return the options that were given."""
        return [_option(field.name) for field in fields(self) if getattr(self, field.name) is not None]

    def settings(self, defaults: Defaults) -> SamplingSettings:
        """Return the numbers of the run: those given, else the model's."""
        names = {field.name for field in fields(SamplingSettings)} & {field.name for field in fields(self)}
        chosen = {name: getattr(self, name) for name in names}
        chosen["conditioning"] = dict(map(_conditioning, self.conditioning or ()))
        return settings_of(defaults, **chosen)

    def filled_in(self) -> "VideoOptions":
        """Return the options with what the demo model needs no one to say.

        Raises:
            InputError: an image of the user's own has no prompt.
        """
        if self.model != demo.NAME:
            return self
        if self.image is not None and self.prompt is None:
            known = "; ".join(demo.SENTENCES)
            raise InputError(f"--image also needs --prompt, a sentence that the demo model knows: {known}")
        return replace(
            self,
            image=self.image or demo.IMAGE,
            prompt=demo.PROMPT if self.prompt is None else self.prompt,
            output=self.output or demo.OUTPUT,
        )

    def request(self, settings: SamplingSettings, defaults: Defaults, seed: int | None) -> Request:
        """Return what to sample.

        Raises:
            InputError: an option is missing, or has no effect.
        """
        if self.image is None or self.prompt is None or self.output is None:
            missing = [name for name in ("image", "prompt", "output") if getattr(self, name) is None]
            raise InputError(f"--model also needs {', '.join(map(_option, missing))}")
        fps = fps_of(defaults) if self.fps is None else self.fps
        scale = scale_of(str(self.model), settings) if self.scale is None else self.scale
        negative = self.negative_prompt or ""
        return Request(self.prompt, str(self.image), negative, seed or 0, fps=fps, scale=scale, settings=settings)


@dataclass(frozen=True)
class CommonOptions:
    """Both.

    Attributes:
        strip: Also draw some frames in a row: into this .png for one video; into this directory, as video_0.png, ...,
            for a batch (default: not).
        lora: A LoRA adapter, FILE or FILE:SCALE, of any published spelling; a directory, a hub id, or a run of
            flashi2v-train that trained one does as well. Again for another (default: what the file says).
        seed: Of the noise (default: what the file says; 0 for one video).
        devices: Start a process for each of so many devices: a number, or auto for all that there are. They share one
            video in the layout that is predicted to be fastest, unless degrees are given below; of a batch each samples
            videos of its own. 8xH100 plans for devices that are elsewhere (default: this process alone).
        plan: Print what the run will take (memory, operations) before anything is loaded, and at its end what it took;
            with --devices also all layouts, the fastest first.
        dry_run: Check everything that is given, and sample nothing. With --plan, --model needs no image, prompt and
            output.
    """

    strip: Path | None = None
    lora: list[str] | None = None
    seed: int | None = None
    devices: str | None = None
    plan: _Flag = False
    dry_run: _Flag = False


@dataclass(frozen=True)
class ExecutionOptions(Execution):
    # The command line samples videos one by one, and releases the text encoder.
    vae_slicing: Annotated[bool | None, Parameter(parse=False)] = None
    low_memory: _Flag = False
    compile: _Flag = False
    cfg_batch: _Flag = False
    keep_text_encoder: Annotated[bool, Parameter(parse=False)] = False

    __doc__ = Execution.__doc__


def main() -> NoReturn:
    """Run the command line."""
    run(app)


@app.default
@loading_told()
def infer(
    *,
    batch: Annotated[BatchOptions, Parameter(name="*", group=Group("A batch of videos", sort_key=1))] = BatchOptions(),
    video: Annotated[VideoOptions, Parameter(name="*", group=Group("One video", sort_key=2))] = VideoOptions(),
    common: Annotated[CommonOptions, Parameter(name="*", group=Group("Both", sort_key=3))] = CommonOptions(),
    execution: Annotated[
        ExecutionOptions, Parameter(name="*", group=Group("How to compute", sort_key=4))
    ] = ExecutionOptions(),
) -> None:
    """Sample videos from images and prompts with FlashI2V.

    Every video holds a record of its prompt, seed, settings and versions, and of how close its first frame is to the
    image; the same record lies beside it as a JSON file.

    For example:

    flashi2v-infer --model demo

    flashi2v-infer --mm-model inference_model.json --resume

    flashi2v-infer --model FlashI2V-1.3B --image cat.jpg --prompt "A cat turns its head." -o cat.mp4
    """
    if (batch.mm_model is None) == (video.model is None):
        raise InputError("give one of --mm-model FILE (a batch) and --model DIR (one video): see flashi2v-infer --help")
    if batch.mm_model is not None:
        _sample_batch(batch.mm_model, batch.resume, video, common, execution)
        return
    if batch.resume:
        raise InputError("--resume: only together with --mm-model, of whose videos some may be finished")
    video = video.filled_in()
    assert video.model is not None
    only_plans = common.plan and common.dry_run and None in (video.image, video.prompt, video.output)
    defaults = read_defaults(video.model, fetch=not only_plans)
    settings = video.settings(defaults)
    request = None if only_plans else video.request(settings, defaults, common.seed)
    with _importing():
        from flashi2v_infer.commands.batch import read_one
        from flashi2v_infer.commands.devices import Devices, run_on
        from flashi2v_infer.commands.run import print_plan, sample
        from flashi2v_infer.load import ModelDirectory

    if video.flow_shift is not None and not 0 < video.flow_shift < float("inf"):
        raise InputError(f"flow_shift must be positive, got {video.flow_shift}")
    lora = read_choices(common.lora or ())
    model = ModelDirectory(video.model, execution, video.scheduler, lora, video.flow_shift)
    devices = None if common.devices is None else Devices.read(common.devices)
    if request is None:
        print_plan(model, settings, devices)
        return
    if devices is not None and not common.dry_run:
        run_on(devices, model, settings, sys.argv[1:], is_one=True, plan=common.plan)
    output = str(video.output)
    sample(
        model,
        settings,
        lambda: read_one(request, output, common.strip),
        plan=common.plan,
        dry_run=common.dry_run,
        preview=video.preview,
        devices=devices,
    )


def _sample_batch(file: Path, resume: bool, video: VideoOptions, common: CommonOptions, execution: Execution) -> None:
    if given := video.given():
        raise InputError(f"{', '.join(given)}: not together with --mm-model, whose file holds these settings")
    config = load_config(file, InferenceConfig)
    lora = None if common.lora is None else read_choices(common.lora)
    with _importing():
        from flashi2v_infer.commands.devices import Devices, run_on
        from flashi2v_infer.commands.run import sample_batch
        from flashi2v_infer.load import ConfiguredModel

    devices = None if common.devices is None else Devices.read(common.devices)
    if devices is not None and not common.dry_run:
        model = ConfiguredModel(config, execution, lora)
        run_on(devices, model, config.sampling, sys.argv[1:], is_one=False, plan=common.plan)
    options = {"resume": resume, "plan": common.plan, "dry_run": common.dry_run}
    sample_batch(config, execution, common.seed, strips=common.strip, lora=lora, devices=devices, **options)


@contextmanager
def _importing() -> Iterator[None]:
    """Import torch and more: nobody waits for it whose settings are wrong, and everybody else is told."""
    if os.environ.get("RANK", "0") == "0":
        logger.info("importing torch and diffusers, which takes seconds")
    with importing():
        yield


def _conditioning(words: str) -> tuple[str, float | list[float]]:
    name, _, values = words.partition("=")
    try:
        numbers = [float(value) for value in values.split(",")]
    except ValueError:
        raise InputError(f"--conditioning {words}: must be NAME=NUMBER, or NAME=NUMBER,NUMBER,...") from None
    return name, numbers if "," in values else numbers[0]


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
