"""Releases of all five packages, in a clone: from a change to a tag; and what keeps a version from being released."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from release import compatibility
from release.packages import QUICK_TESTS, read

ROOT = Path(__file__).parents[1]
PACKAGES = read(ROOT)
FIRST = {name: str(package.version) for name, package in PACKAGES.items()}
PERSON = {f"GIT_{role}_{what}": "nobody" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


def git(clone: Path, *words: str) -> str:
    return subprocess.run(
        ["git", *words], cwd=clone, env={**os.environ, **PERSON}, capture_output=True, text=True, check=True
    ).stdout.strip()


def release(clone: Path, *words: str, tests: str = "export") -> subprocess.CompletedProcess[str]:
    """Release with the quickest of the quick tests: those of `export` are infer's, which needs all but train."""
    command = (sys.executable, "-m", "release", *words, "--tests", tests)
    return subprocess.run(command, cwd=clone, env={**os.environ, **PERSON}, capture_output=True, text=True)


def change(clone: Path, name: str) -> None:
    """Commit something new in a package."""
    (clone / f"packages/{name}/changes/something.fixed.md").write_text(f"- Something in {name}.\n")
    init = PACKAGES[name].init.relative_to(ROOT)
    (clone / init).write_text((clone / init).read_text() + "\n# changed\n")
    git(clone, "add", "--all")
    git(clone, "commit", "--quiet", "--message", "A change")


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """What is committed, all packages at their first release."""
    if not (ROOT / ".git").exists():
        pytest.skip("these sources are no clone")
    clone = tmp_path_factory.mktemp("release") / "clone"
    git(ROOT, "clone", "--quiet", "--no-tags", str(ROOT), str(clone))
    return clone


@pytest.mark.parametrize("name", PACKAGES)
def test_every_package_is_released(clone, name):
    version, before = FIRST[name], git(clone, "rev-parse", "HEAD")
    done = release(clone, name, version, tests="autopsy" if name == "flashi2v-train" else "export")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\d+ passed", done.stdout, re.MULTILINE)
    assert "oldest" not in done.stdout  # of the others there is one version each
    tag = f"{name}-v{version}"
    assert f"git push --atomic origin {git(clone, 'branch', '--show-current')} {tag}" in done.stdout
    assert git(clone, "rev-parse", f"{tag}^{{commit}}") == git(clone, "rev-parse", "HEAD")
    assert git(clone, "rev-parse", "HEAD~1") == before
    changed = set(git(clone, "diff", "--name-only", before).split())
    assert {path for path in changed if not path.startswith(f"packages/{name}/")} <= {compatibility.PAGE}
    assert f"packages/{name}/CHANGELOG.md" in changed
    assert [path.name for path in (clone / f"packages/{name}/changes").iterdir()] == ["README.md"]
    assert f"\n## {version} (" in (clone / f"packages/{name}/CHANGELOG.md").read_text()
    assert git(clone, "status", "--porcelain") == ""
    assert len([*(clone / "dist").glob(f"{name.replace('-', '_')}-{version}*")]) == 2
    assert (clone / compatibility.PAGE).read_text() == compatibility.page(clone)
    tested = json.loads((clone / PACKAGES[name].init.relative_to(ROOT)).with_name("tested.json").read_text())
    assert tested[-1].items() >= FIRST.items()


@pytest.fixture
def released(clone) -> None:
    """The clone, each package at its first release, by the test above if that has run."""
    for name, version in FIRST.items():
        if not git(clone, "tag", "--list", f"{name}-v{version}"):
            for path in (clone / f"packages/{name}/changes").glob("*.*.md"):
                path.unlink()
            git(clone, "commit", "--quiet", "--all", "--message", f"Release {name}")
            git(clone, "tag", f"{name}-v{version}")


@pytest.fixture
def again(clone, released):
    """The clone, which is afterwards as it was."""
    before = git(clone, "rev-parse", "HEAD"), git(clone, "tag")
    yield clone
    git(clone, "reset", "--quiet", "--hard", before[0])
    assert git(clone, "tag") == before[1]


def test_siblings_are_the_oldest_and_the_newest_and_a_dry_run_changes_nothing(clone, released):
    ops, newer = FIRST["flashi2v-npu-ops"], f"{FIRST['flashi2v-npu-ops']}.1"
    init = clone / PACKAGES["flashi2v-npu-ops"].init.relative_to(ROOT)
    init.write_text(init.read_text().replace(f'__version__ = "{ops}"', f'__version__ = "{newer}"'))
    change(clone, "flashi2v-infer")
    git(clone, "tag", f"flashi2v-npu-ops-v{newer}")
    before = git(clone, "rev-parse", "HEAD"), git(clone, "tag"), git(clone, "worktree", "list")
    done = release(clone, "flashi2v-infer", f"{FIRST['flashi2v-infer']}.1", "--dry-run", tests="autopsy")
    assert done.returncode == 0, done.stdout + done.stderr
    tried = dict(re.findall(r"^(oldest|newest) versions that fit: (.*)$", done.stdout, re.MULTILINE))
    assert f"flashi2v-npu-ops {ops}," in tried["oldest"] + ","
    assert f"flashi2v-npu-ops {newer}," in tried["newest"] + ","
    assert (git(clone, "rev-parse", "HEAD"), git(clone, "tag"), git(clone, "worktree", "list")) == before
    assert git(clone, "status", "--porcelain") == ""


def refused(clone: Path, *words: str) -> str:
    """The one line that says why."""
    done = release(clone, *words)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_what_is_no_release_is_refused(again):
    name, version = "flashi2v-data", FIRST["flashi2v-data"]
    assert "greater than" in refused(again, name, version)
    assert "give numbers" in refused(again, name, "next")
    assert "changes holds no change" in refused(again, name, f"{version}.1")
    change(again, name)
    asked = "packages/flashi2v-train/pyproject.toml asks for flashi2v-data"
    assert asked in refused(again, name, "1.0")
    (again / "README.md").write_text("")
    assert "not committed first: README.md" in refused(again, name, f"{version}.1")


def test_a_break_of_what_others_import_takes_more_than_the_last_number(again):
    stub = PACKAGES["flashi2v-data"].init.relative_to(ROOT).with_suffix(".pyi")
    (again / stub).write_text(re.sub(r"^.*\bread_frames\n", "", (again / stub).read_text(), flags=re.MULTILINE))
    module = again / stub.parent / "video/write.py"
    module.write_text(module.read_text().replace("fps: ", "rate: ", 1))
    change(again, "flashi2v-data")
    told = refused(again, "flashi2v-data", f"{FIRST['flashi2v-data']}.1")
    assert "flashi2v_data `read_frames`: *Public object was removed*" in told
    assert "`write_video(fps)`: *Parameter was removed*" in told


def test_the_page_of_versions_is_made_from_the_packages():
    assert (ROOT / compatibility.PAGE).read_text() == compatibility.page(ROOT), "run `nox -s compatibility`"
    for package in PACKAGES.values():
        sets = json.loads(package.init.with_name("tested.json").read_text())
        assert any(each[package.name] == str(package.version) for each in sets)


def test_workflows_run_sessions_that_there_are():
    sessions = set(re.findall(r"^def (\w+)\(session: nox.Session\) -> None", (ROOT / "noxfile.py").read_text(), re.M))
    for path in (ROOT / ".github/workflows").iterdir():
        text = re.sub("#.*", "", path.read_text())
        named = re.findall(r"\bsession: (.*)|\bsessions: \[(.*)\]|\bnox -s ([^$]+?)\n", text)
        words = set(re.findall(r"[\w-]+", " ".join(part for parts in named for part in parts)))
        assert words <= sessions, path
        assert bool(words) is (path.name != "release.yml")
    for form in ("ISSUE_TEMPLATE/bug.yml", "ISSUE_TEMPLATE/idea.yml", "pull_request_template.md"):
        assert "flashi2v-npu-ops doctor --json" in (ROOT / ".github" / form).read_text()


@pytest.mark.parametrize("name", QUICK_TESTS)
def test_changes_stand_in_files_of_their_own(name):
    folder = ROOT / "packages" / name / "changes"
    assert (folder / "README.md").read_text() == (ROOT / "packages/flashi2v-data/changes/README.md").read_text()
    for path in folder.iterdir():
        if path.name != "README.md":
            assert re.fullmatch(r"[\w-]+\.(added|changed|fixed|removed)\.md", path.name), path
            assert path.read_text().startswith("- "), path
    log = (folder.parent / "CHANGELOG.md").read_text()
    assert "<!-- releases -->\n" in log
    assert "unreleased" not in log, f"a change goes into a file of {folder.relative_to(ROOT)}"
    assert PACKAGES[name].quick_tests([])
