"""Variants of the network: subclasses that options name as module:Class, and no file that was downloaded ever does."""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from flashi2v_model.errors import InputError

if TYPE_CHECKING:
    from flashi2v_model.transformer import FlashI2VTransformer3DModel


def load_class(name: str, option: str) -> type[Any]:
    """Return a class by its name, module:Class; modules are found in the working directory, too.

    Args:
        name: of the class.
        option: that gave it.

    Raises:
        InputError: there is no such module or class.
    """
    module_name, colon, class_name = name.partition(":")
    if not (module_name and colon and class_name.isidentifier()):
        raise InputError(f"{option} {name}: must be module:Class, for example my_recipe:MyRecipe")
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)  # behind what is installed
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(f"{option} {name}: {error}") from error
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        raise InputError(f"{option} {name}: {module_name} has no class {class_name}")
    return found


def transformer_class(name: str | None) -> "type[FlashI2VTransformer3DModel]":
    """Return the network that `--recipe` names: a variant, or the `transformer` of a recipe of training.

    Args:
        name: module:Class; None means FlashI2V's own.

    Raises:
        InputError: there is no such class, or it is neither.
    """
    from flashi2v_model.transformer import FlashI2VTransformer3DModel  # diffusers takes seconds

    if name is None:
        return FlashI2VTransformer3DModel
    found = load_class(name, "--recipe")
    network = getattr(found, "transformer", found)
    if not (isinstance(network, type) and issubclass(network, FlashI2VTransformer3DModel)):
        raise InputError(
            f"--recipe {name}: must be a FlashI2VTransformer3DModel, or a recipe, whose `transformer` is one"
        )
    return network
