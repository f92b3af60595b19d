"""Builds modules without memory for their values, or with a bound on it.

A config from a file may ask for more memory than there is. So its shapes are compared with those of
the file, or counted, before any memory is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from ..errors import first_line

MOST_TENSORS = 100_000
_SMALL = 1 << 16  # values that may be computed with while a module is built, such as drop rates
# They copy data that are there already.
_OF_DATA = (torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor)


@contextmanager
def shapes_alone() -> Iterator[None]:
    """Inside the block, new tensors have a shape and no values: they lie on the meta device.

    This holds also where a device is named, as methods name that of the encoder.

    Raises:
        NoShapes: something inside needs values, so that nothing can be said.
        ValueError: a shape is too large for any tensor.
    """
    try:
        with _OnMeta():
            yield
    except NotImplementedError as error:
        raise NoShapes(first_line(error)) from None
    except (RuntimeError, OverflowError, TypeError) as error:
        if "meta" in str(error):
            raise NoShapes(first_line(error)) from None
        raise ValueError(f"no tensor is that large: {first_line(error)}") from None


class NoShapes(Exception):
    """The shapes cannot be computed without values."""


class _OnMeta(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self._makers = _device_constructors()

    def __torch_function__(
        self, function: Callable[..., Any], kinds: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function in self._makers:
            kwargs["device"] = "meta"
        elif function is Tensor.to and args[0].is_meta:
            kwargs.pop("device", None)
        return function(*args, **kwargs)


class TooLarge(ValueError):
    """A module would hold more values or tensors than it may."""


@contextmanager
def at_most(values: int, *, tensors: int = MOST_TENSORS, allocate: bool = True) -> Iterator[None]:
    """Bounds what is made inside the block.

    Args:
        values: the most values in new tensors together.
        tensors: the most new tensors.
        allocate: whether large tensors take memory; if not, they lie on the meta device.

    Raises:
        TooLarge: a bound would be passed. The tensor that passes it is not made.
    """
    with _Counting(values, tensors, allocate):
        yield


class _Counting(TorchFunctionMode):
    def __init__(self, values: int, tensors: int, allocate: bool) -> None:
        super().__init__()
        self._makers = _device_constructors()
        self._values, self._tensors, self._allocate = values, tensors, allocate

    def __torch_function__(
        self, function: Callable[..., Any], kinds: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function not in self._makers or function in _OF_DATA:
            return function(*args, **kwargs)
        self._tensors -= 1
        try:
            shape = function(*args, **{**kwargs, "device": "meta"})
        except (RuntimeError, OverflowError) as error:  # more than any tensor has
            raise TooLarge(first_line(error)) from None
        self._values -= shape.numel()
        if self._values < 0 or self._tensors < 0:
            raise TooLarge("too many values" if self._values < 0 else "too many tensors")
        if not self._allocate and shape.numel() > _SMALL:
            return shape
        return function(*args, **kwargs)
