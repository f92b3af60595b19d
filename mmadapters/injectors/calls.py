"""Functions that read and replace the main tensor in a module's arguments or output.

Libraries pass it by position or by keyword, and return it alone or in a tuple, a list or an object.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def first_input(args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    """Returns the tensor that a module reads first, given by position or by keyword."""
    if args:
        return args[0]
    if "hidden_states" in kwargs:
        return kwargs["hidden_states"]
    return next(value for value in kwargs.values() if isinstance(value, Tensor))


def with_first_input(args: tuple, kwargs: dict[str, Any], value: Tensor) -> tuple[tuple, dict]:
    """Returns the arguments with `value` in the place of the tensor that `first_input` returns."""
    if args:
        return (value, *args[1:]), kwargs
    name = "hidden_states"
    if name not in kwargs:
        name = next(key for key, other in kwargs.items() if isinstance(other, Tensor))
    return args, {**kwargs, name: value}


def first_output(output: Any) -> Tensor:
    """Returns the output itself if it is a tensor, else its first member."""
    return output if isinstance(output, Tensor) else output[0]


def tensors_in(output: Any) -> Iterator[Tensor]:
    """Yields the tensors in the output of a model, whatever its type."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_in(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from tensors_in(value)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for member in dataclasses.fields(output):
            yield from tensors_in(getattr(output, member.name))


def with_first(output: Any, value: Tensor) -> Any:
    """Returns `output` with its first tensor replaced by `value`, in the same type."""
    if isinstance(output, Tensor):
        return value
    if isinstance(output, Mapping):  # an output of transformers
        return type(output)(**{**output, next(iter(output)): value})
    rest = tuple(output[1:])
    if hasattr(output, "_fields"):
        return type(output)(value, *rest)
    return [value, *rest] if isinstance(output, list) else (value, *rest)
