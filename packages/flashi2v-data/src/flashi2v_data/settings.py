"""Configuration files and their schemas."""

import difflib
import itertools
import json
import os
import re
import types
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import pydantic
from pydantic import BaseModel, ConfigDict
from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode

from flashi2v_data.errors import InputError
from flashi2v_data.textfile import read_text

T = TypeVar("T", bound=BaseModel)


# No configuration is larger. The parser takes a few seconds for so much, and nothing of the rest bounds it.
_MAX_BYTES = 64 << 10
_MAX_DEPTH = 100
_MAX_VALUES = 100_000
_MAX_DIGITS = 40


# ---- reading -------------------------------------------------------------------------------------------------------


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
        InputError: the file is missing, no regular file, malformed, or holds more than any configuration does.
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


def describe(error: pydantic.ValidationError, schema: Any) -> str:
    """Put every fault of a validation into one line: dotted key, what is wrong, the nearest known key."""
    return "; ".join(f"{path}: {line}" if path else line for path, line in fault_lines(error, schema))


def fault_lines(error: pydantic.ValidationError, schema: Any) -> list[tuple[str, str]]:
    """Return (dotted key, what is wrong) for every fault; the key is "" where the whole is at fault."""
    lines = []
    for fault in error.errors(include_url=False):
        kind, location = fault["type"], fault["loc"]
        if kind == "extra_forbidden":
            keys, _, known = _walk(schema, location[:-1])
            line = _unknown(str(location[-1]), known)
            keys = [*keys, location[-1]]
        else:
            keys, description, _ = _walk(schema, location)
            line = _explain(kind, fault, description)
        lines.append((".".join(str(key) for key in keys), line))
    return lines


def _unknown(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f"unknown key, did you mean {near[0]!r}?" if near else f"unknown key, known are: {', '.join(known)}"


def _explain(kind: str, fault: Any, description: str | None) -> str:
    if kind == "missing":
        return "missing key"
    message = fault["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return message
    why = f"; {description}" if description and kind == "literal_error" else ""
    return f"{message[:1].lower()}{message[1:]}, got {_short(fault['input'])}{why}"


def _short(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False, skipkeys=True)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _walk(annotation: Any, location: tuple[int | str, ...]) -> tuple[list[int | str], str | None, list[str]]:
    """Follow a fault's location through a schema.

    Returns the keys as the user wrote them (without the tags that pydantic inserts for unions), the description of
    the last field, and the keys that are known there.
    """
    keys: list[int | str] = []
    description: str | None = None
    candidates = _models(annotation)
    for part in location:
        steps = [_step(candidate, part) for candidate in candidates]
        found = [step for step in steps if step is not None]
        if found:
            keys.append(part)
            description = found[0][1]
            candidates = [model for step in found for model in _models(step[0])]
            continue
        tagged = [model for model in candidates if part in _tags(model)]
        if tagged:
            candidates = tagged
        else:
            keys.append(part)
            candidates = []
    known = [key for model in candidates if _is_model(model) for key in model.model_fields]
    return keys, description, known


def _models(annotation: Any) -> list[Any]:
    """Take `Annotated`, `Optional` and unions apart."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _models(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [model for option in get_args(annotation) for model in _models(option)]
    return [annotation]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _step(annotation: Any, part: int | str) -> tuple[Any, str | None] | None:
    """Return the annotation and description behind a key or position, or None where there is no such thing."""
    if _is_model(annotation):
        field = annotation.model_fields.get(part)
        return None if field is None else (field.annotation, field.description)
    arguments = get_args(annotation)
    if isinstance(part, int) and get_origin(annotation) in (list, tuple) and arguments:
        return arguments[min(part, len(arguments) - 1)], None
    if isinstance(part, str) and get_origin(annotation) is dict:
        return arguments[1], None
    return None


def _tags(annotation: Any) -> set[Any]:
    """The names by which pydantic may refer to one option of a union."""
    if not _is_model(annotation):
        return {getattr(annotation, "__name__", str(annotation))}
    literals = [get_args(field.annotation) for field in annotation.model_fields.values()]
    return {annotation.__name__, *(value for values in literals for value in values if isinstance(value, str))}


# ---- schemas -------------------------------------------------------------------------------------------------------


class Settings(BaseModel):
    """A schema that accepts no unknown keys and converts no types (an int where a float is due is fine)."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
