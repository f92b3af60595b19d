"""How the parts of a method start, unless what they hold is read from a file next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

_skip_init: ContextVar[bool] = ContextVar("skip_init", default=False)


@contextmanager
def skip_init() -> Iterator[None]:
    """Within it the functions below draw nothing: for modules whose values are copied in next.

    Drawing would take a third of the time that loading a small adapter takes, and move the random
    state.
    """
    before = _skip_init.set(True)
    try:
        yield
    finally:
        _skip_init.reset(before)


@torch.no_grad()
def kaiming(weight: Tensor) -> Tensor:
    """The initialisation of nn.Linear and of LoRA's A: uniform within sqrt(1 / fan_in)."""
    return weight if _skip_init.get() else nn.init.kaiming_uniform_(weight, a=5**0.5)


def linear(in_features: int, out_features: int, like: dict, *, bias: bool = True) -> nn.Linear:
    """A linear map with nn.Linear's weight and zero bias."""
    if _skip_init.get():
        return _bare(in_features, out_features, like, bias=bias)
    module = nn.Linear(in_features, out_features, bias=bias, **like)
    kaiming(module.weight)
    if bias:
        nn.init.zeros_(module.bias)
    return module


def zero_linear(in_features: int, out_features: int, like: dict) -> nn.Linear:
    """A linear map that gives zero until it is trained."""
    if _skip_init.get():
        return _bare(in_features, out_features, like, bias=True)
    module = nn.Linear(in_features, out_features, **like)
    nn.init.zeros_(module.weight)
    nn.init.zeros_(module.bias)
    return module


class _BareLinear(nn.Linear):
    def reset_parameters(self) -> None:
        pass


def _bare(in_features: int, out_features: int, like: dict, *, bias: bool) -> nn.Linear:
    module: nn.Linear = _BareLinear(in_features, out_features, bias=bias, **like)
    module.__class__ = nn.Linear
    return module
