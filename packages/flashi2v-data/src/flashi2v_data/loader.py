"""Batches of samples that can be resumed where they were delivered."""

import logging
import multiprocessing
from collections.abc import Iterator
from multiprocessing.context import BaseContext
from typing import TypedDict

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flashi2v_data.config import DataConfig, DataloaderParam
from flashi2v_data.dataset import FlashI2VDataset, Sample
from flashi2v_data.errors import DecodeError, InputError
from flashi2v_data.sampler import SampleKey, SamplerState, StatefulDistributedSampler
from flashi2v_data.store import open_store

logger = logging.getLogger(__name__)


class _Batch(TypedDict):
    video: Tensor  # (B, 3, T, H, W) float32 in [-1, 1]
    caption: list[str]
    prompt_ids: Tensor  # (B, L) int64
    epoch: Tensor  # (B,) int64
    index: Tensor  # (B,) int64
    path: list[str]
    first_frame: list[int]  # of the crop in time, counted in the file
    skipped: list[str]  # messages of the unreadable videos that samples of this batch stand in for


class Batch(_Batch, total=False):
    """B samples. T frames, H W height and width, L tokens."""

    prompt_mask: Tensor  # (B, L) int64; with return_prompt_mask


def build_dataloader(
    config: DataConfig,
    *,
    seed: int,
    batch_size: int,
    rank: int = 0,
    num_replicas: int = 1,
    consumed: int = 0,
) -> "StatefulLoader":
    """Make the training loader that data.json describes.

    Args:
        config: data.json.
        seed: of order, crops, caption choice and dropped text.
        batch_size: samples in one batch of this rank.
        rank: of this process among those that see different samples.
        num_replicas: how many those are.
        consumed: samples that all ranks together have had; see also `StatefulLoader.load_state_dict`.

    Raises:
        InputError: the store is missing, does not fit the config, or holds less than one batch of all ranks.
    """
    store = open_store(config.dataset_param.metafile_or_dir_path)
    if len(store) < batch_size * num_replicas:
        raise InputError(
            f"{store.paths[0]} holds {len(store)} records, fewer than the {batch_size * num_replicas} of one batch "
            "over all ranks: lower the batch size, or relax the filter"
        )
    dataset = FlashI2VDataset(store, config.dataset_param, seed=seed)
    sampler = StatefulDistributedSampler(
        len(dataset),
        rank=rank,
        num_replicas=num_replicas,
        shuffle=config.dataloader_param.shuffle,
        seed=seed,
        consumed=consumed,
    )
    return StatefulLoader(dataset, sampler, batch_size, config.dataloader_param)


class StatefulLoader:
    """An endless iterable of batches; its state is what was delivered, however much workers have read ahead.

    Attributes:
        skipped: unreadable videos met so far by this rank, each with its message once.
    """

    def __init__(
        self,
        dataset: FlashI2VDataset,
        sampler: StatefulDistributedSampler,
        batch_size: int,
        config: DataloaderParam,
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.skipped: set[str] = set()
        self._sampler = sampler
        self._delivered = sampler.state_dict()
        # Worker seeds do not matter: everything random comes from generators of its own.
        self._loader: DataLoader[Sample | DecodeError] = DataLoader(
            _Readable(dataset),
            batch_sampler=_Batches(sampler, batch_size),
            num_workers=config.num_workers,
            collate_fn=_collate_readable,
            pin_memory=config.pin_memory and torch.accelerator.is_available(),
            persistent_workers=config.num_workers > 0,
            multiprocessing_context=_worker_context() if config.num_workers > 0 else None,
        )

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches without end, from the first that was not delivered yet."""
        self._sampler.load_state_dict(self._delivered)
        for batch in self._loader:
            if isinstance(batch, DecodeError):
                # A new one: this frame would hold itself through it, and stop its workers only when collected.
                raise DecodeError(batch.path, batch.reason)
            self._delivered["consumed"] += self.batch_size * self._sampler.num_replicas
            self._note(batch["skipped"])
            yield batch

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


def _worker_context() -> BaseContext:
    """Start workers from a clean process: forked from one that has decoded or computed, they may deadlock."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # Torch is then imported once, not by every worker.
    context.set_forkserver_preload([__name__])
    return context


class _Readable(Dataset["Sample | DecodeError"]):
    """Returns the error of unreadable data: raised in a worker, it would arrive wrapped in the worker's traceback."""

    def __init__(self, dataset: FlashI2VDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, key: SampleKey) -> Sample | DecodeError:
        try:
            return self.dataset[key]
        except DecodeError as error:
            return error


def _collate_readable(samples: list[Sample | DecodeError]) -> Batch | DecodeError:
    readable: list[Sample] = []
    for sample in samples:
        if isinstance(sample, DecodeError):
            return sample
        readable.append(sample)
    return collate(readable)


class _Batches:
    """Lists of `batch_size` keys, without end."""

    def __init__(self, sampler: StatefulDistributedSampler, batch_size: int) -> None:
        self.sampler = sampler
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[SampleKey]]:
        keys = iter(self.sampler)
        while True:
            yield [next(keys) for _ in range(self.batch_size)]


def collate(samples: list[Sample]) -> Batch:
    """Stack samples."""
    batch: Batch = {
        "video": torch.stack([sample["video"] for sample in samples]),
        "caption": [sample["caption"] for sample in samples],
        "prompt_ids": torch.stack([sample["prompt_ids"] for sample in samples]),
        "epoch": torch.tensor([sample["epoch"] for sample in samples]),
        "index": torch.tensor([sample["index"] for sample in samples]),
        "path": [sample["path"] for sample in samples],
        "first_frame": [sample["first_frame"] for sample in samples],
        "skipped": [message for sample in samples for message in sample["skipped"]],
    }
    if "prompt_mask" in samples[0]:
        batch["prompt_mask"] = torch.stack([sample["prompt_mask"] for sample in samples])
    return batch
