import builtins
import contextlib
import copyreg
import os
import pickle

import lmdb
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from flashi2v_data.errors import InputError
from flashi2v_data.store.legacy import PickleRefused, load_plain_pickle, load_value
from flashi2v_data.store.reader import open_store, write_store

RECORD = {
    "path": "/videos/a.mp4",
    "cap": ["a dog", "é"],
    "resolution": {"height": 720, "width": 1280},
    "fps": 29.97,
    "num_frames": 120,
    "start_frame_idx": 3,
    "crop": [0, 1280, 0, 720],
    "aesthetic": None,
}
KEYS = st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False) | st.text(max_size=300)
VALUES = st.recursive(
    KEYS | st.binary(max_size=300),
    lambda children: (
        st.lists(children, max_size=6)
        | st.dictionaries(KEYS, children, max_size=6)
        | st.tuples(children, children)
        | st.tuples(children, children, children, children)
        | st.sets(KEYS, max_size=3)
        | st.frozensets(KEYS, max_size=3)
    ),
    max_leaves=30,
)


@given(VALUES, st.sampled_from([4, 5]))
def test_plain_values_are_read_as_pickle_reads_them(value, protocol):
    assert load_plain_pickle(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_records_are_read_from_every_binary_protocol(protocol):
    data = pickle.dumps(RECORD, protocol)
    assert load_value(data) == load_value(zstandard.compress(data)) == RECORD


class _Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def _malicious(flag):
    command = f"touch {flag}"
    yield pickle.dumps(_Call(os.system, command))
    yield pickle.dumps(_Call(builtins.eval, f"open({str(flag)!r}, 'w')"))
    yield pickle.dumps({**RECORD, "cap": ["a", {"b": _Call(os.system, command)}]})
    for protocol in range(6):
        yield pickle.dumps(_Call(os.system, command), protocol)
    yield b"(S'" + command.encode() + b"'\nios\nsystem\n."
    yield b"(cos\nsystem\nS'" + command.encode() + b"'\no."
    yield b"\x80\x02ccollections\nOrderedDict\n)\x81}b."
    yield b"\x80\x04\x8c\x01aQ."
    yield b"\x80\x02\x82\xf0."
    yield b"\x80\x05\x97."
    yield b"\x80\x04\x8c\x02os\x8c\x06system\x93."


def test_pickles_that_would_run_code_are_refused_and_run_nothing(tmp_path):
    copyreg.add_extension("os", "system", 0xF0)
    flag = tmp_path / "ran"
    try:
        for data in _malicious(flag):
            with pytest.raises(PickleRefused, match="might run code"):
                load_value(data)
            with pytest.raises(PickleRefused, match="might run code"):
                load_value(zstandard.compress(data))
    finally:
        copyreg.remove_extension("os", "system", 0xF0)
    assert not flag.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04" + b"]" * 8_000_000 + b".",
        b"\x80\x04" + b"]" * 9_000_000 + b".",
        b"\x80\x04})" + b"\x85" * 90_000 + b"Ns.",  # a key of tuples in tuples, which hashing follows
        zstandard.compress(b"\x80\x04" + b"]" * (60 << 20)),  # two kilobytes
        b"\x80\x04K\x01r\xff\xff\xff\x7f.",  # memo number 2**31 - 1, for which pickle makes a table
        b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little") + b".",  # a terabyte of bytes
        b"\x80\x04\x8d" + (1 << 62).to_bytes(8, "little") + b".",
        b"\x80\x02\x8b\xff\xff\xff\x7f.",
        b"\x80\x02\x8b\xff\xff\xff\xff.",  # a negative length
        b"\x80\x04\x95" + b"\xff" * 8 + b"N.",
        b"\x80\x04]" + b"\x94h\x00\x86" * 60 + b".",
        b"\x80\x04}" + b"K\x01" + b"\x94h\x01\x86" * 60 + b"Ns.",
        zstandard.ZstdCompressor().compress(b"\x80\x04B\x00\x00\x00\x10" + bytes(1 << 28)),
    ],
)
def test_what_a_pickle_claims_is_not_allocated(data):
    resource = pytest.importorskip("resource")  # of Unix
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(PickleRefused):
        load_value(data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


@given(st.binary(max_size=80), st.integers(0, 200), st.integers(0, 255))
def test_any_bytes_are_read_or_refused(noise, at, byte):
    data = bytearray(pickle.dumps(RECORD))
    data[at % len(data)] = byte
    for changed in (noise, bytes(data), bytes(data[:at])):
        with contextlib.suppress(PickleRefused):
            load_value(changed)


def _public_store(path, values, subdir=True, **more):
    with lmdb.open(str(path), subdir=subdir) as environment, environment.begin(write=True) as transaction:
        for number, value in enumerate(values):
            transaction.put(f"{number:012d}".encode(), value)
        for key, value in more.items():
            transaction.put(key.encode(), value)
    return path


@pytest.mark.parametrize("subdir", [True, False])
@pytest.mark.parametrize("compress", [bytes, zstandard.compress])
@pytest.mark.parametrize("more", [{}, {"length": b"25", "__len__": pickle.dumps(25), "!info": b"x"}])
def test_stores_of_the_public_code_are_read(tmp_path, subdir, compress, more):
    records = [{**RECORD, "num_frames": number} for number in range(25)]
    values = [compress(pickle.dumps(record)) for record in records]
    store = open_store(_public_store(tmp_path / "a.lmdb", values, subdir, **more))
    assert len(store) == 25
    assert list(store) == records
    assert store.config == {}


def test_what_public_records_take_for_granted_is_filled_in(tmp_path):
    record = {"path": "/a.mp4", "cap": "a dog", "num_frames": 100}
    store = open_store(_public_store(tmp_path / "a.lmdb", [pickle.dumps(record)]))
    assert store[0] == {**record, "fps": 24.0, "start_frame_idx": 0}


def test_a_malicious_record_is_named_and_the_others_are_read(tmp_path):
    flag = tmp_path / "ran"
    values = [pickle.dumps(RECORD), pickle.dumps({**RECORD, "cap": _Call(os.system, f"touch {flag}")})]
    store = open_store(_public_store(tmp_path / "a.lmdb", values))
    assert store[0] == RECORD
    with pytest.raises(InputError, match=r"a\.lmdb: record 1 is a pickle that holds more than plain values"):
        store[1]
    assert not flag.exists()


@pytest.mark.parametrize("value", [pickle.dumps([1]), pickle.dumps({"cap": "a"}), b"", b"text"])
def test_what_is_no_clip_says_so(tmp_path, value):
    with pytest.raises(InputError, match="record 0 is "):
        open_store(_public_store(tmp_path / "a.lmdb", [value]))[0]


def test_public_stores_are_not_mixed_with_filtered_ones(tmp_path):
    _public_store(tmp_path / "a.lmdb", [pickle.dumps(RECORD)])
    write_store(tmp_path / "b.lmdb", [RECORD], {"train_fps": 16})
    with pytest.raises(InputError, match="with other settings"):
        open_store(tmp_path)
