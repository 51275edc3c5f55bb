"""What the two modes of the command line do: a batch from a configuration file, or one video."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers import ModelMixin
from tqdm import tqdm

from flashi2v_data.atomic import check_directory
from flashi2v_data.console import configure_logging, one_line
from flashi2v_data.errors import InputError, StorageError
from flashi2v_data.loading.transforms import center_crop_resize
from flashi2v_data.video.strips import film_strip
from flashi2v_infer.commands.batch import Batch, Job, read_batch, strip_path, unfinished, write_together
from flashi2v_infer.commands.sampler import Sample, Sampler
from flashi2v_infer.config import InferenceConfig
from flashi2v_infer.errors import SamplingError
from flashi2v_infer.execution import Execution
from flashi2v_infer.files.export import check_name, check_output, check_picture, check_spared, save_video, write_picture
from flashi2v_infer.files.inputs import hash_file
from flashi2v_infer.files.pictures import read_image
from flashi2v_infer.files.records import Source, origin, versions
from flashi2v_infer.load import (
    check_model,
    check_parts,
    load_from_config,
    load_from_pretrained,
    settled_config,
    settled_device,
)
from flashi2v_infer.pipeline import FlashI2VPipeline
from flashi2v_infer.placement import encode_prompts, put_away_text_encoder
from flashi2v_infer.plan.measured import Meter, comparison
from flashi2v_infer.plan.plan import Plan, make_plan, target_device
from flashi2v_infer.plan.skeleton import Parts, parts_of_config, parts_of_model
from flashi2v_infer.processes import Processes, join_processes
from flashi2v_infer.settings import Request, SamplingSettings
from flashi2v_model.config import SchedulerName
from flashi2v_model.parallel import check_degree
from flashi2v_model.scheduler import make_scheduler
from flashi2v_model.weights.fingerprint import fingerprint
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
        InputError: anything that the user can mend; found before the model is loaded wherever that is possible. At
            the end where some images could not be used: the other videos are written then.
        SamplingError: at the end where some videos could not be sampled.
    """
    config = settled_config(config, execution)
    if strips is not None:
        if strips.suffix == ".png":
            raise InputError(f"--strip: {strips}: of a batch, name a directory, which gets video_0.png, ...")
        check_name(str(strips), "--strip")
        check_directory(strips, "--strip")
    quieten()

    def read() -> tuple[Batch, Sequence[Job]]:
        batch = read_batch(config, config.seed if seed is None else seed, execution.vae_tiling, execution.recipe)
        if strips is not None:
            for job in batch.jobs:
                check_spared(strip_path(strips, job.request.index), "--strip", job.request.image)
        return batch, unfinished(batch.jobs) if resume else batch.jobs

    def print_plan() -> Plan:
        return _print_plan(
            lambda kind: parts_of_config(config, execution),
            config.sampling,
            execution,
            config.device,
            config.diffusion.scheduler,
        )

    if dry_run:
        if plan:
            print_plan()  # also for a device that is elsewhere
        else:
            settled_device(execution, config.device)
        check_parts(config)
        check_degree(execution.context_parallel_size, config.predictor.num_heads)
        batch, jobs = read()
        print(one_line(f"would write {_videos(len(jobs))} to {batch.directory}"))
        _raise_faults(batch, [])
        return
    with join_processes(execution.device or config.device, execution.context_parallel_size) as processes:
        # What all processes would say alike is said by the first.
        configure_logging(logging.INFO if processes.is_first else logging.ERROR)
        batch, jobs = read()
        planned = print_plan() if plan and processes.is_first else None
        processes.barrier()  # before any of them finishes another
        if jobs:
            configure_logging(logging.INFO if processes.is_first else logging.WARNING)
            _sample_batch(config, execution, jobs, processes, planned)
        processes.barrier()
        if processes.is_first:
            missing = write_together(batch, strips)
            _report(batch, jobs, missing)


def _sample_batch(
    config: InferenceConfig, execution: Execution, jobs: Sequence[Job], processes: Processes, planned: Plan | None
) -> None:
    pipeline = load_from_config(config, replace(execution, device=str(processes.device)), processes.context)
    meter = Meter(processes.device)
    try:
        sample_jobs(pipeline, processes.share(jobs), execution, processes, meter)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_GOES_ON) from None
    except StorageError as error:
        raise StorageError(f"{error}; once that is mended, {_GOES_ON}") from error
    if planned is not None:
        print(comparison(planned, meter.read()))


def sample_jobs(
    pipeline: FlashI2VPipeline, jobs: Sequence[Job], execution: Execution, processes: Processes, meter: Meter
) -> None:
    """Sample some videos of a batch into their files; one that fails is reported, and costs only itself."""
    sampler = _sampler(pipeline, [job.request for job in jobs], execution, processes, meter)
    hidden = None if processes.is_first else True
    with tqdm(total=len(jobs), desc="videos", unit="video", disable=hidden, smoothing=0) as bar:
        for job in jobs:
            _show_steps(pipeline, job.path.stem, hidden)
            try:
                sample = sampler(job.request, job.image)
            except FloatingPointError as error:
                logger.error("%s: %s", job.path.name, error)
            else:
                if processes.writes:
                    save_video(job.path, sample.frames, job.request.fps, _record(pipeline, job.origin, sample))
            bar.update()


def _sampler(
    pipeline: FlashI2VPipeline, requests: Sequence[Request], execution: Execution, processes: Processes, meter: Meter
) -> Sampler:
    """Encode all prompts, and let go of the text encoder, which is then no burden while videos are sampled."""
    prompts = [request.prompt for request in requests]
    prompts += [request.negative_prompt for request in requests if request.settings.uses_negative_prompt]
    length = requests[0].settings.max_sequence_length if requests else None
    texts = encode_prompts(pipeline, prompts, execution, processes.device, length)
    put_away_text_encoder(pipeline, execution, processes.device)
    return Sampler(pipeline, texts, on_step_end=meter.on_step_end)


def _report(batch: Batch, sampled: Sequence[Job], missing: Sequence[Job]) -> None:
    num_there = len(batch.jobs) - len(missing)
    num_kept = len(batch.jobs) - len(sampled)
    if num_there:
        kept = f" ({num_kept} had been finished before)" if num_kept else ""
        print(one_line(f"wrote {_videos(num_there - num_kept)}{kept} and video_grid.mp4 to {batch.directory}"))
    _raise_faults(batch, missing)


def _raise_faults(batch: Batch, missing: Sequence[Job]) -> None:
    faults = []
    if missing:
        names = ", ".join(job.path.name for job in missing)
        faults.append(f"{names}: sampling failed, see above")
    if batch.bad_lines:
        lines = ", ".join(map(str, batch.bad_lines))
        word = "line" if len(batch.bad_lines) == 1 else "lines"
        faults.append(
            f"{batch.image_list} {word} {lines}: no usable image, see above: mend this and add --resume to sample only "
            "what is missing"
        )
    if faults:
        raise (SamplingError if missing else InputError)("; ".join(faults))


def _videos(number: int) -> str:
    return f"{number} video{'' if number == 1 else 's'}"


def plan_one(
    model: str, settings: SamplingSettings, execution: Execution, scheduler: SchedulerName | None = None
) -> Plan:
    """Print what sampling one video will take; nothing is loaded.

    Raises:
        InputError: there is no such model or device.
    """
    quieten()
    # The model's own scheduler is as all releases have it.
    return _print_plan(
        lambda kind: parts_of_model(model, execution, kind), settings, execution, "auto", scheduler or "euler"
    )


def _print_plan(
    parts: Callable[[str], Parts],
    settings: SamplingSettings,
    execution: Execution,
    device_name: str,
    scheduler: SchedulerName,
) -> Plan:
    kind, free = target_device(execution, device_name)
    plan = make_plan(parts(kind), settings, execution, kind, free, scheduler=scheduler)
    print(plan)
    return plan


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
) -> Sample | None:
    """Sample one video, and return it where this process has written it.

    Args:
        model: a pipeline directory, or a hub id.
        request: what to sample.
        output: the video: .mp4, .gif or .webp, or a directory for its frames.
        execution: how to compute.
        scheduler: the sampler; None is the model's own.
        strip: a picture of some frames.
        plan: print what the run will take, and at the end what it took.
        dry_run: check everything that was given, and sample nothing.

    Raises:
        InputError: anything that the user can mend; found before the model is loaded wherever that is possible.
        SamplingError: sampling ended in NaN or infinity.
    """
    path = check_output(output, request.fps, "--output")
    check_spared(path, "--output", request.image)
    if strip is not None:
        check_picture(strip, "--strip")
        check_spared(strip, "--strip", request.image)
    image, contents = read_image(request.image, "--image"), hash_file(request.image)
    image = center_crop_resize(image[None], request.settings.height, request.settings.width)[0]
    if dry_run:
        if plan:
            plan_one(model, request.settings, execution, scheduler)  # also for a device that is elsewhere
        else:
            check_model(model)
            settled_device(execution)
        print(one_line(f"would write {output}"))
        return None
    quieten()
    with join_processes(execution.device or "auto", execution.context_parallel_size) as processes:
        if processes.num_replicas > 1:
            raise InputError(
                f"one video cannot be shared out among {processes.num_replicas} times {execution.context_parallel_size}"
                " processes: start as many as --context-parallel-size says"
            )
        # What all processes would say alike is said by the first.
        configure_logging(logging.INFO if processes.is_first else logging.ERROR)
        execution = replace(execution, device=str(processes.device))
        planned = plan_one(model, request.settings, execution, scheduler) if plan and processes.is_first else None
        pipeline = load_from_pretrained(model, execution, processes.context)
        if scheduler is not None:
            pipeline.scheduler = make_scheduler(scheduler, _shift(pipeline))
        settings = {
            "dtype": _dtype(pipeline.transformer),
            "vae_dtype": _dtype(pipeline.vae),
            "vae_tiling": execution.vae_tiling,
            "network": {"recipe": execution.recipe} if execution.recipe else {},
            "scheduler": {**pipeline.scheduler.config, "_class_name": type(pipeline.scheduler).__name__},
        }
        source = Source(model, settings, {"pipeline": fingerprint(model)})
        _show_steps(pipeline, path.name, None if processes.is_first else True)
        meter = Meter(processes.device)
        try:
            sample = _sampler(pipeline, [request], execution, processes, meter)(request, image)
        except FloatingPointError as error:
            raise SamplingError(str(error)) from None
        if not processes.is_first:
            return None
        record = _record(pipeline, origin(request, contents, source), sample)
        save_video(path, sample.frames, request.fps, record)
        if strip is not None:
            write_picture(strip, film_strip(image, sample.frames), record)
        print(one_line(f"wrote {output}" + (f" and {strip}" if strip else "")))
        if planned is not None:
            print(comparison(planned, meter.read()))
        return sample


def _shift(pipeline: FlashI2VPipeline) -> float:
    """Return the sigma shift of the model's own scheduler."""
    config = pipeline.scheduler.config
    return float(config.get("shift", config.get("flow_shift", 1.0)))


def _dtype(module: ModelMixin) -> str:
    return str(module.dtype).removeprefix("torch.")


def _show_steps(pipeline: FlashI2VPipeline, name: str, disable: bool | None) -> None:
    pipeline.set_progress_bar_config(disable=disable, desc=name, unit="step", leave=False)


def _record(pipeline: FlashI2VPipeline, origin: dict[str, Any], sample: Sample) -> dict[str, Any]:
    return {
        **origin,
        "first_frame_psnr": round(sample.first_frame_psnr, 2),
        "vae_psnr": round(sample.vae_psnr, 2),
        "dtype": _dtype(pipeline.transformer),
        "decoding": sample.decoding,
        "device": str(pipeline._execution_device),
        "versions": versions(),
    }
