"""Checks that the options of a config have the types that its class declares."""

from __future__ import annotations

import dataclasses
import functools
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .base import MethodConfig


def check_types(config: MethodConfig) -> None:
    """Raises ValueError if an option is of another type than its config declares.

    Whole numbers are taken for fractions; true and false are no numbers.
    """
    for name, kind in _declared(type(config)):
        value = getattr(config, name)
        if not _is(value, kind):
            raise ValueError(
                f"{type(config).__name__}: {name} must be {_words(kind)}, not {value!r}"
            )


@functools.cache
def _declared(cls: type[MethodConfig]) -> tuple[tuple[str, Any], ...]:
    hints = get_type_hints(cls)
    return tuple((field.name, hints[field.name]) for field in dataclasses.fields(cls))


def _is(value: Any, kind: Any) -> bool:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(_is(value, one) for one in inner)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in inner)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(inner) == 2 and inner[1] is Ellipsis:
            return all(_is(one, inner[0]) for one in value)
        return len(value) == len(inner) and all(map(_is, value, inner))
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind) if isinstance(kind, type) else True


def _words(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_words, inner))
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin is tuple:
        return "a list"
    plain = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    return plain.get(kind, "None" if kind is type(None) else getattr(kind, "__name__", str(kind)))
