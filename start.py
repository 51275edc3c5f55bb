"""From a fresh clone to a video, or to passed tests, with nothing but Python 3.10:

    python start.py demo        samples the demo model's video, demo.mp4
    python start.py tests       runs all tests
    python start.py dev         makes .venv whole, to work on the packages: CONTRIBUTING.md

Everything is installed into .venv beside this file. A second run finds it there and starts at once.
"""

import argparse
import ast
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
SCRIPTS = ROOT / ".venv" / ("Scripts" if sys.platform == "win32" else "bin")
PACKAGES = ("npu-ops", "data", "model", "train", "infer")
COSTS = {
    "dev": "about 2 minutes, most of them downloading (0.9 GB; 2.4 GB on the disk)",
    "demo": "about 2 minutes, most of them downloading (0.5 GB; 1.3 GB on the disk), and samples a video in seconds",
    "tests": "about 15 minutes on two cores, 2 of them downloading (0.9 GB; 2.4 GB on the disk)",
}
TORCH = """\
torch comes in the build that fits the machine: the small one where there is no GPU. With one 3 GB to download and 6 GB
on the disk come on top; --torch cpu asks for the small build all the same, --torch cu128, say, for one of CUDA."""
OTHER_SOURCES = """\
torch comes from where pip's settings on this machine point (pip config list), and may be a build for GPUs: 3 GB more to
download, 6 GB more on the disk. --torch cpu asks PyTorch's own index for the small build."""
# pip's names and uv's.
SOURCES = {"index-url": "UV_DEFAULT_INDEX", "extra-index-url": "UV_INDEX", "find-links": "UV_FIND_LINKS"}
SETTINGS = {"constraint": "UV_CONSTRAINT", "trusted-host": "UV_INSECURE_HOST", "cert": "SSL_CERT_FILE"}


def main() -> None:
    """Install what is missing, and run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=sorted(COSTS), help="what to do once all is installed")
    parser.add_argument("paths", nargs="*", help="files or folders of tests (default: all)")
    parser.add_argument("--torch", metavar="BUILD", help="build of torch: auto, cpu, cu128, ... (default: auto)")
    options = parser.parse_args()
    if options.paths and options.what != "tests":
        parser.error("paths are of tests: leave them out")
    if sys.version_info < (3, 10):  # noqa: UP036  what is tried first
        sys.exit(f"start.py needs Python 3.10 or newer; this is {sys.version.split()[0]}")
    os.chdir(ROOT)
    os.environ.update(uv_environment(options.torch))
    print(f"{options.what} takes {COSTS[options.what]}.")
    print(TORCH if "UV_TORCH_BACKEND" in os.environ else OTHER_SOURCES, flush=True)
    python = str(SCRIPTS / "python")
    if not list(SCRIPTS.glob("pip*")):  # not begun, or interrupted
        run(sys.executable, "-m", "venv", ".venv")
    run(python, "-m", "pip", "install", "--quiet", "nox[uv]>=2025.2")
    if options.what != "demo":
        run(python, "-m", "nox", "-s", options.what, *(["--", *options.paths] if options.paths else []))
        return
    packages = [part for name in PACKAGES for part in ("-e", f"packages/flashi2v-{name}")]
    run(str(SCRIPTS / "uv"), "pip", "install", "--python", python, "-c", ".ci/constraints.txt", *packages)
    run(str(SCRIPTS / "flashi2v-infer"), "--model", "demo")
    print(f"The video is {ROOT / 'demo.mp4'}; the commands are in {SCRIPTS}.")


def run(*command: str) -> None:
    """Run a command; where it fails it has said why, and this ends, too."""
    code = subprocess.run(command).returncode
    if code:
        sys.exit(code)


def uv_environment(torch: "str | None" = None) -> "dict[str, str]":
    """Return what uv, which installs in seconds and reads no setting of pip's, must be told of them.

    Where pip takes packages from somewhere else than its own index, so does uv, and takes the newest of all, as pip
    does; torch's build is chosen there, too, unless one is asked for.
    """
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    found = {}
    # From the least to the most important: of all commands, of `pip install`, of the environment.
    for section in ("global", "install", ":env:"):
        for line in listed.stdout.splitlines():
            name, _, value = line.partition("=")
            if name.startswith(f"{section}."):
                found[name[len(section) + 1 :]] = ast.literal_eval(value).split()
    has_sources = any(name in found for name in SOURCES)
    chosen = {
        uv: ("," if name == "find-links" else " ").join(found[name])
        for name, uv in {**SOURCES, **SETTINGS}.items()
        if name in found
    }
    if has_sources:
        chosen["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    else:
        chosen["UV_TORCH_BACKEND"] = "auto"
    given = {name: value for name, value in os.environ.items() if name in chosen}  # what is said to uv itself counts
    return {**chosen, **given, **({"UV_TORCH_BACKEND": torch} if torch else {})}


if __name__ == "__main__":
    main()
