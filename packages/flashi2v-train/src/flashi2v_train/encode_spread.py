"""Encoding over a Ray cluster: an encoder on each device, the processes that decode for it beside it.

pieces          records whose features no store of the output holds yet, and their captions
EncodeStage     one encoder in an actor; features go from there to a store of its own, on a disk that all share
the ledger      which pieces are done, and what is to be said of them in the report
"""

import contextlib
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

import flashi2v_train
from flashi2v_data.captions.cleaning import CaptionCount, TextLoss
from flashi2v_data.engines import Engine, Ledger, Shards, run_pieces
from flashi2v_data.errors import DecodeError
from flashi2v_data.loading.dataset import FlashI2VDataset
from flashi2v_data.loading.loader import StatefulLoader
from flashi2v_data.store.features import FeatureStore, FeatureWriter, feature_stores, remove_unbegun, text_key
from flashi2v_data.store.reader import open_store
from flashi2v_model.weights.libraries import quieten
from flashi2v_npu_ops.device import claim_device, resolve_device
from flashi2v_npu_ops.faults import device_faults_told
from flashi2v_train import processes
from flashi2v_train.config import RunConfig
from flashi2v_train.encoding import (
    IF_FULL,
    Cycle,
    caption_losses,
    is_stored,
    log_throughput,
    new_throughput,
    write_captions,
    write_clips,
    write_report,
)
from flashi2v_train.features import Encoders
from flashi2v_train.provenance import REPORT, provenance

# Records of a piece: the loader reads ahead within one, and so much is sent at once.
PIECE_RECORDS = 64
# By type of device: what Ray calls it. Beside each stand the processes that decode.
_RESOURCES = {"cuda": "GPU", "npu": "NPU"}


@dataclass(frozen=True)
class Piece:
    """Some records, and what is missing of them."""

    indices: list[int]
    clips: list[int]
    captions: list[str]


@dataclass(frozen=True)
class EncodeStage:
    """Encodes on one device.

    Args:
        config: of the run; `options.device` is a type: npu, cuda or cpu.
        output: the folder of stores.
        origin: what the features are made of and by.
    """

    config: RunConfig
    output: Path
    origin: Mapping[str, Any]

    @property
    def resources(self) -> Mapping[str, float]:
        """A device, and a processor for each process that decodes for it."""
        kind = self.config.options.device
        return {_RESOURCES[kind]: 1, "CPU": self.num_workers} if kind in _RESOURCES else {"CPU": 1}

    @property
    def num_workers(self) -> int:
        """Processes that decode: at least one, as a decoder may crash."""
        return max(1, self.config.data.dataloader_param.num_workers)

    def start(self, jobs: int) -> "_Encoding":
        """Load the encoders."""
        return _Encoding(self)


class _Encoding:
    def __init__(self, stage: EncodeStage) -> None:
        quieten()
        config = stage.config
        device = claim_device(config.options.device)
        store = open_store(config.data.dataset_param.metafile_or_dir_path)
        self._dataset = FlashI2VDataset(store, config.data.dataset_param, seed=config.options.seed)
        self._encoders = Encoders(config, device)
        self._order = Cycle(len(store), config.options.seed, [])
        loading = config.data.dataloader_param.model_copy(update={"num_workers": stage.num_workers})
        self._loader = StatefulLoader(self._dataset, self._order, 1, loading, device)
        self._writer = FeatureWriter(stage.output / f"actor_{uuid.uuid4().hex}.lmdb", stage.origin)

    def submit(self, piece: Piece) -> Piece:
        return piece

    def result(self, piece: Piece) -> dict[str, Any]:
        """Encode a piece; return what the report is to say of it."""
        losses = [(text_key(text), *loss, path) for text, loss, path in caption_losses(self._dataset, piece.indices)]
        known = set(self._loader.skipped)
        with device_faults_told(IF_FULL):
            self._order.indices = piece.clips
            seconds = write_clips(self._writer, self._encoders, self._loader, len(piece.clips), quiet=True)
            missing = [caption for caption in piece.captions if text_key(caption) not in self._writer]
            write_captions(self._writer, self._encoders, self._dataset.tokenizer, missing, quiet=True)
        return {
            "clips": len(piece.indices),
            "unreadable": sorted(self._loader.skipped - known),
            "captions": losses,
            "seconds": [len(piece.clips), *seconds],
        }

    def close(self) -> None:
        self._loader.close()
        self._writer.close()


def encode_spread(config: RunConfig, output: Path, engine: Engine) -> None:
    """Encode what a run trains on over an engine, and write the report; a run that was ended goes on.

    Args:
        config: of the run.
        output: a folder on a disk that all machines share.
        engine: has an actor for each device.

    Raises:
        InputError: something given is wrong, or another run writes there.
        StorageError, EngineError, DeviceError: disk, engine or device fail.
    """
    quieten()
    kind = config.options.device
    if kind == "auto":
        kind = resolve_device("auto").type
    config = replace(config, options=config.options.model_copy(update={"device": kind}))
    param = config.data.dataset_param
    dataset = FlashI2VDataset(open_store(param.metafile_or_dir_path), param, seed=config.options.seed)
    origin = provenance(config)
    purpose = {"command": "encode", "version of flashi2v-train": flashi2v_train.__version__, **origin}
    purpose |= {"metafile_or_dir_path": param.metafile_or_dir_path, "size of pieces": PIECE_RECORDS}
    ledger_path = output / "encode.ledger"
    with processes.hold_directory(output, "--output"):
        remove_unbegun(output)
        (output / REPORT).unlink(missing_ok=True)
        stored = FeatureStore(output, origin) if feature_stores(output) else None
        with (
            Ledger(ledger_path, purpose) as ledger,
            tqdm(desc="clips", total=len(dataset.indices), disable=None, unit="clip") as bar,
        ):
            throughput = new_throughput()
            run_pieces(
                engine,
                EncodeStage(config, output, origin),
                _pieces(dataset, stored, bar),
                ledger,
                on_done=lambda number, result: throughput.add(*result["seconds"]),
            )
        log_throughput(throughput, engine.num_processes)
        shards = Shards(ledger_path)
        _write_report(output, shards, param.tokenizer_max_length)
        shards.remove()


def _pieces(dataset: FlashI2VDataset, stored: FeatureStore | None, bar: tqdm) -> Iterator[Piece]:
    for begin in range(0, len(dataset.indices), PIECE_RECORDS):
        indices = [int(index) for index in dataset.indices[begin : begin + PIECE_RECORDS]]
        clips = [index for index in indices if stored is None or not is_stored(stored, dataset, index)]
        captions = {""}
        for index in indices:
            with contextlib.suppress(DecodeError):  # a record at fault, for which another stands in
                captions.update(dataset.captions(index))
        yield Piece(indices, clips, sorted(text for text in captions if stored is None or text_key(text) not in stored))
        bar.update(len(indices))


def _write_report(output: Path, shards: Shards, max_length: int) -> None:
    clips, unreadable, captions, count = 0, set[str](), {text_key("")}, CaptionCount(max_length)
    counted: set[bytes] = set()
    for result in shards:
        clips += result["clips"]
        unreadable.update(result["unreadable"])
        for key, *loss, path in result["captions"]:
            captions.add(key)
            if key not in counted:
                counted.add(key)
                count.add(TextLoss(*loss), path)
    write_report(output, clips, unreadable, len(captions), count)
