"""Encoding ahead of training: every process encodes its share of the clips and captions into a store of its own."""

import contextlib
import itertools
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from flashi2v_data.atomic import atomic_file
from flashi2v_data.captions.cleaning import CaptionCount, TextLoss
from flashi2v_data.captions.tokenizer import Tokenizer, find_loss
from flashi2v_data.engines import Throughput
from flashi2v_data.errors import DecodeError
from flashi2v_data.loading.dataset import FlashI2VDataset
from flashi2v_data.loading.loader import StatefulLoader
from flashi2v_data.loading.sampler import SampleKey, StatefulDistributedSampler
from flashi2v_data.store.features import FeatureStore, FeatureWriter, feature_stores, remove_unbegun, text_key
from flashi2v_data.store.reader import open_store
from flashi2v_model.weights.libraries import quieten
from flashi2v_npu_ops.device import claim_device
from flashi2v_npu_ops.faults import device_faults_told
from flashi2v_train import processes
from flashi2v_train.config import RunConfig
from flashi2v_train.encode import Report
from flashi2v_train.features import Encoders
from flashi2v_train.provenance import REPORT, provenance
from flashi2v_train.world import rank_and_size

logger = logging.getLogger(__name__)

# Clips between two writes: as many are lost at most when the command is killed.
_BATCH = 16
# Processes wait for each other at the end only, when one may be hours behind; should one die, the launcher ends all.
_PATIENCE = timedelta(days=7)


class Cycle(StatefulDistributedSampler):
    """Some samples of the first epoch, again and again, as the loader reads ahead."""

    def __init__(self, num_samples: int, seed: int, indices: Sequence[int]) -> None:
        super().__init__(num_samples, seed=seed)
        self.indices = indices

    def __iter__(self) -> Iterator[SampleKey]:
        return itertools.cycle(SampleKey(0, index) for index in self.indices)


# What to do where the device's memory is full.
IF_FULL = "encode smaller clips (sample_height, sample_width, sample_num_frames)"


@device_faults_told(IF_FULL)
def encode(config: RunConfig, output: Path) -> None:
    """Encode this process's share of what a run trains on into a directory; the first process writes the report."""
    quieten()
    rank, size = rank_and_size()
    with ExitStack() as stack:
        if size > 1:
            dist.init_process_group("gloo", timeout=_PATIENCE)
            stack.callback(dist.destroy_process_group)
        stack.enter_context(processes.hold_directory(output, "--output", dist.group.WORLD if size > 1 else None))
        if rank == 0:
            remove_unbegun(output)  # what a process left that was killed while it made a store
        if size > 1:
            dist.barrier()
        _encode_share(config, output, rank, size)


def _encode_share(config: RunConfig, output: Path, rank: int, size: int) -> None:
    device = claim_device(config.options.device)
    store = open_store(config.data.dataset_param.metafile_or_dir_path)
    dataset = FlashI2VDataset(store, config.data.dataset_param, seed=config.options.seed)
    encoders = Encoders(config, device)
    origin = provenance(config)
    mine = dataset.indices[rank::size]
    captions, count = find_captions(dataset, mine)
    # Before any process writes: a store is read without locks, and must not be open twice in a process.
    clips, missing = _not_stored(output, origin, dataset, mine, captions)
    if rank == 0:
        (output / REPORT).unlink(missing_ok=True)  # until this end, too, is reached
    if size > 1:
        dist.barrier()
    loader = StatefulLoader(
        dataset, Cycle(len(store), config.options.seed, clips), 1, config.data.dataloader_param, device
    )
    with contextlib.closing(loader), FeatureWriter(output / f"process_{rank:04d}.lmdb", origin) as writer:
        throughput = new_throughput()
        seconds = write_clips(writer, encoders, loader, len(clips), quiet=rank > 0)
        write_captions(writer, encoders, dataset.tokenizer, missing, quiet=rank > 0)
    done = [(len(mine), loader.skipped, captions, count, (len(clips), *seconds))]
    if size > 1:
        everyones: list[Any] = [None] * size
        dist.all_gather_object(everyones, done[0])
        done = everyones
    if rank == 0:
        numbers, unreadable, texts, counts, times = zip(*done, strict=True)
        for each in times:
            throughput.add(*each)
        log_throughput(throughput, size)
        count = counts[0]
        for other in counts[1:]:
            count.merge(other)
        write_report(output, sum(numbers), set().union(*unreadable), len(set().union(*texts)), count)


def log_throughput(throughput: Throughput, num_encoders: int) -> None:
    """Say how quickly clips were encoded, if any were."""
    if throughput.num_clips:
        logger.info("encode: %s", throughput.describe(num_encoders))


def write_report(output: Path, clips: int, unreadable: Iterable[str], captions: int, total: CaptionCount) -> None:
    """Write the report, and warn of captions.

    Args:
        output: the folder.
        clips: records that are encoded, or that others stand in for.
        unreadable: messages of what could not be read.
        captions: distinct ones, the empty one among them.
        total: what of them the text encoder does not get.
    """
    for line in total.lines().values():
        logger.warning(line)
    report = Report(
        clips=clips,
        unreadable=sorted(unreadable),
        captions=captions,
        empty_captions=total.empty,
        cut_captions=total.cut,
        captions_with_unknown_words=total.unknown,
    )
    with atomic_file(output / REPORT) as path:
        path.write_text(report.model_dump_json(indent=1) + "\n")


def write_clips(
    writer: FeatureWriter, encoders: Encoders, loader: StatefulLoader, number: int, *, quiet: bool
) -> tuple[float, float]:
    """Encode the next clips of a loader without end; return the seconds of encoding, and of waiting for decoders."""
    waiting: dict[bytes, dict[str, Tensor]] = {}
    begun, waited = time.monotonic(), 0.0
    # Without any to encode there is nothing to begin to read.
    batches = iter(itertools.islice(loader, number) if number else ())
    with tqdm(desc="clips", total=number, disable=quiet or None, unit="clip") as progress:
        while True:
            asked = time.monotonic()
            batch = next(batches, None)
            waited += time.monotonic() - asked
            if batch is None:
                break
            waiting[batch["clip"][0]] = encoders.clip(batch, 0)
            if len(waiting) >= _BATCH:
                writer.put(waiting)
                waiting.clear()
            progress.update()
    writer.put(waiting)
    return time.monotonic() - begun - waited, waited


def new_throughput() -> Throughput:
    """Return what counts clips and the seconds that `write_clips` returns."""
    return Throughput("encoders", "encoding", "devices", "decoders")


def write_captions(
    writer: FeatureWriter, encoders: Encoders, tokenizer: Tokenizer, captions: Sequence[str], *, quiet: bool
) -> None:
    with tqdm(desc="captions", total=len(captions), disable=quiet or None, unit="caption") as progress:
        for begin in range(0, len(captions), _BATCH):
            group = captions[begin : begin + _BATCH]
            writer.put({text_key(caption): encoders.caption(*tokenizer(caption)) for caption in group})
            progress.update(len(group))


def _not_stored(
    output: Path, origin: dict[str, Any], dataset: FlashI2VDataset, indices: Sequence[int], captions: set[str]
) -> tuple[list[int], list[str]]:
    """Return the records and captions, of those given, that no store of the folder holds yet."""
    if not feature_stores(output):
        return [*indices], sorted(captions)
    stored = FeatureStore(output, origin)
    clips = [index for index in indices if not is_stored(stored, dataset, index)]
    return clips, [caption for caption in sorted(captions) if text_key(caption) not in stored]


def is_stored(stored: FeatureStore, dataset: FlashI2VDataset, index: int) -> bool:
    try:
        return dataset.clip_key(index) in stored
    except DecodeError:
        return False


def find_captions(dataset: FlashI2VDataset, indices: Sequence[int]) -> tuple[set[str], CaptionCount]:
    """Return all captions that training may see of some records, and the empty one, as they are tokenised.

    The count tells of what the text encoder does not get of them, each counted once.
    """
    captions = {""}
    count = CaptionCount(dataset.config.tokenizer_max_length)
    for caption, loss, path in caption_losses(dataset, indices):
        captions.add(caption)
        count.add(loss, path)
    return captions, count


def caption_losses(dataset: FlashI2VDataset, indices: Sequence[int]) -> Iterator[tuple[str, TextLoss, str]]:
    """Yield every caption that training may see of some records once, what is lost of it, and a clip that has it."""
    seen: set[str] = set()
    for index in indices:
        with contextlib.suppress(DecodeError):  # a record at fault, for which another stands in
            for caption in dataset.captions(index):
                if caption not in seen:
                    seen.add(caption)
                    loss = find_loss(dataset.tokenizer, caption, dataset.tokenizer(caption))
                    yield caption, loss, str(dataset.store[index]["path"])
