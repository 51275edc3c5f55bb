import importlib
import subprocess
import sys

import pytest


@pytest.mark.parametrize("wing", ["", ".captions", ".curation", ".loading", ".shapes", ".store", ".video"])
def test_every_public_name_is_shown_and_can_be_imported(wing):
    package = importlib.import_module(f"flashi2v_data{wing}")
    assert package.__all__
    assert set(package.__all__) <= set(dir(package))
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = package.nothing_of_the_kind


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import flashi2v_data", {"torch", "av", "numpy", "lmdb", "pydantic", "transformers", "decord"}),
        (
            "import flashi2v_data.cli, flashi2v_data.curation.stream",
            {"torch", "av", "transformers", "decord", "matplotlib"},
        ),
        (
            "import flashi2v_data.loading.dataset, flashi2v_data.loading.loader",
            {"av", "decord", "transformers", "matplotlib"},
        ),
    ],
)
def test_importing_is_light(statement, heavy):
    program = f"{statement}\nimport sys\nprint(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not heavy & set(result.stdout.split())
