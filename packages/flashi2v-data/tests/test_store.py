import multiprocessing
import operator
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import lmdb
import msgspec
import pytest
import zstandard

from flashi2v_data.curation.probing import ProbeCache
from flashi2v_data.errors import InputError, RecordError, StorageError
from flashi2v_data.store import environments
from flashi2v_data.store.codec import ValueCodec
from flashi2v_data.store.environments import check_file
from flashi2v_data.store.features import FeatureWriter
from flashi2v_data.store.reader import open_store, write_store
from flashi2v_data.store.writer import StoreWriter


def _records(num: int, name: str = "v") -> list[dict]:
    return [
        {
            "path": f"{name}{number}.mp4",
            "cap": ["é", "b"] if number % 2 else "c",
            "resolution": {"height": 2, "width": 3},
            "fps": 29.97,
            "num_frames": number,
            "start_frame_idx": 0,
        }
        for number in range(num)
    ]


def test_records_come_back_in_order(tmp_path):
    records = _records(2500)
    path = write_store(tmp_path / "a_{count}.lmdb", iter(records), {"train_fps": 16})
    assert path == tmp_path / "a_2500.lmdb"
    store = open_store(path)
    assert len(store) == 2500
    assert list(store) == records
    assert store[2499] == records[2499]
    assert store.config == {"train_fps": 16}
    for index in (2500, -1):
        with pytest.raises(IndexError):
            store[index]


def test_a_store_grows_beyond_its_first_map(tmp_path):
    big = {**_records(1)[0], "cap": "x" * 200_000}
    store = open_store(write_store(tmp_path / "big.lmdb", (big for _ in range(400)), {}))  # 80 MB
    assert len(store) == 400
    assert store[399] == big


def test_an_empty_store_has_length_0(tmp_path):
    assert len(open_store(write_store(tmp_path / "empty.lmdb", [], {}))) == 0


def test_a_failure_leaves_nothing_behind(tmp_path):
    def failing():
        yield from _records(1500)
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        write_store(tmp_path / "a.lmdb", failing(), {})
    assert list(tmp_path.iterdir()) == []


def test_an_existing_store_is_never_overwritten(tmp_path):
    write_store(tmp_path / "a_3.lmdb", _records(3), {})
    for name in ("a_3.lmdb", "a_{count}.lmdb"):
        with pytest.raises(InputError, match="exists: remove it"):
            write_store(tmp_path / name, _records(3, "new"), {})
    assert open_store(tmp_path / "a_3.lmdb")[0]["path"] == "v0.mp4"
    assert [path.name for path in tmp_path.iterdir()] == ["a_3.lmdb"]


def test_a_folder_is_one_sequence_in_the_order_of_names(tmp_path):
    for name, num in (("b", 2), ("a", 3), ("c", 0), ("d", 1)):
        write_store(tmp_path / f"{name}.lmdb", _records(num, name), {"train_fps": 16, "save_path": name})
    store = open_store(tmp_path)
    paths = [record["path"] for record in store]
    assert paths == ["a0.mp4", "a1.mp4", "a2.mp4", "b0.mp4", "b1.mp4", "d0.mp4"]


def test_a_folder_of_differently_filtered_stores_is_refused(tmp_path):
    write_store(tmp_path / "a.lmdb", _records(1), {"train_fps": 16})
    write_store(tmp_path / "b.lmdb", _records(1), {"train_fps": 24})
    with pytest.raises(InputError, match=r"b\.lmdb was filtered with other settings"):
        open_store(tmp_path)


def test_what_is_no_store_says_so(tmp_path):
    with pytest.raises(InputError, match="no such LMDB"):
        open_store(tmp_path / "nothing.lmdb")
    with pytest.raises(InputError, match="neither an LMDB nor a folder"):
        open_store(tmp_path)
    with lmdb.open(str(tmp_path / "foreign.lmdb")) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"0", b"x")
    with pytest.raises(InputError, match="an LMDB without records"):
        open_store(tmp_path / "foreign.lmdb")
    (tmp_path / "text.lmdb").write_text("hello")
    with pytest.raises(InputError, match="cannot be opened as LMDB"):
        open_store(tmp_path / "text.lmdb")


def test_two_stores_may_open_the_same_file(tmp_path):
    path = write_store(tmp_path / "a.lmdb", _records(3), {})
    first, second = open_store(path), open_store(path)
    assert first[1] == second[1]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_store_in_use_may_be_handed_to_processes(tmp_path, method):
    store = open_store(write_store(tmp_path / "a.lmdb", _records(50), {}))
    assert store[0]["path"] == "v0.mp4"
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(method)) as pool:
        records = list(pool.map(operator.getitem, [store] * 50, range(50)))
    assert records == list(store)


def test_a_forked_child_reads_through_the_store_it_inherited(tmp_path):
    store = open_store(write_store(tmp_path / "a.lmdb", _records(50), {}))
    assert store[0]["path"] == "v0.mp4"
    child = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(store[7]["path"] != "v7.mp4"))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert store[3]["path"] == "v3.mp4"


def test_threads_may_share_a_store(tmp_path):
    store = open_store(write_store(tmp_path / "a.lmdb", _records(50), {}))
    with ThreadPoolExecutor(8) as pool:
        records = list(pool.map(store.__getitem__, [*range(50)] * 40))
    assert records == list(store) * 40


def test_a_pickled_store_is_small_and_opens_again(tmp_path):
    store = open_store(write_store(tmp_path / "a.lmdb", _records(1000), {}))
    data = pickle.dumps(store)
    assert len(data) < 2000
    assert pickle.loads(data)[999]["path"] == "v999.mp4"


def _open_elsewhere(path) -> str:
    try:
        return open_store(path)[0]["path"]
    except InputError as error:
        return str(error)


def test_a_store_that_is_deleted_is_read_on_by_who_has_it_and_missed_by_others(tmp_path):
    path = write_store(tmp_path / "a.lmdb", _records(2500), {})
    store = open_store(path)
    assert store[0]["path"] == "v0.mp4"
    shutil.rmtree(path)
    assert store[2499]["path"] == "v2499.mp4"
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert "no such LMDB" in pool.submit(_open_elsewhere, path).result()
        with pytest.raises(InputError, match="cannot be opened as LMDB"):
            pool.submit(operator.getitem, store, 0).result()


def test_a_copy_that_was_cut_short_is_refused_rather_than_read_beyond_its_end(tmp_path):
    path = write_store(tmp_path / "a.lmdb", _records(2500), {})
    file = path / "data.mdb"
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(InputError, match="copy it again"):
        open_store(path)


def test_compressed_values_come_back_and_are_smaller(tmp_path):
    records = [{**record, "cap": "a dog runs over the grass " * 40} for record in _records(300)]
    codec = ValueCodec("zstd")
    with StoreWriter(tmp_path / "part") as writer:
        writer.append([codec.pack(record) for record in records])
        writer.finish(tmp_path / "small.lmdb", "zstd", {})
    large = write_store(tmp_path / "large.lmdb", records, {})
    assert list(open_store(tmp_path / "small.lmdb")) == records
    assert (tmp_path / "small.lmdb/data.mdb").stat().st_size < (large / "data.mdb").stat().st_size / 3


def test_a_path_that_is_not_utf8_and_a_long_caption_come_back(tmp_path):
    record = {**_records(1)[0], "path": os.fsdecode(b"/caf\xe9.mp4"), "cap": "x" * 100_000}
    assert open_store(write_store(tmp_path / "a.lmdb", [record], {}))[0] == record


def test_what_cannot_be_stored_is_refused(tmp_path):
    with pytest.raises(InputError, match="record 1 holds a value that cannot be stored"):
        write_store(tmp_path / "a.lmdb", [_records(1)[0], {**_records(1)[0], "id": 1 << 70}], {})
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_value_names_its_record(tmp_path):
    with StoreWriter(tmp_path / "part") as writer:
        writer.append([b"\xc1"])
        writer.finish(tmp_path / "a.lmdb", None, {})
    with pytest.raises(RecordError, match=r"a\.lmdb: record 0 is damaged"):
        open_store(tmp_path / "a.lmdb")[0]


def _put(path, key: bytes, value: bytes) -> None:
    with lmdb.open(str(path), map_size=1 << 30) as environment, environment.begin(write=True) as transaction:
        transaction.put(key, value)


def _get(path, key: bytes) -> bytes:
    with lmdb.open(str(path)) as environment, environment.begin() as transaction:
        return transaction.get(key)


def test_every_flipped_bit_of_a_record_and_of_the_header_is_noticed(tmp_path):
    path = write_store(tmp_path / "a.lmdb", _records(2), {"train_fps": 16})
    for key, expected in (
        (b"%012d" % 1, r"record 1 is damaged, its checksum differs: copy the store"),
        (b"header", ""),
    ):
        good = _get(path, key)
        for place in range(len(good)):
            _put(path, key, good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :])
            with pytest.raises(InputError, match=expected or r"a\.lmdb: its header is damaged: copy the store again"):
                list(open_store(path))
            environments._environments.clear()
        _put(path, key, good)
    assert list(open_store(path)) == _records(2)


def test_a_record_under_the_key_of_another_is_noticed(tmp_path):
    path = write_store(tmp_path / "a.lmdb", _records(2), {})
    _put(path, b"%012d" % 1, _get(path, b"%012d" % 0))
    with pytest.raises(RecordError, match="record 1 is damaged"):
        open_store(path)[1]


def test_further_keys_are_read_whichever_records_have_them(tmp_path):
    plain = _records(3)
    (tmp_path / "mixed").mkdir()
    mixed = [
        plain[0],
        {**plain[1], "score": [1, None]},
        {**plain[2], "resolution": {**plain[2]["resolution"], "depth": 8}},
    ]
    for number, records in enumerate((mixed, mixed[1:], mixed[2:])):
        path = write_store(tmp_path / "mixed" / f"{number}.lmdb", records, {})
        assert list(open_store(path)) == records
    assert list(open_store(tmp_path / "mixed")) == mixed + mixed[1:] + mixed[2:]


def test_a_size_that_is_said_twice_is_no_clip(tmp_path):
    path = write_store(tmp_path / "a.lmdb", _records(1), {})
    value = ValueCodec().pack(_records(1)[0]).replace(b"\xa5width", b"\xa6height")
    _put(path, b"%012d" % 0, environments.seal(b"%012d" % 0, value))
    with pytest.raises(RecordError, match="record 0 is not a clip"):
        open_store(path)[0]


def test_a_store_without_checksums_is_read_with_one_warning(tmp_path, caplog):
    header = {"schema": 1, "count": 2, "compression": None, "config": {}}
    with lmdb.open(str(tmp_path / "old.lmdb")) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"header", msgspec.msgpack.encode(header))
        for number, record in enumerate(_records(2)):
            transaction.put(b"%012d" % number, ValueCodec().pack(record))
    for _ in range(2):
        assert list(open_store(tmp_path / "old.lmdb")) == _records(2)
    (message,) = caplog.messages
    assert message.endswith("old.lmdb: no checksums, so damage to a value may go unnoticed; filter again to have them")


@pytest.mark.parametrize(
    "change",
    [
        {"report": {}},
        {"report": "x"},
        {"report": None},
        {"config": {1: 2}},
        {"config": []},
        {"count": -1},
        {"count": "2"},
    ],
)
def test_a_header_of_another_kind_is_refused(tmp_path, change):
    header = {"schema": 1, "count": 0, "compression": None, "config": {}} | change
    with lmdb.open(str(tmp_path / "a.lmdb")) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"header", msgspec.msgpack.encode(header))
    with pytest.raises(InputError, match="is not a store of clips"):
        open_store(tmp_path / "a.lmdb")


def test_a_file_is_refused_before_it_is_mapped(tmp_path):
    path = write_store(tmp_path / "a.lmdb", _records(2500), {})
    data = (path / "data.mdb").read_bytes()
    bad = {"page size": data[:40] + bytes(4) + data[44:], "root": bytearray(data)}
    for page in (0, 4096):
        bad["root"][page + 128 : page + 136] = (1 << 40).to_bytes(8, "little")
    for number, cut in enumerate((1, 50, 4096, 4200, 8191, 8192, len(data) - 1)):
        bad[f"cut {number}"] = data[:cut]
    for what, content in bad.items():
        (tmp_path / f"{what}.lmdb").write_bytes(content)
        for open_it in (open_store, check_file):
            with pytest.raises(InputError, match=r"copy it again|cannot be opened as LMDB"):
                open_it(tmp_path / f"{what}.lmdb")
    os.mkfifo(tmp_path / "pipe.lmdb")
    with pytest.raises(InputError, match="not a regular file"):
        check_file(tmp_path / "pipe.lmdb")
    for directory in ("part", "features.lmdb"):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "data.mdb").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="copy it again, or make it anew"):
        StoreWriter(tmp_path / "part", resume=True)
    with pytest.raises(InputError, match="copy it again, or make it anew"):
        FeatureWriter(tmp_path / "features.lmdb", {})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"fps": None}, "got `null`"),
        ({"fps": 0}, ">= 1"),
        ({"fps": True}, "got `bool`"),
        ({"fps": float("nan")}, ">= 1e-06"),
        ({"num_frames": "16"}, "got `str`"),
        ({"num_frames": 16.5}, "got `float`"),
        ({"num_frames": -1}, ">= 0"),
        ({"start_frame_idx": 1 << 50}, "<= 1000000000000"),
        ({"cap": None}, "got `null`"),
        ({"cap": []}, "length >= 1"),
        ({"cap": ["a", 1]}, "got `int`"),
        ({"path": ""}, "length >= 1"),
        ({"resolution": [64, 96]}, "got `array`"),
        ({"resolution": {"height": 64}}, "missing required field `width`"),
        ({"resolution": {"height": 0, "width": 1}}, ">= 1"),
        ({"crop": [0, 1, 0]}, "length >= 4"),
        ({"crop": "all"}, "got `str`"),
    ],
)
def test_a_record_that_is_no_clip_is_named(tmp_path, change, reason):
    store = open_store(write_store(tmp_path / "a.lmdb", [_records(1)[0], _records(1)[0] | change], {}))
    assert store[0] == _records(1)[0]
    with pytest.raises(
        RecordError, match=rf"a\.lmdb: record 1 is not a clip that can be trained on: .*{re.escape(reason)}"
    ):
        store[1]


@pytest.mark.parametrize(
    "record",
    [
        [],
        "clip",
        None,
        7,
        *(
            {k: v for k, v in _records(1)[0].items() if k != left}
            for left in ("path", "cap", "fps", "num_frames", "start_frame_idx")
        ),
    ],
)
def test_what_lacks_something_is_no_clip(tmp_path, record):
    with pytest.raises(RecordError, match=r"record 0 is not a clip"):
        open_store(write_store(tmp_path / "a.lmdb", [record], {}))[0]


def test_whole_numbers_may_be_written_as_floats(tmp_path):
    record = _records(1)[0] | {"num_frames": 16.0, "start_frame_idx": 2.0, "crop": [0.0, 8.0, 0, 8]}
    found = open_store(write_store(tmp_path / "a.lmdb", [record], {}))[0]
    assert found == record
    assert [type(found[key]) for key in ("num_frames", "start_frame_idx")] == [int, int]
    assert [type(side) for side in found["crop"]] == [int] * 4


@pytest.mark.parametrize(
    "value", [b"\x91" * 100_000, b"\xa1\xff", b"\x81\x80\x01", b"\xd4\xff\x00", b"\x90" * 9_000_000, b""]
)
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_hostile_values_are_refused_in_bounded_time_and_memory(tmp_path, value, compression):
    resource = pytest.importorskip("resource")  # of Unix
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with StoreWriter(tmp_path / "part") as writer:
        writer.append([zstandard.compress(value) if compression else value])
        writer.finish(tmp_path / "a.lmdb", compression, {})
    with pytest.raises(RecordError, match="record 0 is damaged"):
        open_store(tmp_path / "a.lmdb")[0]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000


def test_a_record_too_large_to_be_read_is_not_stored(tmp_path):
    with pytest.raises(InputError, match="record 0 holds a value that cannot be stored"):
        write_store(tmp_path / "a.lmdb", [_records(1)[0] | {"cap": "x" * 9_000_000}], {})


def test_a_store_of_another_schema_asks_for_an_update(tmp_path):
    path = write_store(tmp_path / "a.lmdb", _records(1), {})
    with lmdb.open(str(path)) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"header", b"\x81\xa6schema\x63")
    with pytest.raises(InputError, match="has schema 99, this version reads 1: update flashi2v-data"):
        open_store(path)


def test_an_unfinished_part_is_continued_for_the_same_purpose_alone(tmp_path):
    records = _records(2)
    values = [ValueCodec().pack(record) for record in records]
    with StoreWriter(tmp_path / "part", {"limit": 1}) as writer:
        writer.append(values * 5000, lambda: "after 10,000")
        writer.append(values[:1], lambda: "lost")
        with pytest.raises(InputError, match="is in use by this process already"):
            StoreWriter(tmp_path / "part", {"limit": 1}, resume=True)
    with pytest.raises(InputError, match="continue it with --resume, or remove it"):
        StoreWriter(tmp_path / "part", {"limit": 1})
    with pytest.raises(InputError, match="was begun with another limit"):
        StoreWriter(tmp_path / "part", {"limit": 2}, resume=True)
    with StoreWriter(tmp_path / "part", {"limit": 1}, resume=True) as writer:
        assert (writer.state, writer.count) == ("after 10,000", 10_000)
        writer.append(values[1:])
        writer.finish(tmp_path / "a.lmdb", None, {})
    assert list(open_store(tmp_path / "a.lmdb")) == [*records * 5000, records[1]]


@pytest.mark.parametrize("stage", ["storage", "os.rename"])
def test_a_writer_that_is_killed_while_it_finishes_can_be_resumed(tmp_path, stage):
    """Killed after the last transaction, or before the rename."""
    values = [ValueCodec().pack(record) for record in _records(10)]
    code = f"""
import os
from pathlib import Path
from flashi2v_data.store import writer as module
with module.StoreWriter(Path("part"), {{"limit": 1}}) as writer:
    writer.append({values!r}, lambda: "all")
    module.{stage} = lambda *arguments: os._exit(9)
    writer.finish(Path("a.lmdb"), None, {{}})
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 9
    assert not (tmp_path / "a.lmdb").exists()
    with pytest.raises(InputError, match="was begun with another limit"):
        StoreWriter(tmp_path / "part", {"limit": 2}, resume=True)
    with StoreWriter(tmp_path / "part", {"limit": 1}, resume=True) as writer:
        assert (writer.state, writer.count) == ("all", 10)
        writer.finish(tmp_path / "a.lmdb", None, {})
    assert list(open_store(tmp_path / "a.lmdb")) == _records(10)


def test_progress_is_kept_where_hardly_anything_is(tmp_path):
    with StoreWriter(tmp_path / "part") as writer:
        for number in range(200):
            writer.append([], lambda number=number: number)
    with StoreWriter(tmp_path / "part", resume=True) as writer:
        assert writer.state > 100


def test_an_lmdb_of_another_kind_is_no_unfinished_part(tmp_path):
    write_store(tmp_path / "part", _records(3), {})
    with lmdb.open(str(tmp_path / "part")) as environment, environment.begin(write=True) as transaction:
        transaction.delete(b"!state")
    with pytest.raises(InputError, match="is not what an unfinished run left"):
        StoreWriter(tmp_path / "part", resume=True)


def test_a_store_of_features_is_no_store_of_clips(tmp_path):
    FeatureWriter(tmp_path / "features.lmdb", {"vae": 1}).close()
    with pytest.raises(InputError, match="is not a store of clips"):
        open_store(tmp_path / "features.lmdb")


HOLDER = """
import os, sys, time
from pathlib import Path
from flashi2v_data.store.writer import StoreWriter
writer = StoreWriter(Path("part"))
child = os.fork()
if child:
    print(child, flush=True)
time.sleep(1000)
"""


def test_a_part_is_free_the_moment_its_writer_is_killed_whatever_its_children_do(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(InputError, match=rf"part is in use by another process \(process {holder.pid} on "):
            StoreWriter(tmp_path / "part", resume=True)
        holder.kill()
        holder.wait()
        StoreWriter(tmp_path / "part", resume=True).close()
        os.kill(child, 0)  # it lives
    finally:
        os.kill(child, signal.SIGKILL)
        holder.stdout.close()
    assert [path.name for path in tmp_path.iterdir()] == ["part"]


def test_a_directory_that_is_removed_while_it_is_written_is_one_line(tmp_path):
    with StoreWriter(tmp_path / "lmdb/part") as writer:
        writer.append([b"\x90"])
        shutil.rmtree(tmp_path / "lmdb")
        with pytest.raises(StorageError, match=r"part: is gone, someone has removed it$"):
            writer.finish(tmp_path / "lmdb/a.lmdb", None, {})


def test_what_a_kill_leaves_of_the_first_pages_of_an_lmdb_is_begun_anew(tmp_path):
    for name in ("part", "cache"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.mdb").write_bytes(bytes(16) + b"half")
    with StoreWriter(tmp_path / "part", resume=True) as writer:
        writer.append([b"value"])
        writer.finish(tmp_path / "clips.lmdb", None, {})
    assert len(open_store(tmp_path / "clips.lmdb")) == 1
    ProbeCache(tmp_path / "cache").close()
