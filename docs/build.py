"""Build the documentation site into .site/html: `nox -s docs`.

The site mirrors the repository: a page lies where its file lies, so a link between two pages is the same in both. A
link to a file that is no page leads to the repository's address. What is made here are the reference of commands, from
the commands themselves, and of Python, from the names that each package's `__init__` shows. No torch is imported.
"""

import importlib
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from release.packages import public_names

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "docs/zensical.toml"
SITE = ROOT / ".site"
PAGES = SITE / "pages"
FILES = {
    "filter.yaml": "flashi2v_data.curation.config:FilterConfig",
    "data.json": "flashi2v_data.loading.config:DataConfig",
    "model.json, for training": "flashi2v_train.config:TrainModelConfig",
    "inference_model.json": "flashi2v_infer.config:InferenceConfig",
}
LIMITS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
PROJECT = tomllib.loads(CONFIG.read_text())["project"]
# A link or a picture of Markdown: its text, its target without the anchor, its anchor.
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#]*)(#[^)\s]*)?(\))")
CHINESE = "[\u3001-\u9fff\uff01-\uff5e]"
RELEASES = "<!-- releases -->"
FENCE = re.compile(r"^( *)(```+).*?^\1\2$", re.DOTALL | re.MULTILINE)


def main() -> None:
    """Collect the pages and build strictly: a page or an anchor that is not there fails."""
    shutil.rmtree(SITE, ignore_errors=True)
    for page in pages(PROJECT["nav"]):
        if page.startswith("commands/"):
            text = command_reference(Path(page).stem)
        elif page == "api/files.md":
            text = file_reference()
        elif page.startswith("api/"):
            text = python_reference(Path(page).stem)
        else:
            text = adopted(page)
        write(page, text)
    for style in PROJECT["extra_css"]:
        shutil.copy(ROOT / style, PAGES / style)
    shutil.copy(CONFIG, SITE)
    build = subprocess.run([sys.executable, "-m", "zensical", "build", "--strict"], cwd=SITE)
    sys.exit(build.returncode)


def pages(nav: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the pages that the navigation names."""
    for entry in nav:
        for target in entry.values():
            yield from [target] if isinstance(target, str) else pages(target)


def write(page: str, text: str) -> None:
    """Write one file of the site's source."""
    (PAGES / page).parent.mkdir(parents=True, exist_ok=True)
    (PAGES / page).write_text(text)


def adopted(page: str) -> str:
    """Return a page of the repository with its links as the site needs them, and bring its pictures along."""
    source = "README.md" if page == "index.md" else page
    known = {*pages(PROJECT["nav"])} - {"index.md"} | {"README.md"}

    def resolved(match: re.Match[str]) -> str:
        opening, target, anchor, closing = match.groups()
        if not target or urlsplit(target).scheme:
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), unquote(target)))
        if not (ROOT / path).exists():
            sys.exit(f"{source}: {target} does not exist")
        if path not in known and path + "/README.md" in known:
            path += "/README.md"
        if path in known:
            target = posixpath.relpath("index.md" if path == "README.md" else path, posixpath.dirname(page) or ".")
        elif opening.startswith("!"):
            (PAGES / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, PAGES / path)
        else:
            target = f"{PROJECT['repo_url']}/blob/main/{path}"
        return f"{opening}{target}{anchor or ''}{closing}"

    text = (ROOT / source).read_text()
    # What is not released yet is no part of a changelog.
    changes = [path.read_text().strip() for path in sorted((ROOT / source).parent.glob("changes/*.*.md"))]
    if source.endswith("CHANGELOG.md") and changes:
        text = text.replace(RELEASES, "## Not released yet\n\n" + "\n".join([*changes, "", RELEASES]))
    # Markdown makes a space of the end of a line, which Chinese has not.
    text = re.sub(f"(?<={CHINESE})\n(?={CHINESE})", "", text)
    return outside_code(text, lambda text: LINK.sub(resolved, text))


def outside_code(text: str, change: Any) -> str:
    """Apply a change to all of a page but its fenced blocks."""
    parts, end = [], 0
    for fence in FENCE.finditer(text):
        parts += [change(text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, change(text[end:])])


def command_reference(name: str) -> str:
    """Return the page of a command: what its --help says."""
    scripts: dict[str, str] = {}
    for path in ROOT.glob("packages/*/pyproject.toml"):
        scripts |= tomllib.loads(path.read_text())["project"]["scripts"]
    module = importlib.import_module(scripts[name].partition(":")[0])
    if hasattr(module, "app"):
        text: str = module.app.generate_docs(output_format="markdown")
        text = re.sub(r"^## Table of Contents\n.*?\n(?=\*\*)", "", text, flags=re.DOTALL | re.MULTILINE)
        examples = re.compile(r"^(Examples?:)? ?(flashi2v-[^\n]*)$", re.MULTILINE)
        text = outside_code(text, lambda part: examples.sub(r"\1\n\n```bash\n\2\n```\n", part))
        return outside_code(text, lambda part: re.sub(r"<(?=\w)", "&lt;", part))
    told = [help_of(name)]
    told += [help_of(name, word) for word in re.search(r"\{(.*?)\}", told[0])[1].split(",")]  # type: ignore[index]
    return f"# {name}\n\n" + "\n".join(f"```text\n{text}```\n" for text in told)


def help_of(*words: str) -> str:
    """Return what a command answers to --help."""
    environment = {**os.environ, "COLUMNS": "80"}
    done = subprocess.run([*words, "--help"], env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def python_reference(package: str) -> str:
    """Return the page of a package: every name that its `__init__` and those of its wings show."""
    (home,) = ROOT.glob(f"packages/*/src/{package}")
    text = f"# {package}\n"
    for wing in (home, *sorted(path.parent for path in home.glob("*/__init__.pyi"))):
        module = ".".join(wing.relative_to(home.parent).parts)
        if wing != home:
            text += f"\n## {module}\n"
        text += "".join(f"\n::: {module}.{name}\n" for name in sorted(public_names(wing)))
    return text


def file_reference() -> str:
    """Return the page of the configuration files: every key of every section, as the schemas have it."""
    text = "# Configuration files\n"
    for title, place in FILES.items():
        module, name = place.split(":")
        schema = getattr(importlib.import_module(module), name).model_json_schema()
        text += f"\n## {title}\n\n" + keys(schema)
        parts = {name: part for name, part in schema.get("$defs", {}).items() if "properties" in part}
        text += "".join(f"\n### {name}\n\n{keys(part)}" for name, part in parts.items())
    return text


def keys(section: dict[str, Any]) -> str:
    """Return a table of a section's keys; one without a default must be given."""
    rows = [section.get("description", "") + "\n", "| key | value | default | |", "|---|---|---|---|"]
    for key, value in section.get("properties", {}).items():
        default = f"`{json.dumps(value['default'])}`" if "default" in value else ""
        told = value.get("description", "").replace("|", "\\|").replace("<", "&lt;")
        rows.append(f"| `{key}` | {kind(value)} | {default} | {told} |")
    return "\n".join(rows) + "\n"


def kind(value: dict[str, Any]) -> str:
    """Return in words what a key takes."""
    if "$ref" in value:
        return str(value["$ref"].rpartition("/")[2])
    if choices := value.get("enum", [value["const"]] if "const" in value else []):
        return " or ".join(f"`{json.dumps(choice)}`" for choice in choices)
    if "anyOf" in value:
        return " or ".join(dict.fromkeys(map(kind, value["anyOf"])))
    limits = [f"{sign} {value[name]}" for name, sign in LIMITS.items() if name in value]
    of = next((value[name] for name in ("items", "additionalProperties") if isinstance(value.get(name), dict)), None)
    words = f"{value.get('type', 'any')}{f' of {kind(of)}' if of else ''}"
    return ", ".join([words, *limits])


if __name__ == "__main__":
    main()
