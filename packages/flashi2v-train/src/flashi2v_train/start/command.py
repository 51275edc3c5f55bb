"""The command `flashi2v-train init`, from its options to the files."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from flashi2v_train.start.options import InitOptions
from flashi2v_train.start.proposal import Proposal, propose

if TYPE_CHECKING:
    from flashi2v_train.start.memory import Fit
    from flashi2v_train.start.words import Words

_SHOWN = 10  # of what is told of a set, in lines
_BATCH = 8  # samples of a step
_STEPS = (2000, 300)  # of a large model, of a small one
_RANKS = (32, 16)  # likewise


def prepare(run: Path, options: InitOptions) -> str:
    """Write the files of a run, and return what is said of them; nothing is written where something is wrong.

    Raises:
        InputError: the videos, the model, the device, or the directory is not fit for it.
    """
    check_directory(run, "RUN")
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise InputError(f"{run} exists: name a new directory, or remove it")
    options.pixels()  # before anything is opened
    base = bases.find(options.start, run)
    found = videos.look(options.videos)
    proposal = propose(found.clips, base, options, run, has_images=found.num_images > 0)
    with importing():
        from flashi2v_train.start import memory
        from flashi2v_train.start.words import extend
    devices = memory.devices_of(options)
    held_out = max(1, min(8, len(proposal.main) // 10)) if len(proposal.main) > 3 else 0
    batch = min(max(_BATCH, devices.number), len(proposal.kept) - held_out) // devices.number * devices.number
    if not batch:
        raise InputError(
            f"{len(proposal.kept)} clips are fewer than {devices.number} devices: use fewer (--nproc-per-node)"
        )
    told = [_of_videos(found, options.buckets), _of_clips(proposal, held_out)]
    with atomic_directory(run) as directory:
        length = base.predictor.get("text_len", 512)
        if base.copies is not None:
            words = extend(base.copies, directory / "base", found.captions, length, seed=0)
            length = words.length
            told.append(_of_words(words))
        plan = files.Plan(
            run, options, base, proposal.settings, proposal.size.num_frames, length, held_out, devices, batch,
            options.train_iters or _STEPS[base.is_small], _write_example(proposal, held_out, directory),
            _lora(base, options.lora, options.lora_rank, options.lora_from),
        )  # fmt: skip
        _write_list(found, directory, run)
        for name in files.SETTINGS:
            plan.write(directory, name)
        fit = _fit(plan, directory)
        plan.write(directory, "run.sh", fit)
        (directory / "run.sh").chmod(0o755)
    told.append(fit.table(devices.gib))
    told += [f"download     {each.what}, {each.size}: {each.command}" for each in base.downloads]
    where = f"{fit.micro_batch} at a time on {devices.number} x {devices.kind}"
    told.append(
        f"batch        {batch} clips a step, {where}: {fit.gib:.1f} GiB of {devices.gib:.1f}; {plan.steps} steps"
    )
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


def _fit(plan: files.Plan, directory: Path) -> "Fit":
    from flashi2v_model.weights.libraries import quieten
    from flashi2v_train.config import read_run_config
    from flashi2v_train.options import TrainOptions
    from flashi2v_train.start import memory

    quieten()
    return memory.fit(read_run_config(TrainOptions(**plan.as_options(directory))), plan.devices, plan.batch)


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


def _write_example(proposal: Proposal, held_out: int, directory: Path) -> str:
    """Write the first frame of a clip that is held out, as the store holds clips in the order of their list.

    Returns:
        what happens in it.
    """
    total = len(proposal.main)
    entry = (proposal.main[total // (2 * held_out)] if held_out else proposal.kept[0]).entry
    try:
        frame = read_frames(entry.path, [entry.cut[0] if isinstance(entry.cut, list) else 0])[0]
    except DecodeError as error:
        raise InputError(str(error)) from None
    Image.fromarray(frame).save(directory / "first_frame.png")
    return clean_caption(entry.cap[0] if isinstance(entry.cap, list) else entry.cap, True)


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


def _of_words(words: "Words") -> str:
    new, unknown = words.new, words.unknown
    shown = ", ".join([*new[:_SHOWN], *(["..."] if new[_SHOWN:] else [])])
    lines = [f"words        {len(new)} are new to the model: {shown}"]
    if new:
        lines.append(f"  the text encoder tells {words.told_apart:.0%} of them apart in the captions")
    if unknown:
        lines.append(f"  {len(unknown)} stay unknown, the rarest: {', '.join(unknown[:_SHOWN])}")
    if words.cut:
        lines.append(f"  {words.cut} captions are longer than {words.length} tokens: what is behind is not read")
    return "\n".join(lines)
