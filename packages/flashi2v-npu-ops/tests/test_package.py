"""What an installed package must hold: imports that change nothing, public names, backends of other distributions."""

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import flashi2v_npu_ops
from flashi2v_npu_ops import testing


def python(code: str, *paths: Path, **environment: str) -> str:
    """Run code in a process of its own that finds modules in `paths`, too; return what it prints."""
    search = os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")])
    finished = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": search, **environment},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def install(directory: Path, name: str, entry_points: str, modules: dict[str, str]) -> Path:
    """Make a wheel and let pip install it into `directory`/site."""
    pytest.importorskip("pip")
    info = f"{name}-1.0.dist-info"
    files = {
        **{f"{module}.py": text for module, text in modules.items()},
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": entry_points,
        f"{info}/RECORD": "",
    }
    wheel = directory / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    site = directory / "site"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(site))
    subprocess.run([*pip, str(wheel)], check=True)
    return site


def test_dir_shows_all_public_names_and_they_are_there():
    for package in (flashi2v_npu_ops, testing):
        assert {*package.__all__} <= {*dir(package)}
        assert all(hasattr(package, name) for name in package.__all__)
        with pytest.raises(AttributeError, match="nonsense"):
            package.nonsense  # noqa: B018


def test_the_source_of_the_stubs_is_installed():
    assert Path(testing.__file__).with_name("stub_cann.c").is_file()


IMPORTS = """
import os, sys
before = dict(os.environ)
import flashi2v_npu_ops, flashi2v_npu_ops.testing, flashi2v_npu_ops.cli
assert "torch" not in sys.modules
import torch
assert torch.loaded == {"torch_npu", "torch_other"}, torch.loaded
import flashi2v_npu_ops.operators.attention, flashi2v_npu_ops.backends.ascend, flashi2v_npu_ops.device
from flashi2v_npu_ops import attention, backends
assert flashi2v_npu_ops.attention is attention and backends("attention")
assert dict(os.environ) == before
"""


@pytest.mark.skipif(importlib.util.find_spec("torch_npu") is not None, reason="a stand-in would take its name")
def test_importing_the_package_first_keeps_torch_from_nothing(tmp_path):
    """Two stand-ins register themselves with torch as torch_npu does; nothing says that there is CANN."""
    names = ("torch_npu", "torch_other")
    load = "def load():\n    import torch\n    torch.loaded = getattr(torch, 'loaded', set()) | {__name__}\n"
    entry_points = "[torch.backends]\n" + "".join(f"{name} = {name}:load\n" for name in names)
    site = install(tmp_path, "extensions", entry_points, dict.fromkeys(names, load))
    python(IMPORTS, site, TORCH_DEVICE_BACKEND_AUTOLOAD="1")


TOY = """
import torch
from flashi2v_npu_ops import Backend

backend = Backend("toy")
empty = Backend("empty")

@backend.serves("gelu_tanh", obstacle=lambda case: "no fp64" if case.dtype == torch.float64 else None)
def gelu(x):
    return torch.full_like(x, 7)

stray = Backend("stray")
stray.serves("softmax")(gelu)
"""
TOY_ENTRY_POINTS = """[flashi2v_npu_ops.backends]
toy = toy_kernels:backend
broken = toy_absent:backend
no_backend = toy_kernels:gelu
ascend = toy_kernels:empty
stray = toy_kernels:stray
"""
USE_TOY = """
import json, logging, sys, torch
from flashi2v_npu_ops import UnsupportedError, attention, backends, gelu_tanh
from flashi2v_npu_ops.cli import main

assert "toy_kernels" not in sys.modules
logging.disable()
x = torch.ones(2)
said = {"auto": gelu_tanh(x).tolist(), "fp64": gelu_tanh(x.double()).dtype is torch.float64}
said["reference"] = torch.equal(gelu_tanh(x, backend="reference"), gelu_tanh(x, backend="torch"))
said["backends"] = backends("gelu_tanh")
for name in ("broken", "stray", "absent"):
    try:
        gelu_tanh(x, backend=name)
    except UnsupportedError as error:
        said[name] = str(error)
print(json.dumps(said))
sys.argv[1:] = ["doctor", "--device", "cpu", "--json"]
assert main() == 1
"""


def test_another_distribution_adds_a_backend(tmp_path):
    site = install(tmp_path, "toy", TOY_ENTRY_POINTS, {"toy_kernels": TOY})
    words, _, report = python(USE_TOY, site).partition("\n")
    said, report = json.loads(words), json.loads(report)
    assert said["backends"] == ["toy", "ascend", "torch", "reference"]
    assert said["auto"] == [7, 7]
    assert said["fp64"]
    assert said["reference"]
    assert said["broken"].startswith("backend 'broken' does not load: ModuleNotFoundError: ")
    assert said["stray"].endswith("it serves operators that have no reference: softmax")
    assert said["absent"] == ("gelu_tanh has no backend 'absent': choose one of auto, toy, ascend, torch, reference")
    ours = {"ascend": "npu", "cuda": "cuda", "torch": None, "taps": None, "unfold": None, "reference": None}
    by_name = {"cudnn": "cuda", "flash3": "cuda", "bf16": None}
    assert report["backends"] == {"toy": None} | ours | by_name
    assert report["operators"]["gelu_tanh"]["by"] == dict.fromkeys(("fp32", "bf16", "fp16"), "toy")
    faults = [finding["what"].partition(" does not load: ")[0] for finding in report["findings"]]
    assert faults[:4] == [f"backend {name!r}" for name in ("ascend", "broken", "no_backend", "stray")]
