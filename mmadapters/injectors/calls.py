"""The tensor that a module's call is about, whatever the library packs it in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def first_input(args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    """The tensor that a module reads first, given by position or by keyword."""
    if args:
        return args[0]
    if "hidden_states" in kwargs:
        return kwargs["hidden_states"]
    return next(value for value in kwargs.values() if isinstance(value, Tensor))


def first_output(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def with_first(output: Any, value: Tensor) -> Any:
    """`output` with its first tensor replaced, in the same type."""
    if isinstance(output, Tensor):
        return value
    if isinstance(output, Mapping):  # an output of transformers
        return type(output)(**{**output, next(iter(output)): value})
    rest = tuple(output[1:])
    if hasattr(output, "_fields"):
        return type(output)(value, *rest)
    return [value, *rest] if isinstance(output, list) else (value, *rest)
