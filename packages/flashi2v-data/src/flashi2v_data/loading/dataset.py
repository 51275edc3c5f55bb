"""Samples for training: decoded, cropped in time and space, with a cleaned and tokenised caption."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from flashi2v_data.captions.cleaning import TextLoss, becomes_empty, clean_caption
from flashi2v_data.captions.tokenizer import Tokenizer, find_loss, load_tokenizer
from flashi2v_data.errors import DecodeError, InputError
from flashi2v_data.loading.buckets import MAX_FRAMES, build_table
from flashi2v_data.loading.config import Bucket, DatasetParam
from flashi2v_data.loading.quarantine import Quarantine
from flashi2v_data.loading.sampler import SampleKey
from flashi2v_data.loading.substitution import StandIns, read_record, record_fault
from flashi2v_data.loading.transforms import build_transform
from flashi2v_data.randomness import generator
from flashi2v_data.records import Record
from flashi2v_data.store.features import FeatureStore, text_key, video_key
from flashi2v_data.store.reader import LmdbStore
from flashi2v_data.video.decode import read_frames, resolve_backend
from flashi2v_data.video.frames import Moments, frame_indices, frame_interval


class _Sample(TypedDict):
    caption: str  # as tokenised: cleaned, or "" where the text was dropped
    prompt_ids: Tensor  # (L,) int64
    epoch: int
    index: int
    path: str
    first_frame: int  # of the crop in time, counted in the file; by the mean rate where that is irregular
    flipped: bool  # mirrored
    clip: bytes  # key of its features: file, frames, mirroring, part of the picture
    skipped: list[str]  # messages of the unreadable videos and faulty records that this one stands in for
    text_loss: TextLoss | None  # what the text encoder does not get of the caption; None where the text was dropped


class Sample(_Sample, total=False):
    """One sample. T frames, H W height and width, L tokens."""

    video: Tensor  # (3, T, H, W) float32 in [-1, 1], of its bucket's shape; without load_video_features
    prompt_mask: Tensor  # (L,) int64, 1 for text; with return_prompt_mask
    video_features: dict[str, Tensor]  # with load_video_features
    text_features: dict[str, Tensor]  # with load_text_features
    columns: dict[str, Tensor]  # () or (n,) float32, by key of the record; with columns


class FlashI2VDataset(Dataset[Sample]):
    """The clips of a store as training samples.

    A sample depends on `seed` and its key alone, not on worker, rank or what was read before. An unreadable video, or
    a record at fault, never stops a run: another clip takes its place, chosen by seed and key alone too; the sample
    says so in `skipped`, and the quarantine lists the clip. With torch's own DataLoader, `collate` joins samples.

    Args:
        store: from `open_store`.
        config: `dataset_param` of data.json.
        seed: of everything random: crop in time, choice among captions, dropped text, mirroring.
        tokenizer: the default loads `text_tokenizer_path`.
        provenance: what features must have been made from, where any are loaded; None accepts any.
        held_out: only those clips that `held_out_clips` keeps from training, or only the others; None takes all.
        bucket: only its clips; None takes those of all buckets.

    Attributes:
        table: which clip is in which bucket; None without buckets.
        indices: of the records that it gives.

    Raises:
        InputError: store or features do not fit the config, a bucket is empty, or the tokenizer or decoder is missing.
    """

    def __init__(
        self,
        store: LmdbStore,
        config: DatasetParam,
        *,
        seed: int,
        tokenizer: Tokenizer | None = None,
        provenance: Mapping[str, Any] | None = None,
        held_out: bool | None = None,
        bucket: Bucket | None = None,
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
        self.features = None if config.features_path is None else FeatureStore(config.features_path, provenance)
        default = f"{config.metafile_or_dir_path.rstrip('/')}.quarantine.jsonl"
        self.quarantine = Quarantine(config.quarantine_path or default)
        self.table = None
        if config.buckets is not None:
            self.table = build_table(store, config)
            self.config = config.model_copy(update={"buckets": [*self.table.buckets]})
        self.indices = self._part(held_out, bucket)
        if self.table is None:
            self.stand_ins = StandIns(store, self.quarantine, seed, [self.indices])
        else:
            given = set(self.indices)
            groups = [[i for i in self.table.members(one) if i in given] for one in self.table.buckets]
            self.stand_ins = StandIns(store, self.quarantine, seed, groups, self.table.number_of)

    def __len__(self) -> int:
        """Return the number of records that it gives."""
        return len(self.indices)

    def _part(self, held_out: bool | None, bucket: Bucket | None) -> Sequence[int]:
        """Return the indices of all records, of those held out, or of the others; with buckets, of those in one."""
        config, table, every = self.config, self.table, range(len(self.store))
        # Validation looks at one shape.
        from_these: Sequence[int] = every if table is None else table.members(config.main_bucket)
        number, total = config.held_out_clips, len(from_these)
        if held_out is not None and number >= total:
            kind = "" if table is None else f" of the shape {config.main_bucket}"
            raise InputError(f"held_out_clips is {number}, and {self.store.paths[0]} holds {total}{kind}: set fewer")
        # Spread evenly: neighbours in a store are often alike.
        chosen = [from_these[(2 * place + 1) * total // (2 * number)] for place in range(number)]
        if held_out:
            return chosen
        if table is None:
            return every if held_out is None or not chosen else sorted({*every} - {*chosen})
        if bucket is None:
            table.check_filled()
        taken = table.number_of >= 0 if bucket is None else table.number_of == table.buckets.index(bucket)
        found: list[int] = np.flatnonzero(taken).tolist()
        return found if held_out is None else sorted({*found} - {*chosen})

    def shape_of(self, index: int) -> Bucket:
        """Return the shape that a record is brought to."""
        return self.config.main_bucket if self.table is None else self.table.buckets[self.table.number_of[index]]

    @property
    def memory_size(self) -> int:
        """Bytes of pictures that `read` needs room for; none with load_video_features."""
        shapes = [self.config.main_bucket] if self.table is None else self.table.buckets
        return 0 if self.config.load_video_features else max(3 * math.prod(shape) for shape in shapes)

    def pictures(self, index: int, memory: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the part of (memory_size,) that holds a record's pictures, as (T, 3, H, W)."""
        frames, height, width = self.shape_of(index)
        return memory[: 3 * frames * height * width].reshape(frames, 3, height, width)

    def __getitem__(self, key: SampleKey | int) -> Sample:
        """Return the sample of a record; a plain index means its first epoch.

        Raises:
            DecodeError: more than 100 videos in a row are unreadable.
            IndexError: there is no such record.
            InputError: features of a caption are to be loaded, and are missing.
        """
        key = SampleKey(*key) if isinstance(key, tuple) else SampleKey(0, key)
        memory = np.empty(self.memory_size, np.uint8)
        sample = self.read_some(key, memory)
        if len(memory):
            sample["video"] = self.transform.normalise(torch.from_numpy(self.pictures(key.index, memory)))
        return sample

    def read_some(self, key: SampleKey, memory: NDArray[np.uint8]) -> Sample:
        """Read the sample's own record, or the first readable one that may stand in; see `read`."""
        skipped: list[str] = []
        for index in self.stand_ins.candidates(key, skipped):
            try:
                sample = self.read(key, index, memory)
            except DecodeError as error:
                skipped.append(self.stand_ins.note(index, error))
            else:
                sample["skipped"] = skipped
                return sample
        raise AssertionError("candidates end by an error")

    def read(self, key: SampleKey, index: int, memory: NDArray[np.uint8]) -> Sample:
        """Read one record for a sample, without its `video`: that is left in the memory, not normalised yet.

        Args:
            key: decides what is random.
            index: of the record, from `choose`.
            memory: (memory_size,), see `pictures`.

        Raises:
            DecodeError: the video is unreadable, not what its record says, or was so when it was encoded.
            InputError: features of the caption are missing.
        """
        record = read_record(self.store, index)
        frames, moments, flip, clip = self._clip(index, key.epoch)
        caption = self._caption(record, key)
        tokens = self.tokenizer(caption)
        sample: Sample = {
            "caption": caption,
            "prompt_ids": tokens.ids,
            "epoch": key.epoch,
            "index": key.index,
            "path": record["path"],
            "first_frame": frames[0],
            "flipped": flip,
            "clip": clip,
            "skipped": [],
            "text_loss": None if self._drops_text(key) else find_loss(self.tokenizer, caption, tokens),
        }
        if self.config.return_prompt_mask:
            sample["prompt_mask"] = tokens.mask
        if self.config.columns:
            sample["columns"] = _columns(record, self.config)
        if self.config.load_text_features:
            states = self._stored(text_key(caption))
            if states is None:
                raise InputError(
                    f"{self.config.features_path} holds no features of caption {caption[:60]!r}: run flashi2v-encode "
                    "again, with the same settings"
                )
            sample["text_features"] = states
        if self.config.load_video_features:
            features = self._stored(clip)
            if features is None:  # as encoding met it
                reason = f"{self.config.features_path} holds no features of frames {frames[0]} to {frames[-1]}"
                raise record_fault(record, reason)
            sample["video_features"] = features
        else:
            convert = self._converter(record, self.shape_of(index), flip)
            read_frames(
                record["path"],
                frames,
                self.decoder,
                convert=convert,
                out=self.pictures(index, memory),
                geometry=self.config.geometry,
                tone_map=self.config.tone_map,
                moments=moments,
            )
        return sample

    def clip_key(self, index: int) -> bytes:
        """Return the key of the features of a record, as its first epoch crops and mirrors it.

        Raises:
            DecodeError: the record is at fault.
        """
        return self._clip(index, 0)[3]

    def _clip(self, index: int, epoch: int) -> tuple[list[int], Moments | None, bool, bytes]:
        """Return the frames of a record in an epoch, their times, whether they are mirrored, the features' key."""
        record = read_record(self.store, index)
        # Features are encoded once for each record, so crop in time and mirroring are the same in every epoch, and for
        # whichever sample the record stands in.
        draw = SampleKey(0 if self.config.load_video_features else epoch, index)
        frames, moments = self._frames(record, draw, self.shape_of(index).num_frames)
        flip = self._random("flip", draw) < self.transform.flip_probability
        return frames, moments, flip, video_key(record["path"], frames, flip=flip, crop=_crop(record))

    def _frames(self, record: Record, key: SampleKey, num_frames: int) -> tuple[list[int], Moments | None]:
        config = self.config
        interval = frame_interval(record["fps"], config.train_fps, config.sample_stride)
        if record["num_frames"] / interval > MAX_FRAMES:
            raise record_fault(record, f"{record['num_frames']} frames at fps {record['fps']:g} are no clip")
        indices = frame_indices(record["start_frame_idx"], record["num_frames"], interval)
        begin, end = temporal_crop(len(indices), num_frames, generator(self.seed, "crop", key.epoch, key.index))
        if end - begin < num_frames:
            raise record_fault(record, f"has {end} frames at the training rate, {num_frames} are needed")
        moments = None
        if config.train_fps is not None:
            seconds = (np.arange(begin, end) * interval / record["fps"]).tolist()
            moments = Moments(record["start_frame_idx"], record["start_frame_idx"] + record["num_frames"], seconds)
        return indices[begin:end].tolist(), moments

    def _converter(
        self, record: Record, shape: Bucket, flip: bool
    ) -> Callable[[NDArray[np.uint8], NDArray[np.uint8]], None]:
        crop = _crop(record)
        # Stores of the public code may not say the size; no file is then smaller than its record says.
        resolution = record.get("resolution")
        sides = [resolution["height"], resolution["width"]] if resolution else [0, 0]

        def convert(frame: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
            height, width, _ = frame.shape
            if any(side < min(recorded, needed) for side, recorded, needed in zip(frame.shape, sides, shape[1:])):
                raise record_fault(record, f"is {height}x{width}, smaller than the sample and than its record says")
            if crop is not None:
                left, right, top, bottom = crop
                if not (0 <= left < right <= width and 0 <= top < bottom <= height):
                    raise record_fault(record, f"is {height}x{width}, its crop [left, right, top, bottom] is {crop}")
                frame = frame[top:bottom, left:right]
            self.transform.put_picture(frame, out, flip=flip)

        return convert

    def captions(self, index: int) -> list[str]:
        """Return the captions of a record that training may draw, as they are tokenised.

        Raises:
            DecodeError: the record is at fault.
        """
        return [
            clean_caption(caption, self.config.clean_captions)
            for caption in _captions(read_record(self.store, index), self.config)
        ]

    def _caption(self, record: Record, key: SampleKey) -> str:
        captions = _captions(record, self.config)
        if self._drops_text(key):
            return ""
        caption = captions[0]
        if isinstance(record["cap"], list):
            random = generator(self.seed, "caption", key.epoch, key.index)
            caption = captions[int(torch.randint(len(captions), (), generator=random))]
        return clean_caption(caption, self.config.clean_captions)

    def _drops_text(self, key: SampleKey) -> bool:
        return self._random("drop", key) < self.config.text_drop_ratio

    def _random(self, purpose: str, key: SampleKey) -> float:
        return torch.rand((), generator=generator(self.seed, purpose, key.epoch, key.index)).item()

    def _stored(self, key: bytes) -> dict[str, Tensor] | None:
        assert self.features is not None
        return self.features.get(key)


def _crop(record: Record) -> list[int] | None:
    """Return the part of the picture that a record asks for, [left, right, top, bottom] in pixels."""
    crop: Any = record.get("crop")
    if crop is None or crop == [None] * 4:
        return None
    if not isinstance(crop, list) or len(crop) != 4 or not all(type(side) is int for side in crop):
        raise record_fault(record, f"its crop is not [left, right, top, bottom] in pixels: {crop}")
    return crop


def _captions(record: Record, config: DatasetParam) -> list[str]:
    """Return the captions that may be drawn, not yet cleaned."""
    given = record["cap"] if isinstance(record["cap"], list) else [record["cap"]]
    if not config.drop_empty_captions:
        return given
    captions = [caption for caption in given if not becomes_empty(caption, config.clean_captions)]
    if not captions:
        raise record_fault(record, "its caption is empty, or becomes so when cleaned (drop_empty_captions)")
    return captions


def _columns(record: Record, config: DatasetParam) -> dict[str, Tensor]:
    """Return the further keys of a record that are asked for, as float32."""
    columns = {}
    for name, shape in config.column_shapes.items():
        value: Any = record.get(name)
        numbers = value if isinstance(value, list) and shape else [value]
        if not all(type(number) in (int, float) for number in numbers) or len(numbers) != math.prod(shape):
            wanted = f"a list of {shape[0]} numbers" if shape else "a number"
            found = "is not there" if name not in record else f"is {value!r:.60}"
            raise record_fault(record, f"its {name} must be {wanted} (dataset_param.columns), and {found}")
        column = torch.tensor(numbers, dtype=torch.float64).float()
        if any(number != exact and type(number) is int for number, exact in zip(numbers, column.tolist())):
            raise record_fault(record, f"its {name} is {value!r:.60}: whole numbers are exact up to {2**24} only")
        if not column.isfinite().all():
            raise record_fault(record, f"its {name} is {value!r:.60}, which is not finite in float32")
        columns[name] = column.view(shape)
    return columns


def _check_fit(store: LmdbStore, config: DatasetParam) -> None:
    """A store holds clips that are long enough at one rate; another rate or length would fail clip by clip."""
    for key in ("train_fps", "sample_stride", "geometry"):
        if key in store.config and store.config[key] != getattr(config, key):
            raise InputError(
                f"{store.paths[0]} was filtered with {key} {store.config[key]}, data.json says {getattr(config, key)}: "
                "set the same value, or filter again"
            )
    if config.buckets is not None:
        return  # every clip goes where it is long enough
    filtered = store.config.get("sample_num_frames", config.sample_num_frames)
    if not isinstance(filtered, int) or config.sample_num_frames > filtered:
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
