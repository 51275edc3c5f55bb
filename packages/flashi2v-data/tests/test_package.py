import subprocess
import sys

import pytest

import flashi2v_data


def test_every_public_name_can_be_imported():
    for name in flashi2v_data.__all__:
        assert getattr(flashi2v_data, name) is not None
    homes = [name for names in flashi2v_data._HOMES.values() for name in names]
    assert sorted([*homes, "__version__"]) == sorted(flashi2v_data.__all__)
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = flashi2v_data.nothing_of_the_kind


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
