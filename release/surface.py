"""How two versions of what a package shows differ."""

from collections.abc import Iterator
from pathlib import Path

import griffe

from release.packages import public_names


def changes(module: str, old: Path, new: Path) -> tuple[list[str], list[str]]:
    """Compare the public names of a module between two folders that hold its sources; return breaks and additions."""
    before, after = _load(module, old), _load(module, new)
    breaks = dict.fromkeys(_words(each) for each in griffe.find_breaking_changes(before, after))
    return [*breaks], sorted({*_names(after)} - {*_names(before)})


def _words(breakage: griffe.Breakage) -> str:
    owner = breakage.obj.parent if breakage.obj.is_alias else breakage.obj
    assert owner is not None
    words = breakage.explain(griffe.ExplanationStyle("markdown"))
    return f"{owner.module.path} {words.removeprefix('- ')}"


def _load(module: str, source: Path) -> griffe.Module:
    """Return a module in which that alone counts as public which it, or a wing of it, names as its face."""
    root = griffe.load(module, search_paths=[source], allow_inspection=False)
    assert isinstance(root, griffe.Module)
    waiting = [root]
    while waiting:
        each = waiting.pop()
        waiting += _modules(each)
        names = _face(each)
        each.public = bool(names)
        each.exports = names or None  # type: ignore[assignment]
    return root


def _face(module: griffe.Module) -> list[str]:
    assert isinstance(module.filepath, Path)
    return public_names(module.filepath.parent) if module.is_init_module else []


def _names(module: griffe.Module) -> Iterator[str]:
    if module.public:
        yield from (f"{module.path}.{name}" for name in module.exports or ())
    for each in _modules(module):
        yield from _names(each)


def _modules(module: griffe.Module) -> list[griffe.Module]:
    return [each for each in module.modules.values() if not each.is_alias]
