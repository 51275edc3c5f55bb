"""The flashi2v-train launcher: FlashI2V training on PyTorch's own distributed engine."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashi2v_train.batch import Batch
    from flashi2v_train.config import RunConfig, read_run_config
    from flashi2v_train.launcher import main
    from flashi2v_train.options import TrainOptions
    from flashi2v_train.recipe import Generators, Recipe
    from flashi2v_train.trainer import Trainer, train

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "Generators",
    "Recipe",
    "RunConfig",
    "TrainOptions",
    "Trainer",
    "main",
    "read_run_config",
    "train",
]

# Importing torch takes seconds, so it waits until something needs it.
_HOMES = {
    "Batch": "batch",
    "Generators": "recipe",
    "Recipe": "recipe",
    "RunConfig": "config",
    "TrainOptions": "options",
    "Trainer": "trainer",
    "main": "launcher",
    "read_run_config": "config",
    "train": "trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
