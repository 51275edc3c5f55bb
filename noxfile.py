"""Everything the project runs on itself: `nox -l` lists it."""

import platform
import shutil
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2024.4"
nox.options.sessions = ["lint", "imports", "tests"]
nox.options.reuse_existing_virtualenvs = True

# The one place that decides which torch is tested, and what is built for just one; packages themselves ask for ranges.
CONSTRAINTS = ["torch==2.13.0", "torch_npu==2.13.0", "torchcodec==0.13.0"]

# In the order of the arrows: each needs only those before it.
PACKAGES = ("flashi2v-npu-ops", "flashi2v-data", "flashi2v-model", "flashi2v-train", "flashi2v-infer")
EXTRAS = {"flashi2v-train": "[wandb]", "flashi2v-data": "[decord,plots,strips,tokenizer,torchcodec]"}
TEST_TOOLS = (
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "peft>=0.15",
    "matplotlib>=3.8",
)
ROOT = Path(__file__).parent


def install(session: nox.Session, *arguments: str) -> None:
    """pip install within the constraints."""
    constraints = Path(session.create_tmp()) / "constraints.txt"
    constraints.write_text("\n".join(CONSTRAINTS) + "\n")
    session.install("-c", str(constraints), *arguments)


def install_editable(session: nox.Session, *tools: str) -> None:
    """Install all packages from their sources, in one go, so that they find each other."""
    packages = [part for name in PACKAGES for part in ("-e", f"packages/{name}{EXTRAS.get(name, '')}")]
    install(session, *packages, *tools)


def run_tests(session: nox.Session, *paths: str) -> None:
    """Run pytest on two processes of one thread each: most tests are too small for more threads to help.

    A file's tests run in one process, so that what they share is set up once.
    """
    session.run(
        "python",
        "-m",
        "pytest",
        "-n",
        "2",
        "--dist",
        "loadfile",
        *(session.posargs or paths),
        env={"OMP_NUM_THREADS": "1"},
    )


@nox.session
def tests(session: nox.Session) -> None:
    """Every package's suite, and the way from videos to a new video through the console scripts."""
    install_editable(session, *TEST_TOOLS)
    run_tests(session, "packages", "examples")


@nox.session
def lint(session: nox.Session) -> None:
    """Formatting, common mistakes, types."""
    install_editable(session, "ruff>=0.9", "mypy>=1.15")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy", *(f"packages/{name}/src" for name in PACKAGES))


@nox.session
def imports(session: nox.Session) -> None:
    """Only the allowed arrows between packages, and nothing imported that is not declared."""
    install(session, "packaging", "tomli; python_version < '3.11'")
    session.run("python", ".ci/imports.py")


@nox.session(reuse_venv=False)
def wheels(session: nox.Session) -> None:
    """Build sdists and wheels, install them one after the other, and run what packaging may break on what a user gets.

    That is what importing a package brings, the demo model, and the way from videos to a new video through the console
    scripts.
    """
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    session.install("build")
    for name in PACKAGES:
        session.run("python", "-m", "build", "--outdir", str(dist), f"packages/{name}", silent=True)
    for name in PACKAGES:
        module = name.replace("-", "_")
        wheel = next(dist.glob(f"{module}-*.whl"))
        install(session, f"{wheel}{EXTRAS.get(name, '')}")
        session.run("python", "-c", f"import {module}; print({module}.__version__, {module}.__file__)")
        session.run(name, "--help", silent=True)
    install(session, *TEST_TOOLS)
    files = [str(path) for name in ("test_package", "test_demo") for path in Path().glob(f"packages/*/tests/{name}.py")]
    run_tests(session, "-m", "not slow", *files, "examples")


@nox.session
def conformance(session: nox.Session) -> None:
    """The Ascend backend's calls against the real torch_npu wheel, on stubs of CANN: needs no NPU."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        session.skip(f"the stubs of CANN are for Linux on x86_64, this is {sys.platform} on {platform.machine()}")
    install(session, "-e", "packages/flashi2v-npu-ops[npu]", *TEST_TOOLS[:2], "numpy", "pyyaml")
    session.run(
        *("python", "-m", "pytest", "packages/flashi2v-npu-ops/tests/conformance", *session.posargs),
        # Without CANN, torch cannot load torch_npu by itself; the tests decide who does.
        env={"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
    )


@nox.session(venv_backend="none")
def faults(session: nox.Session) -> None:
    """Strike commands at single file operations: started again, they must end as if nothing had been."""
    session.run(tests_python(session), "tests/faults/run.py", *session.posargs, external=True)


@nox.session(venv_backend="none")
def fuzz(session: nox.Session) -> None:
    """Read nearly valid inputs of every kind: only declared errors may come of them."""
    session.run(tests_python(session), "tests/fuzz/run.py", *session.posargs, external=True)


def tests_python(session: nox.Session) -> str:
    """Return the interpreter of the session `tests`, whose environment is made where it is missing."""
    python = ROOT / ".nox" / "tests" / "bin" / "python"
    if not python.exists():
        session.run(sys.executable, "-m", "nox", "-s", "tests", "--install-only", external=True)
    return str(python)


@nox.session(venv_backend="none")
def npu(session: nox.Session) -> None:
    """The operators on a real NPU, in the environment that is active: run this first on an Ascend machine."""
    on_accelerator(session, "npu")


@nox.session(venv_backend="none")
def cuda(session: nox.Session) -> None:
    """The operators on a real GPU, in the environment that is active."""
    on_accelerator(session, "cuda")


def on_accelerator(session: nox.Session, device: str) -> None:
    """Ask the doctor, then hold every backend of the device to its reference."""
    session.run("flashi2v-npu-ops", "doctor", "--device", device)
    tests = "packages/flashi2v-npu-ops/tests"
    session.run(
        *("python", "-m", "pytest", tests, f"--ignore={tests}/conformance", *session.posargs),
        env={"FLASHI2V_TEST_DEVICE": device},
    )


@nox.session
def demo(session: nox.Session) -> None:
    """Moving shapes: make videos, filter, train some ten minutes, sample; the result is in demo/."""
    install_editable(session, "matplotlib>=3.8")
    session.run("python", "examples/moving_shapes/run.py", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure, as ratios within one run; name packages to measure only those."""
    install_editable(session)
    session.run("python", "-c", "import torch; print(torch.__version__, torch.__config__.parallel_info())")
    session.run("python", "-m", "platform")
    for name in session.posargs or PACKAGES:
        for script in sorted((ROOT / "packages" / name / "bench").glob("bench_*.py")):
            session.run("python", str(script))
