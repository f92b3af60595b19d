"""Subclasses whose `forward` shows the signature of an encoder's.

transformers' `Trainer` asks the class of a model which columns its `forward` takes, which of them
are labels, and whether it returns a loss by default.
"""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any

from torch import nn


@functools.cache
def showing(base: type, encoder: type) -> type:
    """Returns a subclass of `base` that differs in the signature of `forward` and in its name.

    Its `forward` has the very code of that of `base`, so that a pass costs nothing more. Its name
    holds the encoder's, by which `Trainer` knows models that answer questions.
    """
    forward: Any = base.forward  # type: ignore[attr-defined]
    try:
        signature = inspect.signature(encoder.forward)  # type: ignore[attr-defined]
    except (TypeError, ValueError):  # `forward` is not written in Python
        return base
    shown = types.FunctionType(
        forward.__code__,
        forward.__globals__,
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    shown.__kwdefaults__ = forward.__kwdefaults__
    shown.__doc__ = forward.__doc__
    shown.__module__ = forward.__module__
    shown.__qualname__ = forward.__qualname__
    shown.__signature__ = signature  # type: ignore[attr-defined]

    def reduce(self: nn.Module, protocol: Any) -> tuple:
        return _empty, (base, encoder), self.__dict__

    namespace = {
        "forward": shown,
        "__reduce_ex__": reduce,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
    }
    return type(base)(f"{base.__name__}[{encoder.__name__}]", (base,), namespace)


def _empty(base: type, encoder: type) -> nn.Module:
    """Returns the object that a copy or a pickle fills."""
    shown: Any = showing(base, encoder)
    return shown.__new__(shown)
