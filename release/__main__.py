"""Release one package: nox -s release -- NAME VERSION [--dry-run] [--tests NAME ...]

All happens in a worktree of its own: where something is wrong, nothing has changed. CONTRIBUTING.md tells the steps.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from io import BytesIO
from pathlib import Path

from packaging.version import InvalidVersion, Version

from release import surface
from release.compatibility import PAGE, record, write_page
from release.packages import QUICK_TESTS, FailedError, Package, ReleaseError, read

CONFIG = "release/towncrier.toml"
WHEELS = Path(".nox/release-wheels").absolute()  # of siblings, by what they were built from
Versions = dict[str, Package]  # by name, one of each package


def main() -> int:
    """Run the command line; return its exit code."""
    parser = argparse.ArgumentParser(prog="release", description=__doc__.partition("\n")[0])
    parser.add_argument("name", choices=QUICK_TESTS, help="the package")
    parser.add_argument("version", help="its new version")
    parser.add_argument("--dry-run", action="store_true", help="do all but commit and tag")
    names = sorted({name for each in QUICK_TESTS.values() for name in each})
    only = "only these of the quick tests, to try the way"
    parser.add_argument("--tests", nargs="+", default=[], choices=names, metavar="NAME", help=only)
    options = parser.parse_args()
    try:
        release(options.name, options.version, options.tests, options.dry_run)
    except ReleaseError as error:
        print(f"release: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def release(name: str, number: str, tests: list[str], dry_run: bool) -> None:
    """Make a release of the package, of what is committed.

    Raises:
        ReleaseError: something is wrong with it; nothing has changed.
    """
    try:
        version = Version(number)
    except InvalidVersion as error:
        raise ReleaseError(f"{number} is no version: give numbers such as 0.2.0") from error
    if changed := git("status", "--porcelain").splitlines():
        paths = ", ".join(line.split(maxsplit=1)[1] for line in changed[:5])
        raise ReleaseError(f"commit or remove what is not committed first: {paths}")
    branch = git("branch", "--show-current") or "HEAD"
    with worktree() as (tree, scratch):
        print(*check(packages_of(tree, "HEAD"), name, version, scratch), sep="\n", flush=True)
        write(read(tree)[name], version)
        packages = packages_of(tree, "HEAD")
        rounds = companions(packages, name, scratch)
        record(packages[name], (environment_with(chosen) for chosen in rounds))
        write_page(tree)
        tag = f"{name}-v{version}"
        git("add", "--all", f"packages/{name}", PAGE, cwd=tree)
        git("commit", "--quiet", "--message", f"Release {name} {version}", cwd=tree)
        commit = git("rev-parse", "HEAD", cwd=tree)
        built = build_twice(packages[name], commit, scratch)
        run("twine", "check", "--strict", *map(str, built), silent=True)
        for index, chosen in enumerate(rounds):
            print(f"{('oldest', 'newest')[index - len(rounds)]} versions that fit: {label(chosen)}", flush=True)
            try_out(chosen, name, built[-1], scratch / f"site{index}", tests)
        if dry_run:
            print(f"{tag} can be released; nothing has changed")
            return
        git("merge", "--quiet", "--ff-only", commit)
        git("tag", "--annotate", tag, "--message", f"{name} {version}")
        dist = Path("dist")
        dist.mkdir(exist_ok=True)
        for path in built:
            shutil.copy(path, dist)
    print(f"dist/ holds {' and '.join(path.name for path in built)}")
    print(f"{tag} is tagged. To publish it:  git push --atomic origin {branch} {tag}")


@contextmanager
def worktree() -> Iterator[tuple[Path, Path]]:
    """Yield a worktree of what is committed, and an empty folder; both are gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="flashi2v-release-") as place:
        tree, scratch = Path(place) / "tree", Path(place) / "scratch"
        scratch.mkdir()
        git("worktree", "add", "--quiet", "--detach", str(tree))
        try:
            yield tree, scratch
        finally:
            git("worktree", "remove", "--force", str(tree))


def check(packages: Versions, name: str, version: Version, scratch: Path) -> list[str]:
    """Return what is new in the package, where this version may be released."""
    package, tags = packages[name], released(name)
    last = max(tags, default=None)
    if last is not None and version <= last:
        raise ReleaseError(f"{name} {last} is released: the next version is greater than {version}")
    if version < package.version:
        raise ReleaseError(f"{name} is at {package.version} already: the next version is not {version}")
    if not [path for path in (package.folder / "changes").glob("*.md") if path.name != "README.md"]:
        raise ReleaseError(f"packages/{name}/changes holds no change: say there what is new")
    new = replace(package, version=version)
    for other in packages.values():
        if not new.fits(other):
            asks, asked = (name, other.name) if other.name in new.siblings else (other.name, name)
            allowed = packages[asks].siblings[asked]
            at = version if asked == name else other.version
            where = f"packages/{asks}/pyproject.toml"
            raise ReleaseError(f"{where} asks for {asked}{allowed}, which leaves out {at}: widen it")
    if last is None:
        return [f"{name} {version} is its first release"]
    breaks, added = surface.changes(
        name.replace("-", "_"), checkout(tags[last], scratch) / f"packages/{name}/src", package.folder / "src"
    )
    told = [f"breaks since {last}:", *breaks, f"new since {last}:", *added]
    significant = slice(0, 2 if version.major == 0 else 1)
    if breaks and version.release[significant] == last.release[significant]:
        why = f"{version} breaks what {last} offers, so more than its last number must grow"
        raise ReleaseError(f"{why}: {'; '.join(breaks)}")
    return told


def write(package: Package, version: Version) -> None:
    """Write the version, and the changelog from the changes."""
    text = package.init.read_text()
    package.init.write_text(re.sub(r'^__version__ = ".+"$', f'__version__ = "{version}"', text, flags=re.MULTILINE))
    today = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    where = ("--config", CONFIG, "--dir", f"packages/{package.name}")
    what = ("--name", package.name, "--version", str(version), "--date", today)
    run("towncrier", "build", "--yes", *where, *what, cwd=package.folder.parents[1], silent=True)


def companions(packages: Versions, name: str, scratch: Path) -> list[Versions]:
    """Return the packages to try the new one with: the oldest releases that fit together, and the newest.

    What is in the tree is the newest of all. A package that nobody among them needs may be left out.
    """
    rounds = []
    for oldest in (True, False):
        chosen = {name: packages[name]}
        # The others in the order of what needs most: what is needed is chosen last, by all the ranges there are.
        for other in (each for each in reversed(packages) if each != name):
            candidates = versions(packages[other], oldest, scratch)
            found = next((each for each in candidates if all(map(each.fits, chosen.values()))), None)
            if found is not None:
                chosen[other] = found
            elif any(other in package.siblings for package in chosen.values()):
                raise ReleaseError(f"no version of {other} fits {label(chosen)}")
        rounds.append(chosen)
    is_same = len({tuple((each, package.sources) for each, package in chosen.items()) for chosen in rounds}) == 1
    return rounds[:1] if is_same else rounds


def versions(package: Package, oldest: bool, scratch: Path) -> Iterator[Package]:
    """Yield the versions of a package: its releases and what is in the tree, the oldest or the newest first."""
    tags = released(package.name)
    if not oldest:
        yield package
    for version in sorted(tags, reverse=not oldest):
        yield packages_of(checkout(tags[version], scratch), tags[version])[package.name]
    if oldest:
        yield package


def packages_of(tree: Path, ref: str) -> Versions:
    """Return the packages of a tree, in which a commit is."""
    return {
        name: replace(each, sources=git("rev-parse", f"{ref}:packages/{name}")) for name, each in read(tree).items()
    }


def released(name: str) -> dict[Version, str]:
    """Return the tags of a package's releases."""
    tags = git("tag", "--list", f"{name}-v*").split()
    return {Version(tag.removeprefix(f"{name}-v")): tag for tag in tags}


def environment_with(chosen: Versions) -> dict[str, str]:
    """Return this environment's versions, those packages in the place of its own."""
    found = json.loads(run(sys.executable, "-m", "release.environment", silent=True))
    others = {name: each for name, each in found.items() if name not in QUICK_TESTS}
    return {"what": "quick tests", **others, **{name: str(package.version) for name, package in chosen.items()}}


def build_twice(package: Package, commit: str, scratch: Path) -> list[Path]:
    """Build sdist and wheel in two places; return their paths, if both are the same to the byte."""
    first, second = scratch / "first", scratch / "second"
    build(package.folder, first)
    build(checkout(commit, scratch) / "packages" / package.name, second)
    paths = [*first.glob("*.tar.gz"), *first.glob("*.whl")]
    for path in paths:
        if path.read_bytes() != (second / path.name).read_bytes():
            raise ReleaseError(f"{path.name} is not the same when it is built again: look for times and paths in it")
        print(f"{path.name}  sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}")
    return paths


def build(folder: Path, into: Path, *kinds: str) -> None:
    """Build an sdist, and a wheel from it, or only what is asked for."""
    run(sys.executable, "-m", "build", "--no-isolation", *kinds, "--outdir", str(into), str(folder), silent=True)


def wheel(package: Package) -> Path:
    """Return a sibling's wheel, built once for all releases that are tried."""
    place = WHEELS / package.sources
    if not list(place.glob("*.whl")):
        build(package.folder, place, "--wheel")
    return next(place.glob("*.whl"))


def try_out(chosen: Versions, name: str, new: Path, site: Path, tests: list[str]) -> None:
    """Install wheels into a folder, see that they have what they ask for, and run the quick tests on them.

    Tests are those of the package, and of the packages that need it, each from the commit that its wheel is from.
    """
    wheels = [new if each == name else wheel(package) for each, package in chosen.items()]
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile")
    run(*pip, "--target", str(site), *map(str, wheels))
    run(sys.executable, "-m", "release.environment", str(site), *chosen, first=site)
    by_tree: dict[Path, list[str]] = {}
    for each, package in chosen.items():
        if each == name or name in package.siblings:
            by_tree.setdefault(package.folder.parents[1], []).extend(package.quick_tests(tests))
    for tree, paths in by_tree.items():
        if paths:  # without any, pytest would run all that there are
            run(sys.executable, "-m", "pytest", "-q", "-m", "not slow", *paths, cwd=tree, first=site)


def label(chosen: Versions) -> str:
    """Return the names and versions of packages, for people."""
    return ", ".join(f"{name} {package.version}" for name, package in chosen.items())


def checkout(ref: str, scratch: Path) -> Path:
    """Return a folder with all files of a commit."""
    place = scratch / "checkouts" / ref
    if not place.exists():
        archive = subprocess.run(["git", "archive", ref], capture_output=True, check=True).stdout
        with tarfile.open(fileobj=BytesIO(archive)) as files:
            files.extraction_filter = getattr(tarfile, "data_filter", None)  # Debian's Python 3.11 has none
            files.extractall(place)
    return place


def git(*words: str, cwd: Path = Path()) -> str:
    """Run git, and return what it prints."""
    return run("git", *words, cwd=cwd, silent=True).strip()


def run(*words: str, cwd: Path = Path(), first: Path | None = None, silent: bool = False) -> str:
    """Run a command, modules of `first` before all others; return what it prints, if that is not shown."""
    environment = dict(os.environ)
    for name, place in (("PATH", Path(sys.executable).parent), ("PYTHONPATH", first)):
        if place is not None:
            environment[name] = os.pathsep.join(filter(None, (str(place), os.environ.get(name))))
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=silent, text=True)
    if done.returncode:
        print(done.stdout or "", done.stderr or "", file=sys.stderr)
        raise FailedError(f"what is said above is of {' '.join(words[:9])}")
    return done.stdout or ""


if __name__ == "__main__":
    sys.exit(main())
