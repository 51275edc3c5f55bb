"""From records to batches, which can be resumed where they were delivered: the whole way of a sample.

sampler.StatefulDistributedSampler     says which sample is next, in which epoch
substitution.StandIns                  says which record to read for it: its own, or one that stands in
dataset.FlashI2VDataset.read           draws caption, crop in time and mirroring; reads the frames, in a worker
transforms.VideoTransform              crops and resizes them, into memory that the worker shares with the loader
StatefulLoader                         normalises them where they are wanted, and joins samples to batches
quarantine.Quarantine                  keeps what could not be read, for this run and later ones
"""

import copy
import logging
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flashi2v_data.captions.cleaning import CaptionCount, TextLoss
from flashi2v_data.errors import DecodeError, InputError
from flashi2v_data.loading.composer import ComposedSampler
from flashi2v_data.loading.config import Bucket, DataConfig, DataloaderParam
from flashi2v_data.loading.dataset import FlashI2VDataset, Sample
from flashi2v_data.loading.sampler import SampleKey, StatefulDistributedSampler
from flashi2v_data.loading.shared_memory import SharedArray
from flashi2v_data.loading.transforms import empty_video
from flashi2v_data.start_methods import clean_start
from flashi2v_data.store.reader import open_store
from flashi2v_data.workers import Limits, Task, WorkerLost, WorkerPool

logger = logging.getLogger(__name__)

# Which sample is next.
Order = StatefulDistributedSampler | ComposedSampler

# Long enough for a clip of a long video on a slow network disk, short beside the 300 and 600 s of the reference.
DECODE_TIMEOUT_SECONDS = 120.0
# A worker needs about 1 GiB with torch, transformers and a decoder of 4K video; more is a leak.
WORKER_MEMORY_GIB = 4.0
# Samples that each worker is given at a time, so that it works on while the trainer is busy.
_DEPTH = 2


class _Batch(TypedDict):
    caption: list[str]
    prompt_ids: Tensor  # (B, L) int64
    epoch: Tensor  # (B,) int64
    index: Tensor  # (B,) int64
    path: list[str]
    first_frame: list[int]  # of the crop in time, counted in the file
    flipped: list[bool]  # mirrored
    clip: list[bytes]  # keys of their features
    skipped: list[str]  # messages of the unreadable videos and faulty records that samples of this batch stand in for
    text_loss: list[TextLoss | None]  # what the text encoder does not get of captions; None where text was dropped


class Batch(_Batch, total=False):
    """B samples. T frames, H W height and width, L tokens."""

    video: Tensor  # (B, 3, T, H, W) float32 in [-1, 1]; without load_video_features
    prompt_mask: Tensor  # (B, L) int64; with return_prompt_mask
    video_features: dict[str, Tensor]  # stacked, (B, ...); with load_video_features
    text_features: dict[str, Tensor]  # stacked, (B, ...); with load_text_features
    columns: dict[str, Tensor]  # (B,) or (B, n) float32; with columns


def build_dataloader(
    config: DataConfig,
    *,
    seed: int,
    batch_size: int,
    rank: int = 0,
    num_replicas: int = 1,
    consumed_samples: int = 0,
    device: torch.device | str | None = None,
    provenance: Mapping[str, Any] | None = None,
    num_required: int | None = None,
    held_out: bool = False,
    bucket: Bucket | None = None,
) -> "StatefulLoader":
    """Make the training loader that data.json describes.

    Args:
        config: data.json.
        seed: of order, crops, caption choice and dropped text.
        batch_size: samples in one batch of this rank.
        rank: of this process among those that see different samples.
        num_replicas: how many those are.
        consumed_samples: samples that all ranks together have had; see also `StatefulLoader.load_state_dict`.
        device: where `video` is wanted; an accelerator is sent a quarter of the bytes, and normalises there. The
            default leaves everything on the CPU.
        provenance: what features must have been made from, where any are loaded; None accepts any.
        num_required: records that the store must hold at least; the default is one batch of all ranks.
        held_out: read the clips that `held_out_clips` keeps from training, instead of the others.
        bucket: read its clips alone.

    Raises:
        InputError: the store is missing, does not fit the config, or holds fewer records than required.
    """
    store = open_store(config.dataset_param.metafile_or_dir_path)
    num_required = batch_size * num_replicas if num_required is None else num_required
    if len(store) < num_required:
        raise InputError(
            f"{store.paths[0]} holds {len(store)} records, fewer than the {num_required} of one batch over all ranks: "
            "lower the batch size, or relax the filter"
        )
    dataset = FlashI2VDataset(
        store, config.dataset_param, seed=seed, provenance=provenance, held_out=held_out, bucket=bucket
    )
    sampler = StatefulDistributedSampler(
        len(dataset),
        rank=rank,
        num_replicas=num_replicas,
        shuffle=config.dataloader_param.shuffle,
        seed=seed,
        consumed_samples=consumed_samples,
        indices=dataset.indices,
    )
    return StatefulLoader(dataset, sampler, batch_size, config.dataloader_param, device)


def collate(samples: Sequence[Sample]) -> Batch:
    """Join samples into a batch; torch's own DataLoader takes it as `collate_fn` over a FlashI2VDataset."""
    batch: Batch = {
        "caption": [sample["caption"] for sample in samples],
        "prompt_ids": torch.stack([sample["prompt_ids"] for sample in samples]),
        "epoch": torch.tensor([sample["epoch"] for sample in samples]),
        "index": torch.tensor([sample["index"] for sample in samples]),
        "path": [sample["path"] for sample in samples],
        "first_frame": [sample["first_frame"] for sample in samples],
        "flipped": [sample["flipped"] for sample in samples],
        "clip": [sample["clip"] for sample in samples],
        "skipped": [message for sample in samples for message in sample["skipped"]],
        "text_loss": [sample["text_loss"] for sample in samples],
    }
    if "video" in samples[0]:
        batch["video"] = torch.stack([sample["video"] for sample in samples])
    if "prompt_mask" in samples[0]:
        batch["prompt_mask"] = torch.stack([sample["prompt_mask"] for sample in samples])
    if "columns" in samples[0]:
        batch["columns"] = {
            name: torch.stack([sample["columns"][name] for sample in samples]) for name in samples[0]["columns"]
        }
    for name in ("video_features", "text_features"):
        if name in samples[0]:
            batch[name] = _stack_features([sample[name] for sample in samples])
    return batch


def _stack_features(features: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    shapes = [{part: tuple(tensor.shape) for part, tensor in tensors.items()} for tensors in features]
    if other := next((found for found in shapes if found != shapes[0]), None):
        raise InputError(f"features_path: {shapes[0]} and {other} do not fit into one batch: encode again, all alike")
    return {part: torch.stack([tensors[part] for tensors in features]) for part in features[0]}


class StatefulLoader:
    """An endless iterable of batches; its state is what was delivered, however much workers have read ahead.

    It has one position, so it is iterated in one place at a time: an iteration ends with an InputError when a newer one
    has begun, a state was loaded or the loader was closed.

    With `num_workers` 0 videos are decoded in this process, which a decoder that hangs or crashes takes along; with
    workers it costs one sample (see `workers.WorkerPool`). Batches are the same either way.

    Attributes:
        skipped: messages of the unreadable videos and faulty records met so far by this rank, each once.
        captions: how many captions of this rank's samples are empty, cut, or hold words unknown to the tokenizer.
    """

    def __init__(
        self,
        dataset: FlashI2VDataset,
        sampler: Order,
        batch_size: int,
        config: DataloaderParam,
        device: torch.device | str | None = None,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size must be 1 or more, got {batch_size}")
        if batch_size > 1 and dataset.table is not None and len({*map(dataset.shape_of, dataset.indices)}) > 1:
            raise InputError("clips of several buckets do not fit into one batch: set batch_size to 1")
        self.dataset = dataset
        self.batch_size = batch_size
        self.skipped: set[str] = set()
        self.captions = CaptionCount(dataset.config.tokenizer_max_length)
        self._told: dict[str, int] = {}  # how many of each kind the last warning was about
        self._sampler = sampler
        self._delivered: Any = sampler.state_dict()
        self._config = config
        self._pins = config.pin_memory and torch.accelerator.is_available()
        self._device = torch.device(device or "cpu")
        self._readers: _Readers | None = None
        self._live: object = None  # the token of the iteration that may go on

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches without end, from the first that was not delivered yet.

        Raises:
            DecodeError: more than 100 videos in a row are unreadable.
            InputError: the store, or features, are gone; or another iteration has taken the place of this one.
        """
        return _Iteration(self)

    def _next(self, iteration: "_Iteration") -> Batch:
        if iteration.samples is None:
            self._live = iteration.token
            sampler = copy.copy(self._sampler)
            sampler.load_state_dict(self._delivered)
            iteration.samples = self._read_ahead(sampler) if self._config.num_workers else self._read_here(sampler)
        elif self._live is not iteration.token or iteration.process != os.getpid():
            raise InputError(
                "this iteration of the loader has ended: a newer one has begun, a state was loaded, the loader was "
                "closed, or this is another process; iterate anew, or build a loader for each use"
            )
        batch = self._collate(iteration.samples)
        self._sampler.advance(self._delivered, self.batch_size)
        self._note(batch)
        return batch

    def close(self) -> None:
        """End the workers now, rather than when the loader is collected; iterating again starts new ones."""
        self._live = None
        if self._readers is not None:
            self._readers.pool.close()
            self._readers = None

    def _read_here(self, sampler: Order) -> Iterator[tuple[Sample, NDArray[np.uint8]]]:
        memory = np.empty(self.dataset.memory_size, np.uint8)
        for key in sampler:
            yield self.dataset.read_some(key, memory), memory

    def _read_ahead(self, sampler: Order) -> Iterator[tuple[Sample, NDArray[np.uint8]]]:
        if self._readers is None:
            self._readers = self._start_readers()
        (pool, pictures, process), keys = self._readers, iter(sampler)
        if process != os.getpid():
            raise InputError(
                "the loader's workers belong to the process that this one was forked from: build a loader here"
            )
        pool.forget()  # of an iteration that was left: its slots are used again
        free = [*range(len(pictures))]
        pending: deque[tuple[_Read, Iterator[int], list[str], _Reading]] = deque()
        stand_ins = self.dataset.stand_ins
        while True:
            while free:
                key, skipped = next(keys), list[str]()
                candidates = stand_ins.candidates(key, skipped)
                read = _Read(key, next(candidates), free.pop())
                pending.append((read, candidates, skipped, pool.submit(read)))
            read, candidates, skipped, reading = pending.popleft()
            while True:
                try:
                    outcome, whole_file = pool.result(reading), False
                except WorkerLost as lost:
                    outcome, whole_file = DecodeError(self.dataset.store[read.record]["path"], str(lost)), True
                if not isinstance(outcome, DecodeError):
                    break
                skipped.append(stand_ins.note(read.record, outcome, whole_file=whole_file))
                read = read._replace(record=next(candidates))
                reading = pool.submit(read)
            outcome["skipped"] = skipped
            yield outcome, pictures[read.slot]
            free.append(read.slot)

    def _start_readers(self) -> "_Readers":
        config = self._config
        limits = Limits(
            config.decode_timeout_seconds or DECODE_TIMEOUT_SECONDS,
            int((config.worker_memory_gib or WORKER_MEMORY_GIB) * 2**30),
            config.worker_max_samples,
        )
        memory = SharedArray((_DEPTH * config.num_workers, self.dataset.memory_size))
        reader = _Reader(self.dataset, memory)
        pool = WorkerPool(
            reader, config.num_workers, limits, start=clean_start(preload="flashi2v_data.loading.dataset"), depth=_DEPTH
        )
        return _Readers(pool, memory.array, os.getpid())

    def _collate(self, samples: Iterator[tuple[Sample, NDArray[np.uint8]]]) -> Batch:
        """Stack the next samples; pictures are taken from memory that is used again for the next ones."""
        taken: list[Sample] = []
        pictures = video = None
        for place in range(self.batch_size):
            sample, memory = next(samples)
            taken.append(sample)
            if not len(memory):
                continue
            read = torch.from_numpy(self.dataset.pictures(sample["index"], memory))
            if video is None:
                pictures, video = self._reserve(read.shape)
            if pictures is not None:
                pictures[place].copy_(read)
            else:
                self.dataset.transform.normalise(read, video[place])
        batch = collate(taken)
        if self._pins:
            _pin(batch)
        if video is not None:
            if pictures is not None:
                for source, target in zip(pictures.to(self._device, non_blocking=True), video):
                    self.dataset.transform.normalise(source, target)
            batch["video"] = video
        return batch

    def _reserve(self, of_one: torch.Size) -> tuple[Tensor | None, Tensor]:
        """Make room for a batch's `video`, and for its pictures where they are normalised on an accelerator."""
        num_frames, colours, height, width = of_one
        shape = (self.batch_size, colours, num_frames, height, width)
        if self._device.type != "cpu":
            pictures = torch.empty((self.batch_size, *of_one), dtype=torch.uint8, pin_memory=self._pins)
            return pictures, torch.empty(shape, device=self._device)
        return None, torch.empty(shape, pin_memory=True) if self._pins else empty_video(shape)

    def _note(self, batch: Batch) -> None:
        # Here rather than in the dataset: workers' own logs and counts would not reach the trainer.
        for message in batch["skipped"]:
            if message not in self.skipped:
                self.skipped.add(message)
                logger.warning("%s; another clip takes its place", message)
        for path, loss in zip(batch["path"], batch["text_loss"]):
            if loss is not None:
                self.captions.add(loss, path)
        for kind, line in self.captions.lines().items():
            count = getattr(self.captions, kind)
            if count >= 10 * self._told.get(kind, 0):  # at the first, and now and then
                self._told[kind] = count
                logger.warning("%s", line)

    def state_dict(self) -> dict[str, Any]:
        """Return where the delivered batches end."""
        return {**self._delivered}

    def load_state_dict(self, state: Any) -> None:
        """Continue after the batches of a state, at the next `iter()`; the number of ranks may differ.

        Raises:
            InputError: the state belongs to other data or another seed.
        """
        sampler = copy.copy(self._sampler)
        sampler.load_state_dict(state)
        self._delivered = sampler.state_dict()
        self._live = None


def _pin(batch: Batch) -> None:
    batch["prompt_ids"] = batch["prompt_ids"].pin_memory()
    if "prompt_mask" in batch:
        batch["prompt_mask"] = batch["prompt_mask"].pin_memory()
    for features in (batch.get("video_features", {}), batch.get("text_features", {})):
        features |= {part: tensor.pin_memory() for part, tensor in features.items()}


class _Iteration(Iterator[Batch]):
    """One run through the samples, in the process that began it; the newest of a loader alone goes on."""

    def __init__(self, loader: StatefulLoader) -> None:
        self._loader = loader
        self.token = object()
        self.process = os.getpid()
        self.samples: Iterator[tuple[Sample, NDArray[np.uint8]]] | None = None  # from the first batch on

    def __next__(self) -> Batch:
        return self._loader._next(self)


class _Read(NamedTuple):
    """A sample to read."""

    key: SampleKey
    record: int
    slot: int  # of the shared memory, where its pictures go


_Reading = Task[_Read, Sample | DecodeError]


class _Reader:
    """What a worker does; an unreadable clip is an outcome, not an error."""

    def __init__(self, dataset: FlashI2VDataset, memory: SharedArray) -> None:
        self.dataset = dataset
        self.memory = memory

    def __call__(self, read: _Read) -> Sample | DecodeError:
        # More workers, not more threads in each, make use of a machine.
        torch.set_num_threads(1)
        try:
            return self.dataset.read(read.key, read.record, self.memory.array[read.slot])
        except DecodeError as error:
            return error


class _Readers(NamedTuple):
    """The workers, the memory in which they leave pictures, (slots, bytes), and the process that started them."""

    pool: WorkerPool[_Read, Sample | DecodeError]
    pictures: NDArray[np.uint8]
    process: int
