"""The initial values of the parts of a method."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

_skip_init: ContextVar[bool] = ContextVar("skip_init", default=False)


@contextmanager
def skip_init() -> Iterator[None]:
    """Inside the block, the functions of this file leave weights uninitialised.

    It is for modules whose values are read from a file next. Random values would take a third of
    the time of loading a small adapter, and move the random state.
    """
    before = _skip_init.set(True)
    try:
        yield
    finally:
        _skip_init.reset(before)


@torch.no_grad()
def kaiming(weight: Tensor) -> Tensor:
    """Fills a weight (out, in) uniformly within sqrt(1 / in), as nn.Linear and LoRA's A start."""
    return weight if _skip_init.get() else nn.init.kaiming_uniform_(weight, a=5**0.5)


def linear(in_features: int, out_features: int, like: dict, *, bias: bool = True) -> nn.Linear:
    """Returns a linear map whose weight starts as that of nn.Linear, and its bias at zero."""
    if _skip_init.get():
        return _bare(in_features, out_features, like, bias=bias)
    module = nn.Linear(in_features, out_features, bias=bias, **like)
    kaiming(module.weight)
    if bias:
        nn.init.zeros_(module.bias)
    return module


def zero_linear(in_features: int, out_features: int, like: dict) -> nn.Linear:
    """Returns a linear map whose weight and bias start at zero."""
    if _skip_init.get():
        return _bare(in_features, out_features, like, bias=True)
    module = nn.Linear(in_features, out_features, **like)
    nn.init.zeros_(module.weight)
    nn.init.zeros_(module.bias)
    return module


class _BareLinear(nn.Linear):
    """A linear map that is made without random values."""

    def reset_parameters(self) -> None:
        pass


def _bare(in_features: int, out_features: int, like: dict, *, bias: bool) -> nn.Linear:
    module: nn.Linear = _BareLinear(in_features, out_features, bias=bias, **like)
    module.__class__ = nn.Linear
    return module
