import multiprocessing
import os
import pickle

import lmdb
import msgspec
import pytest
import safetensors.torch
import torch

from flashi2v_data.errors import InputError, StorageError
from flashi2v_data.store import environments
from flashi2v_data.store.features import FeatureStore, FeatureWriter, text_key, video_key
from flashi2v_data.store.reader import open_store, write_store

MADE_BY = {"vae": "wan2.1", "size": (5, 32, 48), "dtype": "bf16"}
TENSORS = {
    "mean": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "states": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "mask": torch.tensor([True, False]),
}


def _equal(one, other):
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


@pytest.fixture
def store(tmp_path):
    with FeatureWriter(tmp_path / "features.lmdb", MADE_BY) as writer:
        writer.put({text_key("a dog"): TENSORS, text_key(""): {"x": torch.zeros(1)}})
    return tmp_path / "features.lmdb"


def test_features_come_back_as_they_were(store):
    features = FeatureStore(store, MADE_BY)
    assert _equal(features.get(text_key("a dog")), TENSORS)
    assert features.get(text_key("a cat")) is None
    assert features.provenance == {**MADE_BY, "size": [5, 32, 48]}


def test_features_of_another_kind_are_refused_by_reader_and_writer(store):
    for open_it in (FeatureWriter, FeatureStore):
        with pytest.raises(InputError, match=r"made with vae 'wan2.1', this run has 'wan2.2': encode again"):
            open_it(store, {**MADE_BY, "vae": "wan2.2"})
        with pytest.raises(InputError, match=r"made with sigma None, this run has 2"):
            open_it(store, {**MADE_BY, "sigma": 2})


@pytest.mark.parametrize("left", [(), ("data.mdb",), ("data.mdb", "lock.mdb")])
def test_a_store_whose_making_was_cut_short_is_as_none(tmp_path, left):
    store = tmp_path / "features.lmdb"
    store.mkdir()
    for name in left:
        (store / name).touch()
    with pytest.raises(InputError, match="no store of features"):
        FeatureStore(tmp_path)
    with FeatureWriter(store, MADE_BY) as writer:
        writer.put({text_key("a dog"): TENSORS})
    assert _equal(FeatureStore(tmp_path, MADE_BY).get(text_key("a dog")), TENSORS)
    assert [path.name for path in tmp_path.iterdir()] == [store.name]


def test_a_store_is_never_to_be_seen_without_its_header(tmp_path, monkeypatch):
    def refused(*arguments):
        raise lmdb.DiskError("No space left on device")

    monkeypatch.setattr("flashi2v_data.store.features.seal", refused)
    with pytest.raises(StorageError, match="the disk is full; free some space and run again"):
        FeatureWriter(tmp_path / "features.lmdb", MADE_BY)
    assert not any(tmp_path.iterdir())


def test_an_interrupted_writer_goes_on_where_it_stopped(store):
    with FeatureWriter(store, MADE_BY) as writer:
        assert text_key("a dog") in writer
        assert text_key("a cat") not in writer
        writer.put({text_key("a cat"): TENSORS})
    features = FeatureStore(store)
    assert _equal(features.get(text_key("a cat")), TENSORS)
    assert _equal(features.get(text_key("a dog")), TENSORS)


def test_a_store_grows_as_needed(tmp_path):
    large = {f"{number}": torch.full((1 << 20,), number, dtype=torch.float32) for number in range(24)}
    with FeatureWriter(tmp_path / "large.lmdb", MADE_BY) as writer:
        for number in range(2):
            writer.put({text_key(str(number)): large})
    assert _equal(FeatureStore(tmp_path / "large.lmdb").get(text_key("1")), large)


def test_a_folder_of_stores_is_one(tmp_path):
    for part in range(2):
        with FeatureWriter(tmp_path / "all" / f"part_{part}.lmdb", MADE_BY) as writer:
            writer.put({text_key(str(part)): {"x": torch.tensor([part])}})
    features = FeatureStore(tmp_path / "all", MADE_BY)
    assert [features.get(text_key(str(part)))["x"].item() for part in range(2)] == [0, 1]
    with FeatureWriter(tmp_path / "all" / "part_2.lmdb", {"vae": "other"}):
        pass
    with pytest.raises(InputError, match=r"part_2.lmdb: its features were made with"):
        FeatureStore(tmp_path / "all")


def _read(features, key, queue):
    queue.put(features.get(key)["x"].item())


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_store_works_in_other_processes(store, method):
    features = FeatureStore(store)
    features.get(text_key(""))
    context = multiprocessing.get_context(method)
    queue = context.SimpleQueue()
    process = context.Process(target=_read, args=(features, text_key(""), queue))
    process.start()
    assert queue.get() == 0
    process.join()
    assert process.exitcode == 0
    assert _equal(pickle.loads(pickle.dumps(features)).get(text_key("a dog")), TENSORS)


def test_keys_tell_clips_apart():
    keys = {
        video_key("a.mp4", [0, 2]),
        video_key("b.mp4", [0, 2]),
        video_key("a.mp4", [0, 1]),
        video_key("a.mp4", [0, 2], flip=True),
        video_key("a.mp4", [0, 2], crop=[0, 9, 0, 9]),
        video_key("a\udcff.mp4", [0, 2]),
        text_key("a.mp4"),
    }
    assert len(keys) == 7
    # Another key would make every store of features useless.
    assert video_key("a.mp4", range(2)).hex() == video_key("a.mp4", [0, 1]).hex() == "a360554f3a32b87728f8b3e93bbe000c"
    assert text_key("a dog").hex() == "e13a047d939bcab26aaaeb1bfd616a00"


def test_what_is_no_store_is_refused(tmp_path):
    with pytest.raises(InputError, match="no store of features; write one with flashi2v-encode"):
        FeatureStore(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"holds no features of schema 1"):
        FeatureStore(write_store(tmp_path / "records.lmdb", [], {}))


def test_a_pickle_in_a_store_is_not_executed(tmp_path):
    path = tmp_path / "evil.lmdb"
    with FeatureWriter(path, MADE_BY):
        pass
    with lmdb.open(str(path)) as environment, environment.begin(write=True) as transaction:
        transaction.put(text_key("evil"), pickle.dumps(_Evil(tmp_path / "executed")))
    with pytest.raises(InputError, match=r"evil\.lmdb: the features [0-9a-f]{32} are damaged"):
        FeatureStore(path).get(text_key("evil"))
    assert not (tmp_path / "executed").exists()


def test_every_flipped_bit_of_features_is_noticed(store):
    key = text_key("")
    with lmdb.open(str(store)) as environment, environment.begin() as transaction:
        good = transaction.get(key)
    for place in range(len(good)):
        with lmdb.open(str(store)) as environment, environment.begin(write=True) as transaction:
            transaction.put(key, good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :])
        with pytest.raises(
            InputError, match=rf"features\.lmdb: the features {key.hex()} are damaged .*checksum.*: copy"
        ):
            FeatureStore(store).get(key)
        environments._environments.clear()


def test_features_without_checksums_are_read_with_one_warning_and_not_added_to(tmp_path, caplog):
    value = safetensors.torch.save({"x": torch.ones(1)})
    with lmdb.open(str(tmp_path / "old.lmdb")) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"header", msgspec.msgpack.encode({"schema": 1, "made_by": {}}))
        transaction.put(text_key(""), value)
    for _ in range(2):
        assert FeatureStore(tmp_path / "old.lmdb", {}).get(text_key(""))["x"].item() == 1
    (message,) = caplog.messages
    assert "old.lmdb: no checksums, so damage to a value may go unnoticed; encode again" in message
    environments._environments.clear()
    with pytest.raises(InputError, match="has no checksums, so nothing is added to it"):
        FeatureWriter(tmp_path / "old.lmdb", {})


@pytest.mark.parametrize(
    "header", [b"", b"\xc1", b"\x91" * 100_000, b"\x01", msgspec.msgpack.encode({"schema": 1, "made_by": 3})]
)
def test_a_damaged_header_is_refused(tmp_path, header):
    with lmdb.open(str(tmp_path / "bad.lmdb")) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"header", header)
    for open_it in (lambda path: FeatureStore(path, {}), open_store):
        with pytest.raises(InputError, match=r"its header is damaged|no features of schema 1|is not a store of clips"):
            open_it(tmp_path / "bad.lmdb")


class _Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)
