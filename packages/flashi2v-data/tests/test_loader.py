import logging
from itertools import islice

import pytest
import torch

from flashi2v_data.errors import DecodeError, InputError
from flashi2v_data.loader import build_dataloader
from flashi2v_data.store import open_store, write_store


def _equal(one, other) -> bool:
    assert one.keys() == other.keys()
    return all(
        torch.equal(one[key], other[key]) if isinstance(one[key], torch.Tensor) else one[key] == other[key]
        for key in one
    )


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
    assert state == {"consumed": 12, "seed": 3, "num_samples": 12}
    resumed = build_dataloader(data_config(num_workers), seed=3, batch_size=4)
    resumed.load_state_dict(state)
    assert all(_equal(one, other) for one, other in zip(expected[3:5], islice(resumed, 2)))
    # The same workers, iterated again.
    assert all(_equal(one, other) for one, other in zip(expected[5:], islice(resumed, 2)))
    assert resumed.state_dict()["consumed"] == 28
    resumed.load_state_dict(state)
    assert _equal(expected[3], next(iter(resumed)))


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
    assert state["consumed"] == 4
    other = build_dataloader(data_config(), seed=3, batch_size=4)
    other.load_state_dict(state)
    next(iter(other))
    assert state["consumed"] == 4


def test_consumed_places_the_start(batches):
    assert _equal(batches(1, consumed=8)[0], batches(3)[2])


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
        loader.load_state_dict({"consumed": 4, "seed": 1, "num_samples": 12})


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
    (message,) = caplog.messages
    assert message.startswith(f"cannot read video {records[5]['path']}: ")
    assert message.endswith("; another clip stands in for it")
    assert loader.skipped == {batches[0]["skipped"][0] if batches[0]["skipped"] else message.rsplit(";", 1)[0]}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_without_any_readable_video_stops_with_advice(data_config, store_path, tmp_path, num_workers):
    store = open_store(store_path)
    records = [{**record, "path": str(tmp_path / "unmounted.mp4")} for record in store]
    path = write_store(tmp_path / "damaged.lmdb", records, store.config)
    loader = build_dataloader(data_config(num_workers, metafile_or_dir_path=str(path)), seed=3, batch_size=4)
    # The pattern spans one line: the error comes without a worker's traceback around it.
    with pytest.raises(
        DecodeError, match=r"^cannot read video .* nor the 11 before it; see `flashi2v-data inspect .*`$"
    ):
        next(iter(loader))
