"""The command line `flashi2v-infer`."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

from cyclopts import App, Group, Parameter

from flashi2v_data.console import run
from flashi2v_data.errors import InputError
from flashi2v_data.settings import load_config
from flashi2v_infer import __version__, demo
from flashi2v_infer.config import InferenceConfig
from flashi2v_infer.execution import Execution
from flashi2v_infer.settings import Request, SamplingSettings
from flashi2v_model.config import SchedulerName

logger = logging.getLogger(__name__)

app = App(name="flashi2v-infer", version=__version__, help_format="plaintext")

_BATCH = Group("A batch of videos", sort_key=1)
_ONE = Group("One video", sort_key=2)
_BOTH = Group("Both", sort_key=3)
_HOW = Group("How to compute", sort_key=4)

_AS_IS = Execution()


def main() -> NoReturn:
    """Run the command line."""
    run(app)


@app.default
def infer(
    *,
    mm_model: Annotated[Path | None, Parameter(group=_BATCH)] = None,
    resume: Annotated[bool, Parameter(group=_BATCH, negative=())] = False,
    model: Annotated[str | None, Parameter(group=_ONE)] = None,
    image: Annotated[Path | None, Parameter(group=_ONE)] = None,
    prompt: Annotated[str | None, Parameter(group=_ONE, allow_leading_hyphen=True)] = None,
    output: Annotated[str | None, Parameter(name=["--output", "-o"], group=_ONE)] = None,
    negative_prompt: Annotated[str | None, Parameter(group=_ONE, allow_leading_hyphen=True)] = None,
    num_inference_steps: Annotated[int | None, Parameter(group=_ONE)] = None,
    guidance_scale: Annotated[float | None, Parameter(group=_ONE)] = None,
    low_freq_energy_ratio: Annotated[float | None, Parameter(group=_ONE)] = None,
    num_frames: Annotated[int | None, Parameter(group=_ONE)] = None,
    height: Annotated[int | None, Parameter(group=_ONE)] = None,
    width: Annotated[int | None, Parameter(group=_ONE)] = None,
    fps: Annotated[float | None, Parameter(group=_ONE)] = None,
    scheduler: Annotated[SchedulerName | None, Parameter(group=_ONE)] = None,
    conditioning: Annotated[list[str], Parameter(group=_ONE)] = [],  # noqa: B006 (never changed)
    strip: Annotated[Path | None, Parameter(group=_BOTH)] = None,
    seed: Annotated[int | None, Parameter(group=_BOTH)] = None,
    plan: Annotated[bool, Parameter(group=_BOTH, negative=())] = False,
    dry_run: Annotated[bool, Parameter(group=_BOTH, negative=())] = False,
    execution: Annotated[Execution, Parameter(name="*", group=_HOW)] = _AS_IS,
) -> None:
    """Sample videos from images and prompts with FlashI2V.

    Every video holds a record of its prompt, seed, settings and versions, and of how close its first frame is to the
    image; the same record lies beside it as a JSON file.

    Examples:

    flashi2v-infer --model demo

    flashi2v-infer --mm-model inference_model.json --resume

    flashi2v-infer --model FlashI2V-1.3B --image cat.jpg --prompt "A cat turns its head." -o cat.mp4

    Parameters
    ----------
    mm_model
        inference_model.json: lists of prompts and images, and every setting. Writes video_0.mp4, video_1.mp4, ...
        and video_grid.mp4 into its save_path.
    resume
        Leave finished videos alone: those made from the same prompt, image, seed, settings and model. A video made
        from anything else is an error.
    model
        A pipeline directory in diffusers' layout, a hub id, or demo: the small model that comes with the package,
        which needs no other option, and has defaults of its own (17 frames of 64x64, 25 steps, no guidance).
    image
        The first frame; any size, cropped to that of the video.
    prompt
        What happens.
    output
        The video: .mp4, .gif or .webp, or a directory of PNGs (frames/).
    negative_prompt
        What should not happen (default: nothing).
    num_inference_steps
        Steps of the sampler (default 50).
    guidance_scale
        Weight of the prompt (default 5); up to 1 there is no negative prompt, and half the work.
    low_freq_energy_ratio
        Where the frequencies of the image that guide the video start, 0 to 1 (default 0.1).
    num_frames
        Frames of the video, 4k + 1 (default 49).
    height
        Height in pixels, divisible by 16 (default 480).
    width
        Width in pixels, divisible by 16 (default 832).
    fps
        Frames per second of the file (default 16).
    scheduler
        The sampler: euler as the reference, or heun, unipc, dpm++, of second order (default: the model's own).
    conditioning
        What a variant of the network (--recipe) asks for: motion_score=0.7, or camera=0,0,1 for a list of numbers.
    strip
        Also draw some frames in a row: into this .png for one video; into this directory, as video_0.png, ..., for
        a batch (default: not).
    seed
        Of the noise (default: what the file says; 0 for one video).
    plan
        Print what the run will take (memory, operations) before anything is loaded, and at its end what it took.
    dry_run
        Check everything that is given, and sample nothing. With --plan, --model needs no image, prompt and output.
    """
    numbers: dict[str, Any] = {
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "low_freq_energy_ratio": low_freq_energy_ratio,
        "num_frames": num_frames,
        "height": height,
        "width": width,
    }
    required = {"image": image, "prompt": prompt, "output": output}
    optional: dict[str, Any] = {"negative_prompt": negative_prompt, "fps": fps, "scheduler": scheduler}
    optional["conditioning"] = conditioning or None
    given = [_option(name) for name, value in (required | numbers | optional).items() if value is not None]
    if (mm_model is None) == (model is None):
        raise InputError("give one of --mm-model FILE (a batch) and --model DIR (one video): see flashi2v-infer --help")
    if mm_model is not None:
        if given:
            raise InputError(f"{', '.join(given)}: not together with --mm-model, whose file holds these settings")
        config = load_config(mm_model, InferenceConfig)
        # Here and below: this imports torch and more, for which nobody should wait whose settings are wrong.
        from flashi2v_infer.commands.run import sample_batch

        sample_batch(config, execution, seed, resume=resume, strips=strip, plan=plan, dry_run=dry_run)
        return
    assert model is not None
    if resume:
        raise InputError("--resume: only together with --mm-model, of whose videos some may be finished")
    chosen = {name: value for name, value in numbers.items() if value is not None}
    chosen["conditioning"] = dict(map(_conditioning, conditioning))
    is_demo = model == demo.NAME
    settings = replace(demo.SETTINGS, **chosen) if is_demo else SamplingSettings(**chosen)
    if is_demo:
        model = str(demo.DIRECTORY)
        image, output = image or demo.IMAGE, output or demo.OUTPUT
        if image != demo.IMAGE and prompt is None:
            raise InputError(
                f"--image also needs --prompt, in the words that the demo model knows: {demo.PROMPT!r}, or "
                f"{demo.OTHER_PROMPT!r}"
            )
        prompt = demo.PROMPT if prompt is None else prompt
    if image is None or prompt is None or output is None:
        if not (plan and dry_run):
            missing = [_option(name) for name, value in required.items() if value is None]
            raise InputError(f"--model also needs {', '.join(missing)}")
        from flashi2v_infer.commands.run import plan_one

        plan_one(model, settings, execution, scheduler)
        return
    request = Request(
        prompt,
        str(image),
        negative_prompt or "",
        seed=seed or 0,
        fps=Request.fps if fps is None else fps,
        settings=settings,
    )
    from flashi2v_infer.commands.run import sample_one

    sample = sample_one(model, request, output, execution, scheduler=scheduler, strip=strip, plan=plan, dry_run=dry_run)
    if is_demo and sample is not None:
        for note in demo.notes(prompt, sample.vae_psnr):
            logger.warning(note)


def _conditioning(words: str) -> tuple[str, float | list[float]]:
    name, _, values = words.partition("=")
    try:
        numbers = [float(value) for value in values.split(",")]
    except ValueError:
        raise InputError(f"--conditioning {words}: must be NAME=NUMBER, or NAME=NUMBER,NUMBER,...") from None
    return name, numbers if "," in values else numbers[0]


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
