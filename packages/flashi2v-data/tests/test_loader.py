import contextlib
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import time
from itertools import islice
from pathlib import Path

import av
import lmdb
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from flashi2v_data.captions.cleaning import CaptionCount
from flashi2v_data.captions.tokenizer import TextTokens
from flashi2v_data.curation.report import FilterReport
from flashi2v_data.curation.stream import filter_records
from flashi2v_data.errors import DecodeError, InputError
from flashi2v_data.loading.dataset import FlashI2VDataset
from flashi2v_data.loading.loader import StatefulLoader, build_dataloader, collate
from flashi2v_data.loading.sampler import SampleKey, StatefulDistributedSampler
from flashi2v_data.store.features import FeatureWriter, text_key, video_key
from flashi2v_data.store.reader import open_store, write_store


def _equal(one, other) -> bool:
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, dict):
            assert _equal(value, other[key])
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, other[key]), key
        else:
            assert value == other[key], key
    return True


@pytest.fixture
def batches(data_config):
    """The first batches of a loader over 12 clips, read without workers."""
    return lambda count, **arguments: list(
        islice(build_dataloader(data_config(), **({"seed": 3, "batch_size": 4} | arguments)), count)
    )


def test_a_batch_is_stacked(batches):
    (batch,) = batches(1)
    assert batch["video"].shape == (4, 3, 5, 32, 48)
    assert batch["prompt_ids"].shape == batch["prompt_mask"].shape == (4, 8)
    assert batch["epoch"].tolist() == [0] * 4
    assert len(set(batch["index"].tolist())) == len(batch["caption"]) == len(batch["path"]) == 4
    assert batch["skipped"] == []


def test_workers_change_nothing(batches, data_config):
    expected = batches(5)  # into the second epoch
    loader = build_dataloader(data_config(num_workers=2), seed=3, batch_size=4)
    for one, other in zip(expected, loader):
        assert _equal(one, other)
    assert expected[4]["epoch"].tolist() == [1] * 4


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_loader_continues_where_batches_were_delivered(batches, data_config, num_workers):
    expected = batches(7)
    loader = build_dataloader(data_config(num_workers), seed=3, batch_size=4)
    assert all(_equal(one, other) for one, other in zip(expected[:3], islice(loader, 3)))
    state = loader.state_dict()
    assert state == {"consumed_samples": 12, "seed": 3, "num_samples": 12}
    resumed = build_dataloader(data_config(num_workers), seed=3, batch_size=4)
    resumed.load_state_dict(state)
    assert all(_equal(one, other) for one, other in zip(expected[3:5], islice(resumed, 2)))
    # The same workers, iterated again.
    assert all(_equal(one, other) for one, other in zip(expected[5:], islice(resumed, 2)))
    assert resumed.state_dict()["consumed_samples"] == 28
    resumed.load_state_dict(state)
    assert _equal(expected[3], next(iter(resumed)))


def test_an_accelerator_is_sent_pictures_and_gets_the_video(data_config):
    # A stand-in for hardware that runs the same operations on shapes alone.
    loader = build_dataloader(data_config(), seed=3, batch_size=4, device="meta")
    video = next(iter(loader))["video"]
    assert (video.shape, video.dtype, video.device.type) == ((4, 3, 5, 32, 48), torch.float32, "meta")


def test_ranks_together_see_what_one_would(batches):
    alone = batches(3)
    ranks = [batches(3, batch_size=2, rank=rank, num_replicas=2) for rank in range(2)]
    for number, batch in enumerate(alone):
        shares = [ranks[rank][number] for rank in range(2)]
        assert torch.equal(torch.stack([share["index"] for share in shares], dim=1).flatten(), batch["index"])
        assert torch.equal(torch.stack([share["video"] for share in shares], dim=1).flatten(0, 1), batch["video"])


def test_a_state_is_not_moved_by_later_batches(data_config):
    loader = build_dataloader(data_config(), seed=3, batch_size=4)
    next(iter(loader))
    state = loader.state_dict()
    next(iter(loader))
    assert state["consumed_samples"] == 4
    other = build_dataloader(data_config(), seed=3, batch_size=4)
    other.load_state_dict(state)
    next(iter(other))
    assert state["consumed_samples"] == 4


def test_consumed_places_the_start(batches):
    assert _equal(batches(1, consumed_samples=8)[0], batches(3)[2])


def test_without_shuffle_clips_come_in_order(data_config):
    config = data_config()
    config.dataloader_param.shuffle = False
    batch = next(iter(build_dataloader(config, seed=3, batch_size=4)))
    assert batch["index"].tolist() == [0, 1, 2, 3]


def test_too_few_records_for_a_batch_of_all_ranks_are_refused(data_config):
    with pytest.raises(InputError, match="holds 12 records, fewer than the 16 of one batch"):
        build_dataloader(data_config(), seed=0, batch_size=4, num_replicas=4)


def test_a_state_of_another_run_is_refused(data_config):
    loader = build_dataloader(data_config(), seed=0, batch_size=4)
    with pytest.raises(InputError, match="set the same seed"):
        loader.load_state_dict({"consumed_samples": 4, "seed": 1, "num_samples": 12})


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unreadable_video_is_reported_once_from_any_process(data_config, store_path, tmp_path, caplog, num_workers):
    store = open_store(store_path)
    records = [*store]
    records[5]["path"] = str(tmp_path / "missing.mp4")
    path = write_store(tmp_path / "damaged.lmdb", records, store.config)
    loader = build_dataloader(data_config(num_workers, metafile_or_dir_path=str(path)), seed=3, batch_size=4)
    caplog.set_level(logging.WARNING)
    batches = list(islice(loader, 6))  # two epochs
    assert sum(len(batch["skipped"]) for batch in batches) == 2
    (message,) = (message for message in caplog.messages if message.endswith("takes its place"))
    assert message.startswith(f"cannot read video {records[5]['path']}: ")
    assert message.endswith("; another clip takes its place")
    assert loader.skipped == {batches[0]["skipped"][0] if batches[0]["skipped"] else message.rsplit(";", 1)[0]}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_captions_that_lose_something_are_counted_and_told_once_and_after_ten_times_as_many(
    data_config, store_path, tmp_path, caplog, num_workers
):
    store = open_store(store_path)
    records = [{**record, "cap": ["a red circle moves", "a", ""][number % 3]} for number, record in enumerate(store)]
    records[5]["cap"] = "a purple circle moves to the red circle on the red circle"
    path = write_store(tmp_path / "captions.lmdb", records, store.config)
    config = data_config(num_workers, metafile_or_dir_path=str(path), text_drop_ratio=0)
    loader = build_dataloader(config, seed=3, batch_size=4)
    caplog.set_level(logging.WARNING)
    list(islice(loader, 3))
    count = loader.captions
    assert (count.total, count.empty, count.cut, count.longest, count.unknown) == (12, 3, 1, 12, 1)
    assert count.words == {"purple": 1}
    assert count.first["unknown"] == records[5]["path"]
    kinds = [re.search("are empty|more than the 8 tokens|does not know: 'purple'", line)[0] for line in caplog.messages]
    assert sorted(kinds) == ["are empty", "does not know: 'purple'", "more than the 8 tokens"]
    if num_workers == 0:
        list(islice(loader, 9))  # epochs 2 to 4
        assert [line.split(",")[0] for line in caplog.messages[3:]] == ["10 of 40 captions are empty"]
    loader.close()


def test_clips_whose_captions_are_empty_are_dropped_where_asked_for(data_config, store_path, tmp_path):
    store = open_store(store_path)
    records = [{**record, "cap": ["http://a.com", "a red circle"]} for record in store]
    records[5]["cap"], records[6]["cap"] = ["", "..."], "一只猫"
    path = str(write_store(tmp_path / "captions.lmdb", records, store.config))
    settings = {"metafile_or_dir_path": path, "text_drop_ratio": 0.3, "clean_captions": "reference"}
    loader = build_dataloader(data_config(**settings, drop_empty_captions=True), seed=3, batch_size=4)
    batches = list(islice(loader, 6))
    assert {caption for batch in batches for caption in batch["caption"]} == {"", "a red circle"}
    assert loader.captions.empty == 0
    assert len(loader.skipped) == 2
    assert all("its caption is empty, or becomes so when cleaned" in message for message in loader.skipped)
    assert loader.dataset.captions(0) == ["a red circle"]
    assert len(loader.dataset.quarantine) == 0
    dataset = build_dataloader(data_config(**settings), seed=3, batch_size=4).dataset
    assert dataset.captions(5) == ["", ""]  # kept by default


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_iteration_ends_where_another_takes_its_place(batches, data_config, num_workers):
    expected = batches(4)
    loader = build_dataloader(data_config(num_workers), seed=3, batch_size=4)
    older, newer = iter(loader), iter(loader)
    assert _equal(expected[0], next(older))
    assert _equal(expected[1], next(newer))  # from the first that was not delivered
    for _ in range(2):
        with pytest.raises(InputError, match="a newer one has begun"):
            next(older)
    assert _equal(expected[2], next(newer))
    loader.load_state_dict(loader.state_dict())
    with pytest.raises(InputError, match="a state was loaded"):
        next(newer)
    last = iter(loader)
    assert _equal(expected[3], next(last))
    loader.close()
    with pytest.raises(InputError, match="the loader was closed"):
        next(last)
    assert loader.state_dict()["consumed_samples"] == 16


def test_loaders_may_share_a_sampler(data_config, batches):
    config = data_config()
    dataset = build_dataloader(config, seed=3, batch_size=4).dataset
    sampler = StatefulDistributedSampler(12, seed=3)
    first, second = (StatefulLoader(dataset, sampler, 4, config.dataloader_param) for _ in range(2))
    for expected, *found in zip(batches(3), first, second):
        assert all(_equal(expected, batch) for batch in found)


def test_a_fork_may_not_go_on_with_the_workers_of_its_parent(data_config, batches):
    loader = build_dataloader(data_config(1), seed=3, batch_size=4)
    live = iter(loader)
    next(live)

    def refused() -> None:
        for attempt in (live, iter(loader)):
            with pytest.raises(InputError, match=r"another process|was forked from"):
                next(attempt)
        os._exit(7)

    child = multiprocessing.get_context("fork").Process(target=refused)
    child.start()
    child.join(60)
    assert child.exitcode == 7
    assert _equal(batches(2)[1], next(live))
    loader.close()


def test_torchs_own_loader_joins_samples_by_collate(data_config, store_path, tmp_path):
    store = open_store(store_path)
    records = [*store]
    records[1]["path"] = str(tmp_path / "missing.mp4")
    path = str(write_store(tmp_path / "damaged.lmdb", records, store.config))
    config = data_config(metafile_or_dir_path=path)
    config.dataloader_param.shuffle = False
    dataset = build_dataloader(config, seed=3, batch_size=4).dataset
    expected = next(iter(build_dataloader(config, seed=3, batch_size=4)))
    assert _equal(expected, next(iter(DataLoader(dataset, batch_size=4, collate_fn=collate))))
    assert len(expected["skipped"]) == 1


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_without_any_readable_video_stops_with_advice(data_config, store_path, tmp_path, num_workers):
    store = open_store(store_path)
    records = [{**record, "path": str(tmp_path / "unmounted.mp4")} for record in store]
    path = write_store(tmp_path / "damaged.lmdb", records, store.config)
    loader = build_dataloader(data_config(num_workers, metafile_or_dir_path=str(path)), seed=3, batch_size=4)
    # The pattern spans one line: the error comes without a worker's traceback around it.
    with pytest.raises(
        DecodeError,
        match=r"^cannot read video .* nor can 11 others; see .*, and remove .* when they can be read$",
    ):
        next(iter(loader))


# ---- faults --------------------------------------------------------------------------------------------------------


def _spoil(directory: Path, good: str) -> dict[int, tuple[str, str]]:
    """Make files that are no clips; return path and reason by the number of the record that is to name them."""
    data = Path(good).read_bytes()
    (directory / "truncated.mp4").write_bytes(data[: len(data) // 2])
    (directory / "empty.mp4").touch()
    (directory / "text.mp4").write_text("no video\n" * 99)
    (directory / "folder.mp4").mkdir()
    os.mkfifo(directory / "pipe.mp4")
    with av.open(str(directory / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    reasons = {
        "truncated.mp4": "Invalid data found",
        "empty.mp4": "Invalid data found",
        "text.mp4": "Invalid data found",
        "folder.mp4": "is a directory",
        "pipe.mp4": "is not a regular file",
        "sound.mp4": "has no video stream",
    }
    return {2 * number: (str(directory / name), reason) for number, (name, reason) in enumerate(reasons.items())}


@pytest.fixture
def spoilt(store_path, tmp_path):
    """A store of 12 records of which the even ones name no clips; also what those are."""
    store = open_store(store_path)
    records = [*store]
    bad = _spoil(tmp_path, records[0]["path"])
    for number, (path, _) in bad.items():
        records[number]["path"] = path
    records[1]["cap"] = "a large circle " * 7000
    return str(write_store(tmp_path / "spoilt.lmdb", records, store.config)), bad


def test_bad_files_cost_their_own_samples_alike_with_any_number_of_workers(spoilt, data_config, tmp_path):
    path, bad = spoilt
    batches = {}
    for num_workers in (0, 1, 2):
        quarantine = tmp_path / f"{num_workers}.jsonl"
        config = data_config(num_workers, metafile_or_dir_path=path, quarantine_path=str(quarantine))
        loader = build_dataloader(config, seed=3, batch_size=4)
        batches[num_workers] = list(islice(loader, 6))
        loader.close()
        listed = {(entry["path"], entry["reason"]) for entry in map(json.loads, quarantine.read_text().splitlines())}
        assert {path for path, _ in listed} == {path for path, _ in bad.values()}
        for bad_path, reason in bad.values():
            assert any(listed_path == bad_path and reason in why for listed_path, why in listed)
    for number in (1, 2):
        assert all(_equal(one, other) for one, other in zip(batches[0], batches[number]))
    # A run that resumes, with the quarantine or without, agrees.
    for quarantine in (tmp_path / "2.jsonl", tmp_path / "fresh.jsonl"):
        config = data_config(1, metafile_or_dir_path=path, quarantine_path=str(quarantine))
        resumed = build_dataloader(config, seed=3, batch_size=4, consumed_samples=8)
        assert all(_equal(one, other) for one, other in zip(batches[0][2:], resumed))
        resumed.close()


def test_records_at_fault_are_replaced_alike_with_workers_and_in_a_resumed_run(data_config, store_path, tmp_path):
    store = open_store(store_path)
    records = [
        {**record, **({"crop": [0, 999, 0, 9]} if number % 3 == 0 else {})} for number, record in enumerate(store)
    ]
    records[1]["num_frames"] = 4
    path = str(write_store(tmp_path / "faulty.lmdb", records, store.config))
    quarantine = tmp_path / "quarantine.jsonl"
    expected = list(islice(build_dataloader(data_config(metafile_or_dir_path=path), seed=3, batch_size=4), 6))
    assert sum(len(batch["skipped"]) for batch in expected) >= 10
    for consumed_samples in (0, 8):
        config = data_config(2, metafile_or_dir_path=path)
        loader = build_dataloader(config, seed=3, batch_size=4, consumed_samples=consumed_samples)
        assert all(_equal(one, other) for one, other in zip(expected[consumed_samples // 4 :], loader))
        loader.close()
    assert not quarantine.exists()


def test_the_quarantine_lies_beside_the_store(spoilt, data_config):
    path, _ = spoilt
    next(iter(build_dataloader(data_config(metafile_or_dir_path=path, quarantine_path=None), seed=3, batch_size=4)))
    assert Path(f"{path}.quarantine.jsonl").exists()


class _Trap:
    """A tokenizer that hangs or dies over one caption, as a decoder may over one file."""

    def __init__(self, caption, trap, marker=None):
        self.caption, self.trap, self.marker = caption, trap, marker

    def __call__(self, text):
        if text == self.caption and (self.marker is None or not self.marker.exists()):
            if self.marker is not None:
                self.marker.touch()
            self.trap()
        return TextTokens(torch.tensor([len(text)] * 8), torch.ones(8, dtype=torch.int64))


def _hang():
    time.sleep(1000)


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def trapped(data_config, store_path):
    """A loader over the shapes whose record 5 springs a trap."""
    loaders = []

    def make(num_workers, trap, marker=None, consumed_samples=0, **settings):
        config = data_config(num_workers, settings, text_drop_ratio=0)
        store = open_store(store_path)
        tokenizer = _Trap(store[5]["cap"], trap, marker)
        dataset = FlashI2VDataset(store, config.dataset_param, seed=3, tokenizer=tokenizer)
        sampler = StatefulDistributedSampler(12, seed=3, consumed_samples=consumed_samples)
        loaders.append(StatefulLoader(dataset, sampler, 4, config.dataloader_param))
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()


def _nothing():
    pass


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize(
    ("trap", "reason"), [(_hang, "no answer within 15 seconds"), (_die, "ended the process that read it 2 times")]
)
def test_a_clip_that_hangs_or_kills_its_reader_costs_one_sample(
    trapped, trap, reason, num_workers, tmp_path, store_path
):
    expected = list(islice(trapped(0, _nothing), 3))
    batches = list(islice(trapped(num_workers, trap, decode_timeout_seconds=15), 3))
    path = open_store(store_path)[5]["path"]
    for one, other in zip(expected, batches):
        for place, index in enumerate(one["index"].tolist()):
            assert other["index"][place] == index
            same = torch.equal(one["video"][place], other["video"][place])
            assert same == (index != 5)
    (message,) = {message for batch in batches for message in batch["skipped"]}
    assert message.startswith(f"cannot read video {path}: {reason}")
    # The next run does not try it again, and needs no worker to be safe from it.
    (entry,) = map(json.loads, (tmp_path / "quarantine.jsonl").read_text().splitlines())
    assert (entry["path"], entry["start_frame_idx"]) == (path, None)
    assert all(_equal(one, other) for one, other in zip(batches, trapped(0, trap)))
    assert all(_equal(one, other) for one, other in zip(batches[1:], trapped(0, trap, consumed_samples=4)))


def test_a_reader_that_is_killed_once_changes_nothing(trapped, tmp_path):
    expected = list(islice(trapped(0, _nothing), 3))
    marker = tmp_path / "died"
    batches = list(islice(trapped(2, _die, marker), 3))
    assert marker.exists()
    assert all(_equal(one, other) for one, other in zip(expected, batches))
    assert not (tmp_path / "quarantine.jsonl").exists()


def test_all_readers_killed_at_any_time_change_nothing(trapped):
    expected = list(islice(trapped(0, _nothing), 8))
    loader = trapped(2, _nothing)
    for number, batch in enumerate(islice(loader, 8)):
        assert _equal(expected[number], batch)
        if number % 2:
            for worker in loader._readers.pool._workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.process.pid, signal.SIGKILL)


def test_readers_that_retire_change_nothing(trapped):
    expected = list(islice(trapped(0, _nothing), 4))
    for limit in ({"worker_max_samples": 1}, {"worker_memory_gib": 0.001}):
        assert all(_equal(one, other) for one, other in zip(expected, trapped(2, _nothing, **limit)))


def test_closing_ends_the_readers_and_iterating_starts_new_ones(trapped):
    expected = list(islice(trapped(0, _nothing), 2))
    loader = trapped(2, _nothing)
    before = set(multiprocessing.active_children())
    assert _equal(expected[0], next(iter(loader)))
    assert len(set(multiprocessing.active_children()) - before) == 2
    loader.close()
    assert set(multiprocessing.active_children()) <= before
    assert _equal(expected[1], next(iter(loader)))


def test_a_store_that_is_deleted_is_a_clear_error(data_config, store_path, tmp_path):
    path = tmp_path / "copy.lmdb"
    shutil.copytree(store_path, path)
    # Those that have opened it may read on; a new reader cannot.
    config = data_config(1, {"worker_max_samples": 1}, metafile_or_dir_path=str(path))
    loader = build_dataloader(config, seed=3, batch_size=4)
    batches = iter(loader)
    next(batches)
    shutil.rmtree(path)
    with pytest.raises(InputError, match=r"copy\.lmdb"):
        list(islice(batches, 4))
    loader.close()


# ---- features ------------------------------------------------------------------------------------------------------


@pytest.fixture
def encoded(data_config, tmp_path):
    """Features of all clips and captions, as an encoder would leave them; and the plain dataset."""
    plain = FlashI2VDataset(
        open_store(data_config().dataset_param.metafile_or_dir_path), data_config().dataset_param, seed=3
    )
    with FeatureWriter(tmp_path / "features.lmdb", {"vae": "mean"}) as writer:
        writer.put({text_key(""): {"states": torch.zeros(2)}})
        for index in range(12):
            sample = plain[SampleKey(0, index)]
            frames = range(sample["first_frame"], sample["first_frame"] + 5)
            latents = {"mean": sample["video"].mean(dim=(2, 3)), "std": torch.full((3, 5), float(index))}
            writer.put({video_key(sample["path"], frames): latents})
            writer.put({text_key(plain.store[index]["cap"]): {"states": torch.full((2,), float(index))}})
    return str(tmp_path / "features.lmdb"), plain


@pytest.mark.parametrize("num_workers", [0, 1])
def test_features_take_the_place_of_the_video(data_config, encoded, num_workers):
    path, plain = encoded
    settings = {"features_path": path, "load_video_features": True, "load_text_features": True}
    config = data_config(num_workers, **settings)
    loader = build_dataloader(config, seed=3, batch_size=4, provenance={"vae": "mean"})
    batches = list(islice(loader, 6))  # two epochs: the crop in time of the first is that of the second
    loader.close()
    for batch in batches:
        assert "video" not in batch
        assert batch["video_features"]["mean"].shape == (4, 3, 5)
        for place, index in enumerate(batch["index"].tolist()):
            sample = plain[SampleKey(0, index)]
            assert batch["first_frame"][place] == sample["first_frame"]
            assert torch.equal(batch["video_features"]["mean"][place], sample["video"].mean(dim=(2, 3)))
            expected = float(index) if batch["caption"][place] else 0.0
            assert batch["text_features"]["states"][place].tolist() == [expected] * 2
    assert len({caption == "" for batch in batches for caption in batch["caption"]}) == 2


def test_features_made_by_something_else_are_refused(data_config, encoded):
    path, _ = encoded
    config = data_config(features_path=path, load_video_features=True)
    with pytest.raises(InputError, match="made with vae 'mean', this run has 'max'"):
        build_dataloader(config, seed=3, batch_size=4, provenance={"vae": "max"})


def test_a_clip_without_features_is_stood_in_for_in_every_epoch_and_only_there(data_config, encoded, tmp_path):
    path, plain = encoded
    with lmdb.open(path) as environment, environment.begin(write=True) as transaction:
        transaction.delete(plain.clip_key(5))
    loader = build_dataloader(data_config(features_path=path, load_video_features=True), seed=3, batch_size=4)
    bad = plain.store[5]["path"]
    for batch in islice(loader, 9):  # three epochs
        for index, found in zip(batch["index"].tolist(), batch["path"]):
            assert found != bad
            assert index == 5 or found == plain.store[index]["path"]
    (message,) = loader.skipped
    assert re.search(rf"{bad}: .* holds no features of frames \d+ to \d+", message)


def test_a_caption_without_features_is_an_error(data_config, encoded):
    path, plain = encoded
    with lmdb.open(path) as environment, environment.begin(write=True) as transaction:
        transaction.delete(text_key(plain.store[5]["cap"]))
    loader = build_dataloader(data_config(features_path=path, load_text_features=True), seed=3, batch_size=4)
    with pytest.raises(InputError, match=r"holds no features of caption .*: run flashi2v-encode again"):
        list(islice(loader, 6))


def test_features_that_do_not_fit_into_one_batch_are_an_error(data_config, encoded):
    path, plain = encoded
    with FeatureWriter(path, {"vae": "mean"}) as writer:
        writer.put({plain.clip_key(5): {"mean": torch.zeros(3, 4)}})
    loader = build_dataloader(data_config(features_path=path, load_video_features=True), seed=3, batch_size=12)
    with pytest.raises(InputError, match=r"features_path: .*'mean': \(3, 4\)} do not fit into one batch"):
        next(iter(loader))


def test_a_batch_of_none_is_refused(data_config):
    with pytest.raises(InputError, match="batch_size must be 1 or more, got 0"):
        build_dataloader(data_config(), seed=3, batch_size=0)


def test_a_store_may_hold_fewer_records_than_there_are_ranks(data_config):
    loader = build_dataloader(data_config(), seed=3, batch_size=1, rank=20, num_replicas=32, num_required=12)
    assert next(iter(loader))["epoch"].tolist() == [1]
    with pytest.raises(InputError, match="fewer than the 13 of one batch"):
        build_dataloader(data_config(), seed=3, batch_size=1, num_required=13)


def test_the_filter_counts_what_the_tokenizer_cuts_and_does_not_know(filter_config, tokenizer_path):
    config = filter_config(text_tokenizer_path=str(tokenizer_path), tokenizer_max_length=8)
    size = {"height": 32, "width": 48}
    captions = ["a small red circle moves", "A zebra moves to a zebra", "a " * 9, ["@gone", "a yeti"]]
    entries = [
        {"path": f"/{n}.mp4", "cap": caption, "resolution": size, "fps": 16, "num_frames": 9}
        for n, caption in enumerate(captions)
    ]
    report = FilterReport(captions=CaptionCount(8))
    assert len(list(filter_records(entries, config, report))) == 4
    count = report.captions
    assert (count.total, count.empty, count.cut, count.longest, count.unknown) == (5, 1, 1, 9, 2)
    assert count.words == {"zebra": 1, "yeti": 1}
    assert count.first == {"empty": "/3.mp4", "cut": "/2.mp4", "unknown": "/1.mp4"}
    assert "1 of 5 captions have more than the 8 tokens that are read" in report.describe(config)
    assert FilterReport.from_json(json.loads(json.dumps(report.to_json()))) == report
    with pytest.raises(InputError, match="text_tokenizer_path: no such directory"):
        list(filter_records(entries, filter_config(text_tokenizer_path="nowhere", tokenizer_max_length=8)))
