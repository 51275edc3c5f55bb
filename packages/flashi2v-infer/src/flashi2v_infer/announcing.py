"""FlashI2V's classes among those of diffusers, which looks for a class that a directory names in itself alone.

`DiffusionPipeline` and `AutoModel` find them after `import flashi2v_infer`, in whichever order the two are imported.
Neither is imported for it: where diffusers' pipelines come later, they bring these classes with them.
"""

import importlib
import importlib.machinery
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType

_PIPELINES, _OURS = "diffusers.pipelines.pipeline_utils", "flashi2v_infer.pipeline"
_MODELS = "diffusers.models.auto_model"


def announce() -> None:
    """Let diffusers know the classes: now, where its pipelines or models are here, else as soon as they come."""
    if _PIPELINES in sys.modules or _MODELS in sys.modules:
        _add()
    else:
        sys.meta_path.insert(0, _Watch())


def _add() -> None:
    if _OURS in sys.modules:  # which does so by itself when it is whole
        return
    importlib.import_module(_OURS)


class _Watch(MetaPathFinder):
    """Waits for diffusers' pipelines or models to be imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the spec that all others find, with a loader that adds our classes behind."""
        if name not in (_PIPELINES, _MODELS):
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def then_add(module: ModuleType) -> None:
            execute(module)
            _add()

        spec.loader.exec_module = then_add  # type: ignore[method-assign]
        return spec
