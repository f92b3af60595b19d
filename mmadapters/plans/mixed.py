"""Members of a composition at one site as one module: in a chain, averaged, or split by tokens.

An injector calls each of these as it calls a single module (`mmadapters.sites.acting`). None is an
`nn.Module`: the modules that they call belong to their adapters.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..methods.base import CombinedBranch, reads_of
from ..sites.acting import READS, ActsAsReadout, ActsOnBranch, ActsOnLeaf, Context, Read
from ..sites.sitemap import Leaf


@dataclass(eq=False)
class BranchChain(CombinedBranch):
    """Branches one after another."""

    members: list[ActsOnBranch]
    reads: frozenset[Read] = field(init=False)

    def __post_init__(self) -> None:
        self.reads = reads_of(self.members)

    def __call__(self, branch: Tensor, context: Context) -> Tensor:
        for member in self.members:
            branch = member(branch, context)
        return branch

    def change(self, branch: Tensor, context: Context) -> Tensor:
        if len(self.members) == 1:
            return self.members[0].change(branch, context)
        return super().change(branch, context)


@dataclass(eq=False)
class AveragedBranch(CombinedBranch):
    """branch + sum_i w_i change_i, for members (w_i, chain i)."""

    members: list[tuple[float, BranchChain]]
    reads: frozenset[Read] = field(init=False)

    def __post_init__(self) -> None:
        self.reads = reads_of(member for _, member in self.members)

    def change(self, branch: Tensor, context: Context) -> Tensor:
        changes = [weight * member.change(branch, context) for weight, member in self.members]
        return functools.reduce(torch.add, changes)


@dataclass(eq=False)
class AveragedReadout:
    """last + sum_i w_i (last_i - last), where last_i is the tower's output with member i."""

    members: list[tuple[float, list[ActsAsReadout]]]

    def __call__(self, last: Tensor, *, states: Mapping[int, Tensor]) -> Tensor:
        changes = []
        for weight, modules in self.members:
            output = last
            for module in modules:
                output = module(output, states=states)
            changes.append(weight * (output - last))
        return last + functools.reduce(torch.add, changes)


@dataclass(eq=False)
class SplitBranch(CombinedBranch):
    """Each member on its tokens, axis 1 of (B, N, D)."""

    site: str
    splits: tuple[int, ...]
    members: list[BranchChain]
    reads: frozenset[Read] = field(init=False)

    def __post_init__(self) -> None:
        self.reads = reads_of(self.members)

    def __call__(self, branch: Tensor, context: Context) -> Tensor:
        sizes = token_sizes(self.site, self.splits, len(self.members), branch)
        around = [
            self._pieces(name, value, sizes) for name, value in zip(READS, context, strict=True)
        ]
        pieces = zip(self.members, branch.split(sizes, dim=1), *around, strict=True)
        return torch.cat([member(part, Context(*rest)) for member, part, *rest in pieces], dim=1)

    def _pieces(self, name: str, value: Any, sizes: list[int]) -> Sequence[Any]:
        """Returns one field of the context for each member."""
        if value is None or name not in self.reads:
            return [None] * len(sizes)
        # Every member sees the whole image, whatever its tokens are.
        return [value] * len(sizes) if name == "image" else value.split(sizes, dim=1)


def token_sizes(site: str, splits: tuple[int, ...], members: int, x: Tensor) -> list[int]:
    """Returns the number of tokens of each member, for x (B, N, D).

    Raises:
        ValueError: x has no token axis, or another number of tokens.
    """
    if x.dim() < 3:
        raise ValueError(
            f"Split cannot act at {site}, which sees one pooled token for each sample: leave it "
            "out of the adapters with sites=..."
        )
    tokens, given = x.shape[1], sum(splits)
    rest = [tokens - given] if len(splits) < members else []
    if given > tokens:
        raise ValueError(
            f"Split deals out {given} tokens, but {tokens} reached {site}; give smaller "
            "numbers, or leave the site out of the adapters with sites=..."
        )
    if not rest and given != tokens:
        raise ValueError(
            f"Split deals out {given} tokens, but {tokens} reached {site}; leave the last number "
            "out and its member takes the rest"
        )
    return [*splits, *rest]


class CombinedDelta:
    """Several deltas on a leaf that act as one."""

    def factors(self) -> None:
        """Returns None: together they are no single low-rank change."""
        return None

    def effective(
        self, weight: Tensor, bias: Tensor | None, leaf: Leaf
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the weight and bias that compute the same.

        Raises:
            AttributeError: no single weight does. Attention that computes such deltas itself may
                still ask torch for its weight, and `nn.Module` then gives the frozen one.
        """
        raise AttributeError(f"no single weight equals a {type(self).__name__}")


@dataclass(eq=False)
class DeltaChain(CombinedDelta):
    """Deltas on one leaf one after another; those that scale the input come first."""

    members: list[ActsOnLeaf]

    @property
    def scales_input(self) -> bool:
        return any(member.scales_input for member in self.members)

    @property
    def as_weight(self) -> bool:
        return all(member.as_weight for member in self.members)

    def enter(self, x: Tensor) -> Tensor:
        for member in self.members:
            x = member.enter(x) if member.scales_input else x
        return x

    def __call__(self, y: Tensor, x: Tensor, leaf: Leaf) -> Tensor:
        for member in self.members:
            y = member(y, x, leaf)
        return y

    def effective(
        self, weight: Tensor, bias: Tensor | None, leaf: Leaf
    ) -> tuple[Tensor, Tensor | None]:
        for member in sorted(self.members, key=lambda member: member.scales_input):
            weight, bias = member.effective(weight, bias, leaf)
        return weight, bias


@dataclass(eq=False)
class AveragedDelta(CombinedDelta):
    """sum_i w_i y_i, where y_i is the leaf's output with member i and sum_i w_i = 1.

    A change of the input acts in here too, on the output: W (l x) = W x + W (l x - x).
    """

    members: list[tuple[float, DeltaChain]]

    scales_input = False

    @property
    def as_weight(self) -> bool:
        return all(member.as_weight for _, member in self.members)

    def enter(self, x: Tensor) -> Tensor:
        return x

    def __call__(self, y: Tensor, x: Tensor, leaf: Leaf) -> Tensor:
        outputs = []
        for weight, member in self.members:
            output, read = y, x
            if member.scales_input:
                assert leaf.weight is not None
                read = member.enter(x)
                output = y + F.linear((read - x).to(leaf.weight.dtype), leaf.weight).to(y.dtype)
            outputs.append(weight * (member(output, read, leaf) - y))
        return y + functools.reduce(torch.add, outputs)

    def effective(
        self, weight: Tensor, bias: Tensor | None, leaf: Leaf
    ) -> tuple[Tensor, Tensor | None]:
        each = [(share, *member.effective(weight, bias, leaf)) for share, member in self.members]
        mixed = functools.reduce(torch.add, [share * (w - weight) for share, w, _ in each])
        shifts = [share * b for share, _, b in each if b is not None]
        return weight + mixed, functools.reduce(torch.add, shifts) if shifts else None


@dataclass(eq=False)
class SplitDelta(CombinedDelta):
    """Deltas of one leaf, each on its tokens, axis 1 of (B, N, D); no single weight equals them."""

    site: str
    splits: tuple[int, ...]
    members: list[DeltaChain]

    as_weight = False

    @property
    def scales_input(self) -> bool:
        return any(member.scales_input for member in self.members)

    def enter(self, x: Tensor) -> Tensor:
        pieces = x.split(token_sizes(self.site, self.splits, len(self.members), x), dim=1)
        return torch.cat([m.enter(p) for m, p in zip(self.members, pieces, strict=True)], dim=1)

    def __call__(self, y: Tensor, x: Tensor, leaf: Leaf) -> Tensor:
        sizes = token_sizes(self.site, self.splits, len(self.members), y)
        pieces = zip(self.members, y.split(sizes, dim=1), x.split(sizes, dim=1), strict=True)
        return torch.cat([member(part, read, leaf) for member, part, read in pieces], dim=1)
