"""Batches of samples that can be resumed where they were delivered."""

import logging
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flashi2v_data.config import DataConfig, DataloaderParam
from flashi2v_data.dataset import FlashI2VDataset, Sample
from flashi2v_data.errors import DecodeError, InputError
from flashi2v_data.sampler import SampleKey, SamplerState, StatefulDistributedSampler
from flashi2v_data.shared_memory import SharedArray
from flashi2v_data.store import open_store
from flashi2v_data.transforms import empty_video
from flashi2v_data.workers import Limits, Task, WorkerLost, WorkerPool, clean_start

logger = logging.getLogger(__name__)

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
    skipped: list[str]  # messages of the unreadable videos that samples of this batch stand in for


class Batch(_Batch, total=False):
    """B samples. T frames, H W height and width, L tokens."""

    video: Tensor  # (B, 3, T, H, W) float32 in [-1, 1]; without load_video_features
    prompt_mask: Tensor  # (B, L) int64; with return_prompt_mask
    video_features: dict[str, Tensor]  # stacked, (B, ...); with load_video_features
    text_features: dict[str, Tensor]  # stacked, (B, ...); with load_text_features


def build_dataloader(
    config: DataConfig,
    *,
    seed: int,
    batch_size: int,
    rank: int = 0,
    num_replicas: int = 1,
    consumed: int = 0,
    device: torch.device | None = None,
    made_by: Mapping[str, Any] | None = None,
    num_required: int | None = None,
) -> "StatefulLoader":
    """Make the training loader that data.json describes.

    Args:
        config: data.json.
        seed: of order, crops, caption choice and dropped text.
        batch_size: samples in one batch of this rank.
        rank: of this process among those that see different samples.
        num_replicas: how many those are.
        consumed: samples that all ranks together have had; see also `StatefulLoader.load_state_dict`.
        device: where `video` is wanted; an accelerator is sent a quarter of the bytes, and normalises there. The
            default leaves everything on the CPU.
        made_by: what features must have been made by, where any are loaded; None takes any.
        num_required: records that the store must hold at least; the default is one batch of all ranks.

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
    dataset = FlashI2VDataset(store, config.dataset_param, seed=seed, made_by=made_by)
    sampler = StatefulDistributedSampler(
        len(dataset),
        rank=rank,
        num_replicas=num_replicas,
        shuffle=config.dataloader_param.shuffle,
        seed=seed,
        consumed=consumed,
    )
    return StatefulLoader(dataset, sampler, batch_size, config.dataloader_param, device)


class StatefulLoader:
    """An endless iterable of batches; its state is what was delivered, however much workers have read ahead.

    With `num_workers` 0 videos are decoded in this process, which a decoder that hangs or crashes takes along; with
    workers it costs one sample (see `workers.WorkerPool`). Batches are the same either way.

    Attributes:
        skipped: unreadable videos met so far by this rank, each with its message once.
    """

    def __init__(
        self,
        dataset: FlashI2VDataset,
        sampler: StatefulDistributedSampler,
        batch_size: int,
        config: DataloaderParam,
        device: torch.device | None = None,
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.skipped: set[str] = set()
        self._sampler = sampler
        self._delivered = sampler.state_dict()
        self._config = config
        self._pins = config.pin_memory and torch.accelerator.is_available()
        self._device = device or torch.device("cpu")
        self._readers: _Readers | None = None

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches without end, from the first that was not delivered yet.

        Raises:
            DecodeError: more than 100 videos in a row are unreadable.
            InputError: the store, or features, are gone.
        """
        self._sampler.load_state_dict(self._delivered)
        samples = self._read_ahead() if self._config.num_workers else self._read_here()
        while True:
            batch = self._collate(samples)
            self._delivered["consumed"] += self.batch_size * self._sampler.num_replicas
            self._note(batch["skipped"])
            yield batch

    def close(self) -> None:
        """End the workers now, rather than when the loader is collected; iterating again starts new ones."""
        if self._readers is not None:
            self._readers.pool.close()
            self._readers = None

    def _read_here(self) -> Iterator[tuple[Sample, NDArray[np.uint8]]]:
        pictures = np.empty(self.dataset.pictures_shape, np.uint8)
        for key in self._sampler:
            yield self.dataset.read_some(key, pictures), pictures

    def _read_ahead(self) -> Iterator[tuple[Sample, NDArray[np.uint8]]]:
        if self._readers is None:
            self._readers = self._start_readers()
        (pool, pictures), keys = self._readers, iter(self._sampler)
        pool.forget()  # of an iteration that was left: its places are used again
        free = [*range(len(pictures))]
        pending: deque[tuple[_Read, list[str], _Reading]] = deque()
        while True:
            while free:
                key, skipped = next(keys), list[str]()
                read = _Read(key, self.dataset.choose(key, skipped), free.pop())
                pending.append((read, skipped, pool.submit(read)))
            read, skipped, reading = pending.popleft()
            while True:
                try:
                    outcome, whole_file = pool.result(reading), False
                except WorkerLost as lost:
                    outcome, whole_file = DecodeError(self.dataset.store[read.record]["path"], str(lost)), True
                if not isinstance(outcome, DecodeError):
                    break
                self.dataset.skip(read.record, outcome, skipped, whole_file=whole_file)
                read = read._replace(record=self.dataset.choose(read.key, skipped))
                reading = pool.submit(read)
            outcome["skipped"] = skipped
            yield outcome, pictures[read.place]
            free.append(read.place)

    def _start_readers(self) -> "_Readers":
        config = self._config
        limits = Limits(
            config.decode_timeout_seconds or DECODE_TIMEOUT_SECONDS,
            int((config.worker_memory_gib or WORKER_MEMORY_GIB) * 2**30),
            config.worker_max_samples,
        )
        memory = SharedArray((_DEPTH * config.num_workers, *self.dataset.pictures_shape))
        reader = _Reader(self.dataset, memory)
        pool = WorkerPool(
            reader, config.num_workers, limits, start=clean_start(preload="flashi2v_data.dataset"), depth=_DEPTH
        )
        return _Readers(pool, memory.array)

    def _collate(self, samples: Iterator[tuple[Sample, NDArray[np.uint8]]]) -> Batch:
        """Stack the next samples; pictures are taken from memory that is used again for the next ones."""
        taken: list[Sample] = []
        pictures, video = self._reserve()
        for place in range(self.batch_size):
            sample, memory = next(samples)
            taken.append(sample)
            if pictures is not None:
                pictures[place].copy_(torch.from_numpy(memory))
            elif video is not None:
                self.dataset.transform.finish(torch.from_numpy(memory), video[place])
        batch: Batch = {
            "caption": [sample["caption"] for sample in taken],
            "prompt_ids": self._stack([sample["prompt_ids"] for sample in taken]),
            "epoch": torch.tensor([sample["epoch"] for sample in taken]),
            "index": torch.tensor([sample["index"] for sample in taken]),
            "path": [sample["path"] for sample in taken],
            "first_frame": [sample["first_frame"] for sample in taken],
            "flipped": [sample["flipped"] for sample in taken],
            "clip": [sample["clip"] for sample in taken],
            "skipped": [message for sample in taken for message in sample["skipped"]],
        }
        if video is not None:
            if pictures is not None:
                for source, target in zip(pictures.to(self._device, non_blocking=True), video):
                    self.dataset.transform.finish(source, target)
            batch["video"] = video
        if "prompt_mask" in taken[0]:
            batch["prompt_mask"] = self._stack([sample["prompt_mask"] for sample in taken])
        for name in ("video_features", "text_features"):
            if name in taken[0]:
                first = taken[0][name]
                batch[name] = {part: self._stack([sample[name][part] for sample in taken]) for part in first}
        return batch

    def _reserve(self) -> tuple[Tensor | None, Tensor | None]:
        """Make room for a batch's `video`, and for its pictures where they are normalised on an accelerator."""
        num_frames, colours, height, width = self.dataset.pictures_shape
        shape = (self.batch_size, colours, num_frames, height, width)
        if num_frames == 0:
            return None, None
        if self._device.type != "cpu":
            pictures = torch.empty(
                (self.batch_size, *self.dataset.pictures_shape), dtype=torch.uint8, pin_memory=self._pins
            )
            return pictures, torch.empty(shape, device=self._device)
        return None, torch.empty(shape, pin_memory=True) if self._pins else empty_video(shape)

    def _stack(self, tensors: list[Tensor]) -> Tensor:
        stacked = torch.stack(tensors)
        return stacked.pin_memory() if self._pins else stacked

    def _note(self, skipped: list[str]) -> None:
        # Here rather than in the dataset: workers' own logs and counts would not reach the trainer.
        for message in skipped:
            if message not in self.skipped:
                self.skipped.add(message)
                logger.warning("%s; another clip stands in for it", message)

    def state_dict(self) -> SamplerState:
        """Return where the delivered batches end."""
        return {**self._delivered}

    def load_state_dict(self, state: SamplerState) -> None:
        """Continue after the batches of a state, at the next `iter()`; the number of ranks may differ.

        Raises:
            InputError: the state belongs to other data or another seed.
        """
        self._sampler.load_state_dict(state)
        self._delivered = {**state}


class _Read(NamedTuple):
    """A sample to read."""

    key: SampleKey
    record: int
    place: int  # of the pictures


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
            return self.dataset.read(read.key, read.record, self.memory.array[read.place])
        except DecodeError as error:
            return error


class _Readers(NamedTuple):
    """The workers, and the memory in which they leave pictures: (places, T, 3, H, W)."""

    pool: WorkerPool[_Read, Sample | DecodeError]
    pictures: NDArray[np.uint8]
