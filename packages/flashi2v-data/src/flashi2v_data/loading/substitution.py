"""Which clip stands in for one that cannot be read: for every loader alike, by seed, epoch and sample alone."""

import bisect
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from flashi2v_data.errors import DecodeError, RecordError
from flashi2v_data.loading.quarantine import Quarantine
from flashi2v_data.loading.sampler import SampleKey
from flashi2v_data.randomness import generator
from flashi2v_data.records import Record
from flashi2v_data.store.reader import LmdbStore

# So many unreadable videos in a row mean a wrong root or an unmounted disk, not bad luck.
MAX_SKIPPED_IN_A_ROW = 100


class StandIns:
    """The clips to try for every sample, and what is known of those that cannot be read.

    Args:
        store: the clips.
        quarantine: of unreadable files; it is added to.
        seed: of the choice.
        groups: of clips that may stand in for each other, each in ascending order.
        group_of: the number of every clip's group; the first by default.
    """

    def __init__(
        self,
        store: LmdbStore,
        quarantine: Quarantine,
        seed: int,
        groups: Sequence[Sequence[int]],
        group_of: NDArray[np.int64] | None = None,
    ) -> None:
        self._store = store
        self._groups, self._group_of = groups, group_of
        self._quarantine = quarantine
        self._seed = seed
        # Reasons by record, as others of the same file may be right; not on disk, as records are fixed without a trace
        # on the file, and settings change.
        self._faulty_records: dict[int, str] = {}

    def candidates(self, key: SampleKey, skipped: list[str]) -> Iterator[int]:
        """Yield the records to try for a sample, until one can be read: its own, then those that may stand in.

        Args:
            key: of the sample.
            skipped: gets the messages of the records that are passed over, as they are known to be at fault.

        Raises:
            DecodeError: more than 100 in a row are unreadable.
            IndexError: there is no such record.
        """
        if not 0 <= key.index < len(self._store):
            raise IndexError(f"sample {key.index} of {len(self._store)}")
        indices = self._groups[0 if self._group_of is None else int(self._group_of[key.index])]
        num_records = len(indices)
        own = bisect.bisect_left(indices, key.index)
        if own == num_records or indices[own] != key.index:
            raise IndexError(f"sample {key.index} of {len(self._store)}")
        # A walk through all records whose stride is drawn: neighbours often lie in one broken directory.
        random = generator(self._seed, "substitute", key.epoch, key.index)
        stride = 1 + int(torch.randint(num_records, (), generator=random))
        while math.gcd(stride, num_records) != 1:
            stride += 1
        num_tried = min(num_records, MAX_SKIPPED_IN_A_ROW + 1)
        for number in range(num_tried):
            index = indices[(own + number * stride) % num_records]
            fault = self._known_fault(index)
            if fault is None:
                yield index
            else:
                skipped.append(str(fault))
        fault = self._known_fault(key.index)
        is_of_record = fault is not None and fault.is_of_record
        raise DecodeError(
            fault.path if fault is not None else read_record(self._store, key.index)["path"],
            f"{'as are' if is_of_record else 'nor can'} {num_tried - 1} others; see `flashi2v-data inspect "
            f"{self._store.paths[0]} --open-videos`, and remove {self._quarantine.path} when they can be read",
            is_of_record=is_of_record,
        )

    def _known_fault(self, index: int) -> DecodeError | None:
        """Return why a record need not be tried, if that is known."""
        try:
            record = read_record(self._store, index)
        except DecodeError as error:
            return error
        if (reason := self._faulty_records.get(index)) is not None:
            return record_fault(record, reason)
        reason = self._quarantine.reason(record["path"], record["start_frame_idx"])
        return None if reason is None else DecodeError(record["path"], reason)

    def note(self, index: int, error: DecodeError, *, whole_file: bool = False) -> str:
        """Remember that a record, or all records of its file, cannot be read; return the message for `skipped`."""
        if error.is_of_record:
            self._faulty_records[index] = error.reason
        else:
            self._quarantine.add(error, None if whole_file else self._store[index]["start_frame_idx"])
        return str(error)


def read_record(store: LmdbStore, index: int) -> Record:
    """Read a record.

    Raises:
        DecodeError: it is damaged, or not a clip.
    """
    try:
        return store[index]
    except RecordError as error:
        raise DecodeError(error.path, error.reason, is_of_record=True) from None


def record_fault(record: Record, reason: str) -> DecodeError:
    """Return the error of a clip that is not what its record says, or not what a run needs."""
    return DecodeError(record["path"], reason, is_of_record=True)
