"""For all packages' tests."""

import gc

# Nothing that is imported is garbage: looking for it while all test modules are collected, and again when the process
# ends, takes seconds of each.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.freeze()
