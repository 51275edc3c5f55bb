"""From what was asked for to files: one video is a batch of one.

A run finds its device, reads what the videos are made from, plans, loads the model, encodes all prompts, and samples
one video after the other into its file; several processes take turns in the list. Whatever the user can fix is found
before the model is loaded, wherever that is possible.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffusers.callbacks import PipelineCallback
from tqdm import tqdm

from flashi2v_data.console import configure_logging, one_line
from flashi2v_data.errors import InputError, StorageError
from flashi2v_data.video.strips import film_strip
from flashi2v_infer.commands.batch import Batch, Job, read_batch, unfinished, write_together
from flashi2v_infer.commands.devices import Devices, count, rank
from flashi2v_infer.commands.sampler import Sample, Sampler
from flashi2v_infer.commands.terminal import TerminalPreview
from flashi2v_infer.config import InferenceConfig
from flashi2v_infer.errors import SamplingError
from flashi2v_infer.execution import Execution
from flashi2v_infer.files.export import enlarged, save_video, write_picture
from flashi2v_infer.files.records import versions
from flashi2v_infer.load import ConfiguredModel, Model, dtype_name
from flashi2v_infer.pipeline import FlashI2VPipeline, StepCallback
from flashi2v_infer.placement import encode_prompts, put_away_text_encoder
from flashi2v_infer.plan.layouts import table
from flashi2v_infer.plan.measured import Meter, comparison
from flashi2v_infer.plan.plan import Plan, make_plan, target_device
from flashi2v_infer.plan.skeleton import parts_of
from flashi2v_infer.processes import Processes, join_processes
from flashi2v_infer.settings import Request, SamplingSettings
from flashi2v_model.adapter_choice import AdapterChoice
from flashi2v_model.weights.libraries import quieten
from flashi2v_npu_ops.faults import device_faults_told

logger = logging.getLogger(__name__)

_GOES_ON = "the same command with --resume goes on from here"


def sample_batch(
    config: InferenceConfig,
    execution: Execution,
    seed: int | None = None,
    *,
    strips: Path | None = None,
    lora: tuple[AdapterChoice, ...] | None = None,
    resume: bool = False,
    plan: bool = False,
    dry_run: bool = False,
    devices: Devices | None = None,
) -> None:
    """Sample every prompt and image of a configuration file into its `save_path`.

    Args:
        config: of inference_model.json.
        execution: how to compute.
        seed: instead of the file's.
        strips: a directory for film strips of the videos.
        lora: adapters, instead of the file's.
        resume: as of `sample`, and `plan`, `dry_run` and `devices` likewise.
        plan: likewise.
        dry_run: likewise.
        devices: likewise.
    """
    model = ConfiguredModel(config, execution, lora)

    def read() -> Batch:
        return read_batch(model.config, model.source(), seed, strips)

    sample(model, config.sampling, read, resume=resume, plan=plan, dry_run=dry_run, devices=devices)


@device_faults_told("--offload model or group, --low-memory, fewer frames or a smaller size")
def sample(
    model: Model,
    settings: SamplingSettings,
    read: Callable[[], Batch],
    *,
    resume: bool = False,
    plan: bool = False,
    dry_run: bool = False,
    preview: bool | None = None,
    devices: Devices | None = None,
) -> None:
    """Sample videos into their files.

    Args:
        model: where the pipeline comes from, and how it computes.
        settings: of all videos.
        read: checks what the user gave, and returns the videos.
        resume: leave videos alone that are finished.
        plan: print what the run will take, and at the end what it took.
        dry_run: check everything that was given, and sample nothing.
        preview: draw one video in the terminal while it is sampled; None where that can be done.
        devices: what a plan of a dry run is for beside one device.

    Raises:
        InputError: anything that the user can fix. At the end where some images could not be used: the other videos
            are written then.
        SamplingError: a video could not be sampled; of a batch at the end.
    """
    quieten()
    model.calls(settings)  # refuses a speed that this model is not calibrated for
    if dry_run:
        model.check()
        if plan:
            print_plan(model, settings, devices)  # also for devices that are elsewhere
        else:
            model.settle()
        batch = read()
        jobs = unfinished(batch.jobs) if resume else batch.jobs
        print(one_line(f"would write {batch.describe(len(jobs))}"))
        batch.raise_faults()
        return
    with join_processes(model.device_name, model.execution) as processes:
        # What all processes would say alike is said by the first.
        configure_logging(logging.INFO if processes.is_first else logging.ERROR)
        settled, batch = model.settle(processes.device), read()
        is_one = batch.directory is None
        if is_one and processes.num_replicas > 1:
            raise InputError(
                f"one video cannot be shared out among {processes.num_replicas} times {processes.per_video} processes: "
                "start as many as --context-parallel-size x --guidance-parallel-size say"
            )
        jobs = unfinished(batch.jobs) if resume else batch.jobs
        planned = print_plan(model, settings) if plan and processes.is_first else None
        processes.barrier()  # before any of them finishes another
        if jobs:
            if not is_one:
                configure_logging(logging.INFO if processes.is_first else logging.WARNING)
            pipeline, meter = model.load(settled, processes), Meter(processes.device)
            drawn = TerminalPreview(pipeline, meter.on_step_end)
            is_drawn = is_one and processes.is_first and drawn.can_be_seen(preview)
            on_step_end = drawn if is_drawn else meter.on_step_end
            sample_jobs(pipeline, model, processes.share(jobs), processes, on_step_end, is_one=is_one)
            if planned is not None:
                print(comparison(planned, meter.read()))
        processes.barrier()
        if processes.is_first:
            missing = [] if is_one else write_together(batch)
            if len(batch.jobs) > len(missing):
                print(one_line(f"wrote {batch.describe(len(jobs) - len(missing), len(batch.jobs) - len(jobs))}"))
            batch.raise_faults(missing)


def print_plan(model: Model, settings: SamplingSettings, devices: Devices | None = None) -> Plan:
    """Print what sampling one video will take, and the layouts of several devices; nothing is loaded.

    Raises:
        InputError: there is no such model or device.
    """
    quieten()
    device_type, free = target_device(model.device_name)
    # Where the model's own scheduler is not known, it is as all releases have it.
    plan = make_plan(
        parts_of(model, device_type),
        settings,
        model.execution,
        device_type,
        free,
        scheduler=model.scheduler or "euler",
        calls=model.calls(settings),
    )
    print(plan)
    if devices is not None:
        number = devices.number or count(devices, model)
        if number > 1:
            print("\n" + table(*rank(model, settings, devices, number)))
    return plan


def sample_jobs(
    pipeline: FlashI2VPipeline,
    model: Model,
    jobs: Sequence[Job],
    processes: Processes,
    on_step_end: StepCallback | PipelineCallback,
    *,
    is_one: bool = False,
) -> None:
    """Sample some videos into their files.

    Args:
        pipeline: as `model` loads it.
        model: where it comes from.
        jobs: the videos.
        processes: this one among all; of those that share a video one writes it.
        on_step_end: the pipeline's `callback_on_step_end`.
        is_one: there is no other video, so that its failure ends the run; of several, one that fails is reported and
            left out.

    Raises:
        SamplingError: the only video ended in NaN or infinity.
        flashi2v_data.errors.StorageError: a file cannot be written.
    """
    facts = model.source(pipeline).facts()
    hidden = None if processes.is_first else True
    if processes.is_first:
        for prompt in dict.fromkeys(job.request.prompt for job in jobs):
            if note := model.prompt_note(prompt):
                logger.warning(note)
    try:
        sampler = _sampler(pipeline, [job.request for job in jobs], processes, on_step_end)
        with tqdm(total=len(jobs), desc="videos", unit="video", disable=is_one or hidden, smoothing=0) as bar:
            for job in jobs:
                pipeline.set_progress_bar_config(disable=hidden, desc=job.path.stem, unit="step", leave=False)
                try:
                    made = sampler(job.request, job.image)
                except FloatingPointError as error:
                    if is_one:
                        raise SamplingError(str(error)) from None
                    logger.error("%s: %s", job.path.name, error)
                else:
                    if processes.writes:
                        record = job.origin | facts | _measured(pipeline, made)
                        save_video(job.path, enlarged(made.frames, job.request.scale), job.request.fps, record)
                        if is_one and job.strip is not None:
                            write_picture(job.strip, film_strip(job.image, made.frames), record)
                    if processes.is_first and (note := model.image_note(made.vae_psnr)):
                        logger.warning(note)
                bar.update()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(*() if is_one else (_GOES_ON,)) from None
    except StorageError as error:
        raise error if is_one else StorageError(f"{error}; once that is fixed, {_GOES_ON}") from error


def _sampler(
    pipeline: FlashI2VPipeline,
    requests: Sequence[Request],
    processes: Processes,
    on_step_end: StepCallback | PipelineCallback,
) -> Sampler:
    """Encode all prompts, and put the text encoder away, which is then no burden while videos are sampled."""
    prompts = [request.prompt for request in requests]
    prompts += [request.negative_prompt for request in requests if request.settings.uses_negative_prompt]
    length = requests[0].settings.max_sequence_length if requests else None
    texts = encode_prompts(pipeline, prompts, pipeline.execution, processes.device, length)
    put_away_text_encoder(pipeline, pipeline.execution, processes.device)
    return Sampler(pipeline, texts, on_step_end=on_step_end)


def _measured(pipeline: FlashI2VPipeline, sample: Sample) -> dict[str, Any]:
    """Return what a record says beside what the video was made from."""
    return {
        **({} if sample.calls is None else {"sampling_plan": sample.calls}),
        "first_frame_psnr": round(sample.first_frame_psnr, 2),
        "vae_psnr": round(sample.vae_psnr, 2),
        "dtype": dtype_name(pipeline.transformer),
        "decoding": sample.decoding,
        "device": str(pipeline._execution_device),
        "versions": versions(),
    }
