"""Runs on NPUs, or where the CPU stands for them; elsewhere nothing here is collected."""

import importlib.util
import os
from pathlib import Path

import pytest
import world

collect_ignore_glob = []
if "STUB_CANN_DEVICES" not in os.environ and os.environ.get("FLASHI2V_TEST_DEVICE") != "npu":
    collect_ignore_glob = ["test_*.py"]

_TRAIN = Path(__file__).parents[2] / "packages/flashi2v-train/tests/conftest.py"


@pytest.fixture(scope="session")
def make_workspace(tmp_path_factory):
    """Return what makes a new directory for runs of flashi2v-train on the small world."""
    spec = importlib.util.spec_from_file_location("training", _TRAIN)
    training = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(training)
    inputs = world.copy_into(tmp_path_factory.mktemp("inputs"))
    return lambda name: training.Workspace(tmp_path_factory.mktemp(name), inputs)


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Return what runs commands, and reads what they asked NPUs for."""
    from npu_runs import RECORDS, Runs

    return Runs(Path(os.environ.get(RECORDS) or tmp_path_factory.mktemp("records")))


@pytest.fixture
def two_npus():
    from flashi2v_npu_ops import UnsupportedError
    from flashi2v_npu_ops.device import resolve_device

    try:
        resolve_device("npu:1")
    except UnsupportedError as error:
        pytest.skip(str(error))
