"""Builds modules without memory for their values, so that shapes can be compared first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from ..errors import first_line


@contextmanager
def shapes_alone() -> Iterator[None]:
    """Inside the block, new tensors have a shape and no values: they lie on the meta device.

    This holds also where a device is named, as methods name that of the encoder.

    Raises:
        ValueError: a shape is too large for any tensor.
    """
    try:
        with _OnMeta():
            yield
    except (RuntimeError, OverflowError, TypeError) as error:
        raise ValueError(f"no tensor is that large: {first_line(error)}") from None


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
