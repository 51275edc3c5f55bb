"""Configuration files, read in bounded time and memory, and the schemas that they must fit."""

import itertools
import os
import re
from typing import Any, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict
from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode

from flashi2v_data.errors import InputError
from flashi2v_data.schema_faults import describe
from flashi2v_data.textfile import read_text

T = TypeVar("T", bound=BaseModel)


# No configuration is larger. The parser takes a few seconds for so much, and nothing of the rest bounds it.
_MAX_BYTES = 64 << 10
_MAX_DEPTH = 100
_MAX_VALUES = 100_000
_MAX_DIGITS = 40


class Settings(BaseModel):
    """A schema that accepts no unknown keys and converts no types (an int where a float is due is fine)."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def load_config(path: str | os.PathLike[str], schema: type[T]) -> T:
    """Read YAML 1.2, or JSON with `#` comments and trailing commas, into a pydantic schema.

    Raises:
        InputError: the file is missing or malformed, or a key is unknown, missing or of a wrong type or value; one
            line that names the file, the key and what to change.
    """
    values = read_values(path)
    if not isinstance(values, dict):
        raise InputError(f"{path}: must hold settings as `key: value`, got {type(values).__name__}")
    return validate(values, schema, path)


def validate(values: dict[str, Any], schema: type[T], where: object) -> T:
    """Read settings into a pydantic schema; `where` they are written is named in errors.

    Raises:
        InputError: as `load_config`.
    """
    try:
        return schema.model_validate(values)
    except pydantic.ValidationError as error:
        raise InputError(f"{where}: {describe(error, schema)}") from None


def read_values(path: str | os.PathLike[str]) -> Any:
    """Read YAML 1.2, or JSON with `#` comments and trailing commas, in bounded time and memory.

    Raises:
        InputError: the file is missing, not a regular file, malformed, or holds more than any configuration does.
    """
    text = read_text(path, _MAX_BYTES)
    # JSON is often indented by tabs, which YAML forbids.
    text = re.sub(r"(?m)^[ \t]+", lambda indent: indent[0].expandtabs(4), text)
    # The parser's work grows with the square of the depth. Brackets within texts count too: none has so many unclosed.
    depths = itertools.accumulate(1 if bracket in "[{" else -1 for bracket in re.findall(r"[\[\]{}]", text))
    if max(depths, default=0) > _MAX_DEPTH:
        raise InputError(f"{path}: is nested too deeply")
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Constructor
    try:
        return yaml.load(text)
    except MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        # A duplicate key's explanation runs over several lines; the first says it all.
        raise InputError(f"{path}: {where}{str(error.problem or error).splitlines()[0]}") from None
    except YAMLError as error:
        raise InputError(f"{path}: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise InputError(f"{path}: is nested too deeply") from None
    except ValueError as error:  # a date or a number that Python cannot hold
        raise InputError(f"{path}: holds what no setting can be: {error}") from None


class _Constructor(SafeConstructor):
    """Makes values of what was parsed, if they are few and small enough for a configuration."""

    def construct_document(self, node: Any) -> Any:
        self._check(node)
        return super().construct_document(node)

    def _check(self, root: Any) -> None:
        nodes, num_values = [root], 0
        while nodes:
            node = nodes.pop()
            num_values += 1
            # What is named by `&` counts wherever `*` stands for it, as whoever looks at the values meets it there.
            if num_values > _MAX_VALUES:
                raise ValueError(f"more than {_MAX_VALUES} values, or one within itself")
            if isinstance(node, ScalarNode):
                if "\0" in node.value:
                    raise ValueError(f"a zero byte, in line {node.start_mark.line + 1}")
                if str(node.tag).endswith(":int") and len(node.value) > _MAX_DIGITS:
                    raise ValueError(f"a number of {len(node.value)} digits, in line {node.start_mark.line + 1}")
            else:
                nodes += itertools.chain.from_iterable(node.value) if isinstance(node, MappingNode) else node.value
