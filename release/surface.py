"""What a package shows to those who import it, and how two versions of that differ."""

import ast
from collections.abc import Iterator
from pathlib import Path

import griffe


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
    """Return the names in a folder's __init__.pyi, or in its `__all__`."""
    assert isinstance(module.filepath, Path)
    stub = module.filepath.with_suffix(".pyi")
    if module.is_init_module and stub.is_file():
        imports = [each for each in ast.parse(stub.read_text()).body if isinstance(each, ast.ImportFrom)]
        return [alias.asname or alias.name for each in imports for alias in each.names]
    return [str(name) for name in module.exports or ()] if module.is_init_module else []


def _names(module: griffe.Module) -> Iterator[str]:
    if module.public:
        yield from (f"{module.path}.{name}" for name in module.exports or ())
    for each in _modules(module):
        yield from _names(each)


def _modules(module: griffe.Module) -> list[griffe.Module]:
    return [each for each in module.modules.values() if not each.is_alias]
