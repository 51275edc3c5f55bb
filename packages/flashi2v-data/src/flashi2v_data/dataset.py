"""Samples for training: decoded, cropped in time and space, with a cleaned and tokenised caption."""

import logging
from typing import TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset

from flashi2v_data.captions import clean_caption
from flashi2v_data.config import DatasetParam
from flashi2v_data.decode import read_frames, resolve_backend
from flashi2v_data.errors import DecodeError, InputError
from flashi2v_data.frames import frame_indices, frame_interval
from flashi2v_data.randomness import generator
from flashi2v_data.records import Record
from flashi2v_data.sampler import SampleKey
from flashi2v_data.store import LmdbStore
from flashi2v_data.tokenizer import Tokenizer, load_tokenizer
from flashi2v_data.transforms import build_transform

logger = logging.getLogger(__name__)

# So many unreadable videos in a row mean a wrong root or an unmounted disk, not bad luck.
MAX_SKIPPED_IN_A_ROW = 100


class _Sample(TypedDict):
    video: Tensor  # (3, T, H, W) float32 in [-1, 1]
    caption: str  # as tokenised: cleaned, or "" where the text was dropped
    prompt_ids: Tensor  # (L,) int64
    epoch: int
    index: int
    path: str
    first_frame: int  # of the crop in time, counted in the file
    skipped: list[str]  # messages of the unreadable videos that this one stands in for


class Sample(_Sample, total=False):
    """One sample. T frames, H W height and width, L tokens."""

    prompt_mask: Tensor  # (L,) int64, 1 for text; with return_prompt_mask


class FlashI2VDataset(Dataset[Sample]):
    """The clips of a store as training samples.

    A sample depends on `seed` and its key alone, not on worker, rank or what was read before. An unreadable video
    never stops a run: the next readable clip of the store stands in for it, and the sample says so in `skipped`.

    Args:
        store: from `open_store`.
        config: `dataset_param` of data.json.
        seed: of everything random: crop in time, choice among captions, dropped text.
        tokenizer: the default loads `text_tokenizer_path`.

    Raises:
        InputError: the store does not fit the config, or the tokenizer or decoder is missing.
    """

    def __init__(
        self, store: LmdbStore, config: DatasetParam, *, seed: int, tokenizer: Tokenizer | None = None
    ) -> None:
        if len(store) == 0:
            raise InputError(f"{store.paths[0]} holds no records: see the report beside it for why all were dropped")
        _check_fit(store, config)
        self.store = store
        self.config = config
        self.seed = seed
        self.transform = build_transform(config.transform_pipeline)
        self.decoder = resolve_backend(config.decoder)
        self.tokenizer = tokenizer or load_tokenizer(config.text_tokenizer_path, config.tokenizer_max_length)

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self.store)

    def __getitem__(self, key: SampleKey | int) -> Sample:
        """Return the sample of a record; a plain index means its first epoch.

        Raises:
            DecodeError: more than 100 videos in a row are unreadable.
            IndexError: there is no such record.
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        skipped: list[str] = []
        for offset in range(min(len(self), MAX_SKIPPED_IN_A_ROW + 1)):
            record = self.store[(index + offset) % len(self)]
            try:
                indices = self._indices(record, epoch, index)
                video = self.transform(read_frames(record["path"], indices, self.decoder))
            except DecodeError as error:
                skipped.append(str(error))
                continue
            return self._sample(record, video, indices[0], epoch, index, skipped)
        raise DecodeError(
            record["path"],
            f"nor the {len(skipped) - 1} before it; see `flashi2v-data inspect {self.store.paths[0]} --open-videos`",
        )

    def _indices(self, record: Record, epoch: int, index: int) -> list[int]:
        config = self.config
        interval = frame_interval(record["fps"], config.train_fps, config.sample_stride)
        indices = frame_indices(record["start_frame_idx"], record["num_frames"], interval)
        random = generator(self.seed, "crop", epoch, index)
        begin, end = temporal_crop(len(indices), config.sample_num_frames, random)
        if end - begin < config.sample_num_frames:
            raise DecodeError(
                record["path"], f"has {end} frames at the training rate, {config.sample_num_frames} are needed"
            )
        return indices[begin:end].tolist()

    def _sample(
        self, record: Record, video: Tensor, first_frame: int, epoch: int, index: int, skipped: list[str]
    ) -> Sample:
        caption = self._caption(record, epoch, index)
        tokens = self.tokenizer(caption)
        sample: Sample = {
            "video": video,
            "caption": caption,
            "prompt_ids": tokens.ids,
            "epoch": epoch,
            "index": index,
            "path": record["path"],
            "first_frame": first_frame,
            "skipped": skipped,
        }
        if self.config.return_prompt_mask:
            sample["prompt_mask"] = tokens.mask
        return sample

    def _caption(self, record: Record, epoch: int, index: int) -> str:
        if torch.rand((), generator=generator(self.seed, "drop", epoch, index)) < self.config.text_drop_ratio:
            return ""
        caption = record["cap"]
        if isinstance(caption, list):
            random = generator(self.seed, "caption", epoch, index)
            caption = caption[int(torch.randint(len(caption), (), generator=random))]
        return clean_caption(caption) if self.config.clean_captions else caption


def _check_fit(store: LmdbStore, config: DatasetParam) -> None:
    """A store holds clips that are long enough at one rate; another rate or length would fail clip by clip."""
    for key in ("train_fps", "sample_stride"):
        if key in store.config and store.config[key] != getattr(config, key):
            raise InputError(
                f"{store.paths[0]} was filtered with {key} {store.config[key]}, data.json says {getattr(config, key)}: "
                "set the same value, or filter again"
            )
    filtered = store.config.get("sample_num_frames", config.sample_num_frames)
    if config.sample_num_frames > filtered:
        raise InputError(
            f"{store.paths[0]} was filtered for {filtered} frames, data.json asks for {config.sample_num_frames}: "
            "filter again, or lower sample_num_frames"
        )


def temporal_crop(num_available: int, num_wanted: int, generator: torch.Generator) -> tuple[int, int]:
    """Draw (begin, end) of `num_wanted` consecutive frames; fewer where there are not so many.

    As in the reference, the very last position is never drawn: its frame may be missing in files whose header
    counts one too many.
    """
    num_positions = max(1, num_available - num_wanted)
    begin = int(torch.randint(num_positions, (), generator=generator))
    return begin, min(begin + num_wanted, num_available)
