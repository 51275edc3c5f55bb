"""Random reads of a store against bare LMDB gets of the same values, in one run."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import lmdb
import numpy as np
from bench_filter import entries

from flashi2v_data import open_store, write_store
from flashi2v_data.store.environments import open_shared

NUM_RECORDS, NUM_READS, NUM_ROUNDS = 100_000, 100_000, 5


def main() -> None:
    order = np.random.default_rng(0).integers(0, NUM_RECORDS, NUM_READS).tolist()
    with tempfile.TemporaryDirectory() as directory:
        records = ({**entry, "start_frame_idx": 0} for entry in entries(NUM_RECORDS))
        path = write_store(Path(directory) / "store.lmdb", records, {})
        store = open_store(path)

        def read_records() -> None:
            for index in order:
                store[index]

        def get_values(begin_each: bool) -> None:
            # One process may open an LMDB once only, so the store's own environment serves both.
            environment = open_shared(path)
            if begin_each:
                for index in order:
                    with environment.begin() as transaction:
                        transaction.get(f"{index:012d}".encode())
            else:
                with environment.begin() as transaction:
                    for index in order:
                        transaction.get(f"{index:012d}".encode())

        calls: dict[str, Callable[[], None]] = {
            "LMDB gets, a transaction each": lambda: get_values(True),
            "LMDB gets, one transaction": lambda: get_values(False),
            "records of the store": read_records,
        }
        seconds = dict.fromkeys(calls, float("inf"))
        for _ in range(NUM_ROUNDS):
            for name, call in calls.items():
                begin = time.perf_counter()
                call()
                seconds[name] = min(seconds[name], time.perf_counter() - begin)
    first = next(iter(seconds.values()))
    for name, value in seconds.items():
        print(f"{name:<32} {NUM_READS / value:>10,.0f} reads/s, {first / value:.2f}x  (lmdb {lmdb.__version__})")


if __name__ == "__main__":
    main()
