"""What does not fit a schema, in words: the key, what is wrong with it, the nearest key that is known."""

import difflib
import json
import types
from typing import Annotated, Any, Union, get_args, get_origin

import pydantic
from pydantic import BaseModel


def describe(error: pydantic.ValidationError, schema: Any) -> str:
    """Put every fault of a validation into one line: dotted key, what is wrong, the nearest known key."""
    return "; ".join(f"{path}: {line}" if path else line for path, line in fault_lines(error, schema))


def fault_lines(error: pydantic.ValidationError, schema: Any) -> list[tuple[str, str]]:
    """Return (dotted key, what is wrong) for every fault; the key is "" where the whole is at fault."""
    lines, listed = [], list[list[str]]()
    for fault in error.errors(include_url=False):
        kind, location = fault["type"], fault["loc"]
        if kind == "extra_forbidden":
            keys, _, known = _walk(schema, location[:-1])
            line = _unknown(str(location[-1]), known, listed)
            keys = [*keys, location[-1]]
        else:
            keys, description, _ = _walk(schema, location)
            line = _explain(kind, fault, description)
        lines.append((".".join(str(key) for key in keys), line))
    return lines


def _unknown(key: str, known: list[str], listed: list[list[str]]) -> str:
    """Say what a key may have meant, or what is known beside it, once: `listed` has what was listed before."""
    if near := difflib.get_close_matches(key, known, n=1):
        return f"unknown key, did you mean {near[0]!r}?"
    if known in listed:
        return "unknown key"
    listed.append(known)
    return f"unknown key, known are: {', '.join(known)}"


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
