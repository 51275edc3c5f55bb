"""The documentation: code blocks are run or say why not, commands and options exist, Chinese pages follow the English.

A block of commands or Python that carries no mark is run here, page by page, in a small world in which the files that
pages speak of lie under their names. A comment above the others says which test runs them, or why none does. The
links between pages are followed by `nox -s docs`.
"""

import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import forked
import pytest
import torch
import world
from hatchling.metadata.core import ProjectMetadata
from hatchling.plugin.manager import PluginManager
from PIL import Image

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
SITE = runpy.run_path(str(ROOT / "docs/build.py"), run_name="site")
ADDRESS, NAVIGATION = SITE["PROJECT"]["repo_url"], list(SITE["pages"](SITE["PROJECT"]["nav"]))
MADE = ("commands/", "api/")
PAGES = [page.replace("index.md", "README.md") for page in NAVIGATION if not page.startswith(MADE)]
TRANSLATIONS = {
    "README.md": "README.zh-CN.md",
    "docs/ascend-first-hour.md": "docs/ascend-first-hour.zh.md",
    "docs/ascend.md": "docs/ascend.zh.md",
}
PROJECTS = {path.parent.name: tomllib.loads(path.read_text()) for path in ROOT.glob("packages/*/pyproject.toml")}
SCRIPTS = sorted(name for project in PROJECTS.values() for name in project["project"]["scripts"])
BLOCK = re.compile(r"(?:^ *<!-- (.*?) -->\n)?^( *)```(\w*)\n(.*?)^\2```$", re.DOTALL | re.MULTILINE)
# What is no code, and what is run or marked.
SHOWN, RUN = ("text", "toml", "json", "yaml", "ini", "nginx"), ("bash", "python")


class Block(NamedTuple):
    """A fenced block of a page."""

    mark: str
    language: str
    code: str

    @property
    def commands(self) -> list[list[str]]:
        """Its command lines, as words, without comments."""
        lines = self.code.replace("\\\n", " ").splitlines()
        words = (shlex.split(line, comments=True) for line in lines)
        parts = (" ".join(map(shlex.quote, line)).split(" '&&' ") for line in words if line)
        return [shlex.split(part) for line in parts for part in line]


def text_of(page: str) -> str:
    """A page of the repository, or of the reference of commands."""
    return SITE["command_reference"](Path(page).stem) if page.startswith(MADE) else (ROOT / page).read_text()


def blocks(page: str) -> list[Block]:
    found = BLOCK.findall(text_of(page))
    return [Block(mark, language, re.sub(f"^{indent}", "", code, flags=re.M)) for mark, indent, language, code in found]


def unmarked(page: str) -> list[Block]:
    return [block for block in blocks(page) if block.language in RUN and not block.mark]


def test_every_page_is_in_the_navigation_once():
    patterns = (
        "*.md",
        "docs/*.md",
        "packages/*/*.md",
        "packages/*/docs/**/*.md",
        "packages/*/bench/*.md",
        "bench/*.md",
    )
    patterns += ("examples/*/*.md", "tests/*/*.md")
    found = sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))
    assert sorted(PAGES) == found, "docs/zensical.toml lists the pages"
    assert sorted(page[9:-3] for page in NAVIGATION if page.startswith("commands/")) == SCRIPTS
    modules = {"files", *(name.replace("-", "_") for name in PROJECTS)}
    assert {page[4:-3] for page in NAVIGATION if page.startswith("api/")} == modules


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_run_or_says_why_not(page):
    assert len(blocks(page)) == len(re.findall(r"^ *```", text_of(page), re.M)) / 2
    assert not re.search(r"^ {4,}(flashi2v-|pip |python |nox )", BLOCK.sub("", text_of(page)), re.M), "fence it"
    for block in blocks(page):
        assert block.language in (*SHOWN, *RUN), block
        if block.mark.startswith("run by "):
            for path in block.mark.removeprefix("run by ").split(", "):
                assert (ROOT / path).is_file(), block.mark
        elif block.mark:
            assert block.mark.startswith("not run: "), block.mark


@pytest.fixture(scope="module")
def options() -> dict[str, set[str]]:
    """The options of every command, of all that it can be told first, as its --help has them."""
    return {name: set(re.findall(r"--[\w-]+", SITE["command_reference"](name))) | {"--help"} for name in SCRIPTS}


@pytest.mark.parametrize("page", [*PAGES, *(f"commands/{name}.md" for name in SCRIPTS)])
def test_commands_options_packages_and_extras_exist(page, options):
    for words in (words for block in blocks(page) if block.language == "bash" for words in block.commands):
        if "pip" in words:
            for name, extras in re.findall(r"(flashi2v-[\w-]+)(?:\[([\w,]+)\])?", " ".join(words)):
                known = {*PROJECTS[name]["project"].get("optional-dependencies", {})}
                assert {*extras.split(",")} - {""} <= known, words
            continue
        scripts = [number for number, word in enumerate(words) if re.fullmatch(r"(.*/)?flashi2v-[\w-]+", word)]
        for number in scripts[:1]:
            name = Path(words[number]).name
            assert name in options, words
            given = {word.partition("=")[0].strip("[]") for word in words[number:] if re.match(r"\[?--\w", word)}
            assert given <= options[name], (name, given - options[name])


def small(directory: Path) -> None:
    """Let a model say that it was trained for small videos: what the released one says takes hours here."""
    path = directory / "model_index.json"
    index = json.loads(path.read_text())
    sizes = {"num_frames": world.NUM_FRAMES, "height": world.SIZE, "width": world.SIZE, "num_inference_steps": 1}
    path.write_text(json.dumps({"defaults": sizes, **index}))


def write_adapter(path: Path, model: Path) -> None:
    """Write a LoRA adapter of one layer, in diffusers' spelling."""
    from safetensors.torch import load_file, save_file

    weight = load_file(model / "transformer/diffusion_pytorch_model.safetensors")["blocks.0.attn1.to_q.weight"]
    shapes = {"lora_A": (2, weight.shape[1]), "lora_B": (weight.shape[0], 2)}
    prefix = "transformer.blocks.0.attn1.to_q"
    save_file({f"{prefix}.{name}.weight": torch.ones(shape) for name, shape in shapes.items()}, path)


@pytest.fixture
def place(tmp_path) -> Path:
    """A directory with all that pages name: pictures, videos, models, released weights, an adapter."""
    world.copy_into(tmp_path)
    for name in ("photo.jpg", "cat.jpg", "drawing.png"):
        Image.new("RGB", (96, 64), "pink").save(tmp_path / name)
    shutil.copytree(tmp_path / "shapes/videos", tmp_path / "videos")
    for video in (tmp_path / "videos").iterdir():
        video.with_suffix(".txt").write_text("a shape moves")
    shutil.copytree(tmp_path / "model", tmp_path / "Wan2.1-T2V-1.3B-Diffusers")
    shutil.copytree(tmp_path / "model", tmp_path / "tiny")
    small(tmp_path / "model")
    write_adapter(tmp_path / "style.safetensors", tmp_path / "model")
    (tmp_path / "release_weights/npu").mkdir(parents=True)
    weights = "release_weights/npu/flashi2v_1_3B.pt"
    forked.run("flashi2v-model", "convert", "model", weights, "--to", "npu", cwd=tmp_path, check=True)
    return tmp_path


def run_python(_: int, code: str) -> None:
    exec(compile(code, "page", "exec"), {"__name__": "__main__"})


_DONE: set[str] = set()


@pytest.mark.parametrize("page", [page for page in PAGES if page not in TRANSLATIONS.values() and unmarked(page)])
def test_its_blocks_run_as_they_stand(page, place):
    made = "FlashI2V-1.3B"
    if f" {made} --to diffusers" not in text_of(page):
        shutil.copytree(place / "model", place / made)
    for block in unmarked(page):
        if block.language == "python" and block.code not in _DONE:
            _DONE.add(block.code)
            forked.call("others", 1, run_python, block.code, cwd=place)
        for words in block.commands if block.language == "bash" else ():
            name = Path(words[0]).name
            if name in SCRIPTS:
                # As it stands, but for the demo model's steps, of which its own tests run all.
                few = ("--num-inference-steps", "2") if "demo" in words else ()
                done = forked.run(name, *words[1:], *few, cwd=place)
                assert done.returncode == 0, f"{words}: {done.stderr}"
                if made in words and "convert" in words and words.index(made) == 3:
                    small(place / made)
            else:
                assert name in ("pip", "cd"), f"{page}: {words} is not run here: say above it who runs it, or why not"


@pytest.mark.parametrize(("page", "translation"), TRANSLATIONS.items())
def test_a_translation_has_the_same_headings_tables_links_and_commands(page, translation):
    def outline(name: str) -> list[list[object]]:
        prose = BLOCK.sub("", text_of(name))
        links = {re.sub(r"\.zh(-CN)?\.md", ".md", link) for link in re.findall(r"\]\(([^\s#)]+)", prose)}
        rows = [line.count("|") for line in prose.splitlines() if line.lstrip().startswith("|")]
        return [re.findall(r"^(#+) ", prose, re.M), sorted(links), rows]

    def commands(name: str) -> list[str]:
        """Without what explains them; a word for the reader's own may be translated."""
        code = (re.sub(r"(?m) *#.*", "", block.code) for block in blocks(name))
        return [re.sub(r"目录", "DIR", text) for text in code]

    assert outline(page) == outline(translation)
    assert commands(page) == commands(translation)


@pytest.mark.parametrize("name", PROJECTS)
def test_the_page_of_a_package_on_an_index_leads_into_the_repository(name, monkeypatch):
    monkeypatch.chdir(ROOT / "packages" / name)  # as builders do
    urls = PROJECTS[name]["project"]["urls"]
    assert urls == {
        "Documentation": f"{SITE['PROJECT']['site_url']}packages/{name}/",
        "Source": f"{ADDRESS}/tree/main/packages/{name}",
        "Changes": f"{ADDRESS}/blob/main/packages/{name}/CHANGELOG.md",
        "Issues": f"{ADDRESS}/issues",
    }
    text = ProjectMetadata(".", PluginManager()).core.readme
    targets = re.findall(r"(!?)\[[^\]]*\]\((\S+?)\)", BLOCK.sub("", text))
    for picture, target in targets:
        assert target.startswith(("https://", "#")), target
        inside = re.fullmatch(rf"{ADDRESS}/(raw|blob)/main/([^#]*)(#.*)?", target)
        if inside:
            assert (inside[1] == "raw") == bool(picture)
            assert (ROOT / inside[2]).exists(), target
            assert not picture or ".." not in inside[2]  # an index fetches pictures by itself


def test_the_address_stands_everywhere_as_in_one_place():
    paths = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("packages/*/*.*"), *ROOT.glob("examples/*/*.md")]
    for path in filter(Path.is_file, paths):  # a tool may have left a folder like .mypy_cache
        for found in re.findall(r"https://github\.com/[\w-]+/flashi2v\b", path.read_text()):
            assert found == ADDRESS, path
