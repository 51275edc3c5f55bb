"""Load the real torch_npu wheel on a Linux machine that has neither CANN nor an NPU.

torch_npu registers the schema, the autograd formula and the shape function of every Ascend operator, and all of that
is host code. What keeps it from being imported elsewhere is that it links to the libraries of CANN. This module
builds one shared library that defines what torch_npu links to, and gives it the name of each CANN library that the
loader misses. Under `FakeTensorMode`, `device="npu"` then works, autograd included: argument names, shapes and dtypes
of a call are held to the real operator. Values are not computed.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

# The C interfaces of CANN: AscendCL, HCCL, the profiler and the runtime.
_CANN_SYMBOL = re.compile(r"(acl|Hccl|Msprof|rt[A-Z])\w+")
_BEHAVIOUR = tuple(str(Path(__file__).with_name(f"stub_{name}.c")) for name in ("cann", "hccl"))
_LIBRARY = "libstub_cann.so"
# What torch_npu wants to exist under ASCEND_HOME_PATH.
_INSTALLATION = ("runtime", "compiler", "opp")
_SITE = """from flashi2v_npu_ops.testing.stubs import compute_after_import

compute_after_import()
"""


def stub_cann(out: Path, *, devices: int = 1, compute: bool = False, older: bool = False) -> dict[str, str]:
    """Build stubs of CANN for the torch_npu of this interpreter, and return the environment in which they are found.

    The environment is for subprocesses: it is `os.environ`, changed. They import torch, then torch_npu. Whatever points
    to a real CANN is left out, since a half-stubbed CANN does not load.

    Args:
        out: where the libraries go; it stands for CANN's directory. What it holds under the same names is replaced.
        devices: how many NPUs there seem to be. Processes reach each other by HCCL, on one machine.
        compute: let the CPU compute what the NPUs are asked for (`compute_on_cpu`) in every process that imports
            torch_npu, by a sitecustomize module; one that the interpreter has is not run.
        older: refuse, too, what only older torch_npu refuse: casts of sharded tensors (DTensor).

    Raises:
        RuntimeError: torch_npu is not installed or is not whole, a tool is missing (cc, ldd, nm, readelf), or there is
            a CANN that the loader finds.
    """
    out = out.resolve()
    _build(_directory("torch_npu"), _directory("torch") / "lib", out)
    environment = _environment(out) | {"STUB_CANN_DEVICES": str(devices)}
    if compute:
        (out / "python").mkdir(exist_ok=True)
        (out / "python/sitecustomize.py").write_text(_SITE)
        path = [str(out / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(path)
        environment["STUB_CANN_OLDER"] = str(int(older))
    return environment


def compute_after_import() -> None:
    """Let `compute_on_cpu` run as soon as torch_npu has been imported."""
    # Kernels of the CPU are done when they return: what HCCL is asked for must not wait in torch_npu's queue meanwhile.
    os.environ["TASK_QUEUE_ENABLE"] = "0"
    sys.meta_path.insert(0, _ComputeAfterImport())


class _ComputeAfterImport:
    """Finds torch_npu as others do, and adds a step to its loading."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "torch_npu":
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:  # whoever only asks whether there is a torch_npu does not load it
            sys.meta_path.insert(0, self)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_compute(module: ModuleType) -> None:
            load(module)
            from flashi2v_npu_ops.testing.cpu_kernels import compute_on_cpu

            compute_on_cpu()

        spec.loader.exec_module = load_and_compute  # type: ignore[method-assign]
        return spec


def _directory(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(f"{package} is not installed for this interpreter: pip install torch_npu")
    return Path(spec.submodule_search_locations[0]).resolve()


def _build(torch_npu_dir: Path, torch_lib: Path, out: Path) -> None:
    for tool, package in {"cc": "a C compiler", "ldd": "glibc", "nm": "binutils", "readelf": "binutils"}.items():
        if shutil.which(tool) is None:
            raise RuntimeError(f"{tool} is not on PATH: install {package} to build the CANN stubs")
    extensions = sorted(torch_npu_dir.glob("_C.*.so"))
    if len(extensions) != 1:
        raise RuntimeError(f"{torch_npu_dir} has {len(extensions)} files _C.*.so: give the directory of one torch_npu")

    # Only what `import torch_npu._C` loads. The wheel's optional parts (ATB, torchair) need further libraries with C++
    # interfaces, which no stub of C functions can stand for.
    loaded = _loaded(extensions[0], torch_lib)
    own = [extensions[0], *(path for path in loaded.values() if path and path.is_relative_to(torch_npu_dir))]
    missing = sorted({name for path in own for name in _needed(path) if loaded[name] is None})
    if not missing:
        raise RuntimeError(f"{extensions[0]} finds all its libraries: stubs are for machines without CANN")
    symbols = sorted({name for path in own for name in _undefined(path) if _CANN_SYMBOL.fullmatch(name)})

    for directory in _INSTALLATION:
        (out / directory).mkdir(parents=True, exist_ok=True)
    zeros = out / "zeros.c"
    # Weak, so that the definitions with behaviour win.
    zeros.write_text("".join(f"__attribute__((weak)) long {name}(void) {{ return 0; }}\n" for name in symbols))
    _run("cc", "-shared", "-fPIC", "-o", str(out / _LIBRARY), *_BEHAVIOUR, str(zeros))
    for name in missing:
        # The loader knows a library by its inode: all names lead to one copy, in which every dlsym finds everything.
        link = out / name
        link.unlink(missing_ok=True)
        link.symlink_to(_LIBRARY)


def _environment(lib_dir: Path) -> dict[str, str]:
    inherited = [path for path in os.environ.get("LD_LIBRARY_PATH", "").split(":") if path]
    search = [str(lib_dir), *(path for path in inherited if not (Path(path) / "libascendcl.so").exists())]
    return {name: value for name, value in os.environ.items() if not name.startswith("ASCEND_")} | {
        "LD_LIBRARY_PATH": ":".join(search),
        # Importing torch would import torch_npu too, and turn its errors into others.
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        # Without it, torch_npu prints a warning to stdout and looks for CANN's version in all of the working directory.
        "ASCEND_HOME_PATH": str(lib_dir),
        "ASCEND_OPP_PATH": str(lib_dir / "opp"),
    }


def _loaded(binary: Path, torch_lib: Path) -> dict[str, Path | None]:
    """Return the libraries that loading `binary` brings in, by name; None where the loader finds no file."""
    # Only torch's own directory: a CANN on the caller's LD_LIBRARY_PATH must count as missing.
    listing = _run("ldd", str(binary), env=os.environ | {"LD_LIBRARY_PATH": str(torch_lib)})
    found = re.findall(r"^\s*(\S+) => (.+?)(?: \(0x[0-9a-f]+\))?$", listing, flags=re.MULTILINE)
    return {name: None if target == "not found" else Path(target).resolve() for name, target in found}


def _needed(binary: Path) -> list[str]:
    names = re.findall(r"\(NEEDED\).*\[(.+)\]", _run("readelf", "--dynamic", "--wide", str(binary)))
    # ldd prints the loader itself without an arrow.
    return [name for name in names if not name.startswith("ld-linux")]


def _undefined(binary: Path) -> list[str]:
    return [line.split()[-1] for line in _run("nm", "--dynamic", "--undefined-only", str(binary)).splitlines()]


def _run(*command: str, env: dict[str, str] | None = None) -> str:
    finished = subprocess.run(command, env=env, capture_output=True, text=True)
    if finished.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{finished.stderr}")
    return finished.stdout
