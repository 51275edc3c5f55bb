"""The command `flashi2v-train init`, from its options to the files."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flashi2v_data.atomic import atomic_directory, check_directory
from flashi2v_data.captions.cleaning import clean_caption
from flashi2v_data.console import importing
from flashi2v_data.curation.folder import write_meta
from flashi2v_data.curation.rules import REASONS
from flashi2v_data.errors import DecodeError, InputError
from flashi2v_data.records import printable
from flashi2v_data.video.decode import read_frames
from flashi2v_train.start import base as bases
from flashi2v_train.start import files, videos
from flashi2v_train.start.proposal import Proposal, propose

if TYPE_CHECKING:
    from flashi2v_train.start.memory import Fit

# As much as these say of a set, in lines.
_SHOWN = 10
_BATCH = 8  # samples of a step
_STEPS = (2000, 300)  # of a large model, of a small one
_RANKS = (32, 16)  # likewise


def prepare(
    run: Path,
    source: Path,
    start: str,
    size: str | None,
    frames: int | None,
    mixes: bool,
    steps: int | None,
    device: str,
    gib: float | None,
    processes: int | None,
    lora: bool,
    lora_rank: int | None,
    lora_from: str | None,
) -> str:
    """Write the files of a run, and return what is said of them; nothing is written where something is wrong.

    Raises:
        InputError: the videos, the model, the device, or the directory is not fit for it.
    """
    check_directory(run, "RUN")
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise InputError(f"{run} exists: name a new directory, or remove it")
    given = _size(size)
    base = bases.find(start, run)
    jobs = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = videos.look(source, jobs)
    annotation, store = run / "videos.txt", run / "store"
    least = 1 if found.num_images else None
    proposal = propose(found.clips, base, given, frames, str(annotation), str(store), mixes=mixes, least_frames=least)
    with importing():
        from flashi2v_train.start import memory
        from flashi2v_train.start.words import extend
    device, gib, processes = memory.device_of(device, gib, processes)
    held_out = max(1, min(8, len(proposal.main) // 10)) if len(proposal.main) > 3 else 0
    batch = min(max(_BATCH, processes), len(proposal.kept) - held_out) // processes * processes
    if not batch:
        raise InputError(f"{len(proposal.kept)} clips are fewer than {processes} devices: use fewer (--nproc-per-node)")
    chosen = _held_out(proposal, held_out)
    with atomic_directory(run) as directory:
        length, told = base.predictor.get("text_len", 512), [_of_videos(found, mixes), _of_clips(proposal, held_out)]
        if base.copies is not None:
            words = extend(base.copies, directory / "base", found.captions, length, seed=0)
            length = words.length
            told.append(_of_words(words.new, words.unknown, words.cut, length, words.told_apart))
        image, prompt = directory / "first_frame.png", chosen.entry.cap
        Image.fromarray(_first_frame(chosen)).save(image)
        prompt = clean_caption(prompt[0] if isinstance(prompt, list) else prompt, True)
        plan = files.Plan(
            run, base, proposal.settings, proposal.size.num_frames, mixes, length, held_out, device, processes, batch,
            steps or _STEPS[base.is_small], image, prompt, _lora(base, lora, lora_rank, lora_from),
        )  # fmt: skip
        _write_list(found, directory, run)
        (directory / "filter.yaml").write_text(files.filter_yaml(plan), "utf-8")
        (directory / "data.json").write_text(files.data_json(plan), "utf-8")
        (directory / "model.json").write_text(files.model_json(plan), "utf-8")
        fit = _fit(plan, directory, gib)
        told.append(fit.table(gib))
        script = directory / "run.sh"
        script.write_text(files.run_sh(plan, files.as_words(fit.saving.options), fit.micro_batch), "utf-8")
        script.chmod(0o755)
    told += [f"download     {what}, {size}: {command}" for command, what, size in base.downloads]
    where = f"{fit.micro_batch} at a time on {processes} x {device}"
    told.append(f"batch        {batch} clips a step, {where}: {fit.gib:.1f} GiB of {gib:.1f}; {plan.steps} steps")
    told.append(f"\nwrote {run}: filter.yaml, data.json, model.json, run.sh; now: bash {run}/run.sh")
    return "\n".join(told)


def _lora(base: bases.Base, lora: bool, rank: int | None, start: str | None) -> dict[str, Any]:
    """Return the options of adapters; none where all weights are trained.

    Raises:
        InputError: an adapter to go on with has a rank of its own.
    """
    if rank is not None and start is not None:
        raise InputError("--lora-rank is said by the adapter of --lora-from: leave it out")
    if not (lora or rank or start):
        return {}
    options: dict[str, Any] = {"lora_from": start} if start else {"lora_rank": rank or _RANKS[base.is_small]}
    # A text-to-video trunk lacks what reads the first frame.
    return options | ({"lora_also": ["learnable_proj", "fourier_embedding"]} if base.is_trunk else {})


def _size(size: str | None) -> tuple[int, int] | None:
    if size is None:
        return None
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size)
    if match is None:
        raise InputError(f"--size: expected HEIGHTxWIDTH such as 480x832, got {size!r}")
    return int(match[1]), int(match[2])


def _fit(plan: files.Plan, directory: Path, gib: float) -> "Fit":
    from flashi2v_model.weights.libraries import quieten
    from flashi2v_train.config import read_run_config
    from flashi2v_train.options import TrainOptions
    from flashi2v_train.start import memory

    quieten()
    config = read_run_config(TrainOptions(**files.as_options(plan, directory)))
    return memory.fit(config, plan.processes, gib, plan.batch, on_cpu=plan.device == "cpu")


def _write_list(found: videos.Videos, directory: Path, run: Path) -> None:
    """Write the annotation file, and the meta JSON of a folder, which names itself by where it will be."""
    if not found.annotations:
        write_meta(directory / "videos.json", found.entries)
        lines = [(".", str(run / "videos.json"))]
    else:
        lines = [(root, meta) for root, meta in found.annotations]
    quoted = (",".join('"' + name.replace('"', '""') + '"' for name in line) for line in lines)
    text = "# root of the videos, meta JSON\n" + "".join(f"{line}\n" for line in quoted)
    (directory / "videos.txt").write_text(text, "utf-8", errors="surrogateescape")


def _held_out(proposal: Proposal, number: int) -> videos.Clip:
    """Return the first clip that will be held out, as the store holds clips in the order of their list."""
    total = len(proposal.main)
    return proposal.main[total // (2 * number)] if number else proposal.kept[0]


def _first_frame(clip: videos.Clip) -> NDArray[np.uint8]:
    start = clip.entry.cut[0] if isinstance(clip.entry.cut, list) else 0
    try:
        return read_frames(clip.entry.path, [start])[0]
    except DecodeError as error:
        raise InputError(str(error)) from None


def _listed(title: str, names: Sequence[str]) -> list[str]:
    more = [f"  and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return [title, *(f"  {name}" for name in names[:_SHOWN]), *more] if names else []


def _of_videos(found: videos.Videos, mixes: bool) -> str:
    sizes = sorted({(clip.info.width, clip.info.height) for clip in found.clips})
    rates = sorted({clip.info.fps for clip in found.clips})
    lengths = sorted(clip.info.num_frames / clip.info.fps for clip in found.clips)
    lines = [
        f"videos       {found.total} with captions, {len(found.clips)} opened: "
        f"{sizes[0][0]}x{sizes[0][1]} to {sizes[-1][0]}x{sizes[-1][1]}, {rates[0]:.4g} to {rates[-1]:.4g} fps, "
        f"{lengths[0]:.1f} to {lengths[-1]:.1f} s"
    ]
    if found.num_images:
        fate = "are clips of one frame" if mixes else "are shorter than a sample, and are left out: --buckets"
        lines.append(f"  {found.num_images} images among them {fate}")
    lines += _listed("without a caption, left out:", [printable(path) for path in found.without_caption])
    lines += _listed("cannot be read:", [f"{printable(path)}: {reason}" for path, reason in found.unreadable])
    return "\n".join(lines)


def _of_clips(proposal: Proposal, held_out: int) -> str:
    frames, height, width = proposal.size
    rate = proposal.settings.train_fps
    fitting = f"{len(proposal.kept)} of the opened clips fit, {held_out} of them are held out"
    lines = [f"samples      {frames} frames of {height}x{width} at {rate:g} fps: {fitting}"]
    lines += [f"  bucket {bucket}: {number} of the opened clips" for bucket, number in proposal.buckets.items()]
    lines += [f"  {number} dropped: {REASONS[reason]}" for reason, number in proposal.dropped.items()]
    return "\n".join(lines)


def _of_words(new: list[str], unknown: list[str], cut: int, length: int, told_apart: float) -> str:
    lines = [
        f"words        {len(new)} are new to the model: {', '.join(new[:_SHOWN])}{', ...' if new[_SHOWN:] else ''}"
    ]
    if new:
        lines.append(f"  the text encoder tells {told_apart:.0%} of them apart in the captions")
    if unknown:
        lines.append(f"  {len(unknown)} stay unknown, the rarest: {', '.join(unknown[:_SHOWN])}")
    if cut:
        lines.append(f"  {cut} captions are longer than {length} tokens: what is behind is not read")
    return "\n".join(lines)
