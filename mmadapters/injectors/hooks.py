"""Hooks on sublayers and on the linear maps and norms in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..low_rank import Factors, plus_low_rank
from ..sites.acting import NO_CONTEXT, READS, ActsOnLeaf, Context
from ..sites.sitemap import Leaf
from .calls import first_output, with_first
from .state import Hook

# The fields of a `Context` that hooks capture before the branch runs, in the order of the fields.
CAPTURED = tuple(name for name in READS if name != "image")


class ForwardHook(Hook):
    """Changes nothing, but makes a parent that looks for hooks call the module."""

    before = True

    def __call__(self, module: nn.Module, args: tuple) -> None:
        return None


@dataclass(eq=False)
class BranchHook(Hook):
    """Lets the active `Branch` modules act on a sublayer's output."""

    site: str

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        active = self.state.plan().branch.get(self.site)
        if not active:
            return None
        stash = self.state.local.stash
        branch = first_output(output)
        context = NO_CONTEXT
        if stash:
            context = Context(*[stash.pop((self.site, name), None) for name in CAPTURED])
        for adapter in active:
            branch = adapter(branch, context)
        return with_first(output, branch)


@dataclass(eq=False)
class EnterHook(Hook):
    """Lets active deltas scale the input of a linear map, as far as they do so."""

    before = True

    site: str

    def __call__(self, module: nn.Module, args: tuple) -> Any:
        active = self.state.plan().delta.get(self.site)
        if not active:
            return None
        x = args[0]
        for adapter in active:
            if adapter.scales_input:
                x = adapter.enter(x)
        return (x, *args[1:])


@dataclass(eq=False)
class LeafHook(Hook):
    """Lets the active `Delta` modules act on a called linear map or norm, fused or not.

    It runs before the module's other hooks: the leaf may end a branch (Whisper's fc2), whose hook
    must see the leaf's changed output.
    """

    first = True

    leaves: list[Leaf]

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        delta = self.state.plan().delta
        if not any(leaf.name in delta for leaf in self.leaves):
            return None
        x = args[0]
        parts = self.leaves[0].parts
        if parts == 1:
            return _changed(delta, self.leaves[0], output, x)
        factors = self._factors(delta)
        if factors is not None:
            return plus_low_rank(output, x, factors)
        pieces = list(output.chunk(parts, dim=-1))
        for leaf in self.leaves:
            pieces[leaf.index] = _changed(delta, leaf, pieces[leaf.index], x)
        return torch.cat(pieces, dim=-1)

    def _factors(self, delta: Mapping[str, tuple[ActsOnLeaf, ...]]) -> list[list[Factors]] | None:
        """Returns the low-rank factors that act on each part of a fused map, or None if something
        other than a plain low-rank change acts."""
        parts: list[list[Factors]] = [[] for _ in range(self.leaves[0].parts)]
        for leaf in self.leaves:
            for adapter in delta.get(leaf.name, ()):
                # A module that has hooks of its own must be called, so that they run.
                hooked = getattr(adapter, "_forward_hooks", None) or getattr(
                    adapter, "_forward_pre_hooks", None
                )
                factors = None if hooked else adapter.factors()
                if factors is None:
                    return None
                parts[leaf.index].append(factors)
        return parts


def _changed(
    delta: Mapping[str, tuple[ActsOnLeaf, ...]], leaf: Leaf, y: Tensor, x: Tensor
) -> Tensor:
    """Applies the deltas of a leaf to its output y (..., out) for its input x (..., in)."""
    for adapter in delta.get(leaf.name, ()):
        y = adapter(y, x, leaf)
    return y
