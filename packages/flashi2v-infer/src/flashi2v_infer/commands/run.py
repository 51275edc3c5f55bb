"""From what was asked for to files: one video is a batch of one.

A run finds its device, reads what the videos are made from, plans, loads the model, encodes all prompts, and samples
one video after the other into its file; several processes take turns in the list. Whatever the user can fix is found
before the model is loaded, wherever that is possible.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flashi2v_data.console import configure_logging, one_line
from flashi2v_data.errors import InputError, StorageError
from flashi2v_data.video.strips import film_strip
from flashi2v_infer.commands.batch import Batch, Job, read_batch, read_one, unfinished, write_together
from flashi2v_infer.commands.sampler import Sample, Sampler
from flashi2v_infer.config import InferenceConfig
from flashi2v_infer.errors import SamplingError
from flashi2v_infer.execution import Execution
from flashi2v_infer.files.export import save_video, write_picture
from flashi2v_infer.files.records import versions
from flashi2v_infer.load import ConfiguredModel, Model, ModelDirectory, dtype_name
from flashi2v_infer.pipeline import FlashI2VPipeline
from flashi2v_infer.placement import encode_prompts, put_away_text_encoder
from flashi2v_infer.plan.measured import Meter, comparison
from flashi2v_infer.plan.plan import Plan, make_plan, target_device
from flashi2v_infer.plan.skeleton import parts_of
from flashi2v_infer.processes import Processes, join_processes
from flashi2v_infer.settings import Request, SamplingSettings
from flashi2v_model.config import SchedulerName
from flashi2v_model.weights.libraries import quieten

logger = logging.getLogger(__name__)

_GOES_ON = "the same command with --resume goes on from here"


def sample_batch(
    config: InferenceConfig,
    execution: Execution,
    seed: int | None = None,
    *,
    resume: bool = False,
    strips: Path | None = None,
    plan: bool = False,
    dry_run: bool = False,
) -> None:
    """Sample every prompt and image of a configuration file into its `save_path`.

    Args:
        config: of inference_model.json.
        execution: how to compute.
        seed: instead of the file's.
        resume: leave videos alone that are finished.
        strips: a directory for film strips of the videos.
        plan: print what the run will take, and at the end what it took.
        dry_run: check everything that was given, and sample nothing.

    Raises:
        InputError: anything that the user can fix. At the end where some images could not be used: the other videos
            are written then.
        SamplingError: at the end where some videos could not be sampled.
    """
    model = ConfiguredModel(config, execution)

    def read() -> tuple[Batch, Sequence[Job]]:
        batch = read_batch(model.config, model.source(), seed, strips)
        return batch, unfinished(batch.jobs) if resume else batch.jobs

    _run(model, config.sampling, read, plan=plan, dry_run=dry_run)


def sample_one(
    model: str,
    request: Request,
    output: str,
    execution: Execution,
    *,
    scheduler: SchedulerName | None = None,
    strip: Path | None = None,
    plan: bool = False,
    dry_run: bool = False,
) -> None:
    """Sample one video.

    Args:
        model: a pipeline directory, or a hub id.
        request: what to sample.
        output: the video: .mp4, .gif or .webp, or a directory for its frames.
        execution: how to compute.
        scheduler: the sampler; None is the model's own.
        strip: a picture of some frames.
        plan: as of `sample_batch`, and `dry_run` likewise.
        dry_run: likewise.

    Raises:
        InputError: anything that the user can fix.
        SamplingError: sampling ended in NaN or infinity.
    """

    def read() -> tuple[Batch, Sequence[Job]]:
        batch = read_one(request, output, strip)
        return batch, batch.jobs

    directory = ModelDirectory(model, execution, scheduler)
    _run(directory, request.settings, read, plan=plan, dry_run=dry_run)


def plan_one(
    model: str, settings: SamplingSettings, execution: Execution, scheduler: SchedulerName | None = None
) -> None:
    """Print what sampling one video will take; nothing is loaded. Arguments as of `sample_one`.

    Raises:
        InputError: there is no such model or device.
    """
    quieten()
    _print_plan(ModelDirectory(model, execution, scheduler), settings)


def _print_plan(model: Model, settings: SamplingSettings) -> Plan:
    device_type, free = target_device(model.device_name)
    # Where the model's own scheduler is not known, it is as all releases have it.
    plan = make_plan(
        parts_of(model, device_type), settings, model.execution, device_type, free, scheduler=model.scheduler or "euler"
    )
    print(plan)
    return plan


def _run(
    model: Model,
    settings: SamplingSettings,
    read: Callable[[], tuple[Batch, Sequence[Job]]],
    *,
    plan: bool,
    dry_run: bool,
) -> None:
    """Do what a command says; `read` returns all videos, and those of them that are to be sampled."""
    quieten()
    if dry_run:
        model.check()
        if plan:
            _print_plan(model, settings)  # also for a device that is elsewhere
        else:
            model.settle()
        batch, jobs = read()
        print(one_line(f"would write {batch.describe(len(jobs))}"))
        batch.raise_faults()
        return
    with join_processes(model.device_name, model.execution.context_parallel_size) as processes:
        # What all processes would say alike is said by the first.
        configure_logging(logging.INFO if processes.is_first else logging.ERROR)
        settled = model.settle(processes.device)
        batch, jobs = read()
        if batch.directory is None and processes.num_replicas > 1:
            raise InputError(
                f"one video cannot be shared out among {processes.num_replicas} times "
                f"{model.execution.context_parallel_size} processes: start as many as --context-parallel-size says"
            )
        planned = _print_plan(model, settings) if plan and processes.is_first else None
        processes.barrier()  # before any of them finishes another
        if jobs:
            if batch.directory is not None:
                configure_logging(logging.INFO if processes.is_first else logging.WARNING)
            pipeline, meter = model.load(settled, processes.context), Meter(processes.device)
            sample_jobs(pipeline, model, processes.share(jobs), processes, meter, is_one=batch.directory is None)
            if planned is not None:
                print(comparison(planned, meter.read()))
        processes.barrier()
        if processes.is_first:
            missing = [] if batch.directory is None else write_together(batch, drawn=jobs)
            if len(batch.jobs) > len(missing):
                print(one_line(f"wrote {batch.describe(len(jobs) - len(missing), len(batch.jobs) - len(jobs))}"))
            batch.raise_faults(missing)


def sample_jobs(
    pipeline: FlashI2VPipeline,
    model: Model,
    jobs: Sequence[Job],
    processes: Processes,
    meter: Meter,
    *,
    is_one: bool = False,
) -> None:
    """Sample some videos into their files.

    Args:
        pipeline: as `model` loads it.
        model: where it comes from.
        jobs: the videos.
        processes: this one among all; of those that share a video one writes it.
        meter: measures the steps.
        is_one: there is no other video, so that its failure ends the run; of several, one that fails is reported and
            left out.

    Raises:
        SamplingError: the only video ended in NaN or infinity.
        flashi2v_data.errors.StorageError: a file cannot be written.
    """
    facts = model.source(pipeline).facts()
    hidden = None if processes.is_first else True
    try:
        sampler = _sampler(pipeline, [job.request for job in jobs], processes, meter)
        with tqdm(total=len(jobs), desc="videos", unit="video", disable=is_one or hidden, smoothing=0) as bar:
            for job in jobs:
                pipeline.set_progress_bar_config(disable=hidden, desc=job.path.stem, unit="step", leave=False)
                try:
                    sample = sampler(job.request, job.image)
                except FloatingPointError as error:
                    if is_one:
                        raise SamplingError(str(error)) from None
                    logger.error("%s: %s", job.path.name, error)
                else:
                    if processes.writes:
                        _write(job, sample, job.origin | facts | _measured(pipeline, sample))
                    if processes.is_first:
                        for remark in model.remarks(job.request.prompt, sample.vae_psnr):
                            logger.warning(remark)
                bar.update()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(*() if is_one else (_GOES_ON,)) from None
    except StorageError as error:
        raise error if is_one else StorageError(f"{error}; once that is fixed, {_GOES_ON}") from error


def _sampler(pipeline: FlashI2VPipeline, requests: Sequence[Request], processes: Processes, meter: Meter) -> Sampler:
    """Encode all prompts, and put the text encoder away, which is then no burden while videos are sampled."""
    prompts = [request.prompt for request in requests]
    prompts += [request.negative_prompt for request in requests if request.settings.uses_negative_prompt]
    length = requests[0].settings.max_sequence_length if requests else None
    texts = encode_prompts(pipeline, prompts, pipeline.execution, processes.device, length)
    put_away_text_encoder(pipeline, pipeline.execution, processes.device)
    return Sampler(pipeline, texts, on_step_end=meter.on_step_end)


def _write(job: Job, sample: Sample, record: dict[str, Any]) -> None:
    save_video(job.path, sample.frames, job.request.fps, record)
    if job.strip is not None:
        write_picture(job.strip, film_strip(job.image, sample.frames), record)


def _measured(pipeline: FlashI2VPipeline, sample: Sample) -> dict[str, Any]:
    """Return what a record says beside what the video was made from."""
    return {
        "first_frame_psnr": round(sample.first_frame_psnr, 2),
        "vae_psnr": round(sample.vae_psnr, 2),
        "dtype": dtype_name(pipeline.transformer),
        "decoding": sample.decoding,
        "device": str(pipeline._execution_device),
        "versions": versions(),
    }
