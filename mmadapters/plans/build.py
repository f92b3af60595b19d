"""From a composition to a plan: what acts at every site, as things that injectors can run.

At a site a Stack is its members in order. Every other composition becomes one object that looks to
an injector like a single `Branch`, `Delta` or `Prefix` of `mmadapters.methods.base`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.adapter import Adapter, kind_of
from ..composition import (
    BASE,
    Average,
    BatchSplit,
    Composition,
    Fuse,
    Parallel,
    Route,
    Split,
    Stack,
)
from ..injectors.plan import Kind, Plan
from ..methods.base import Changing, Read, Replacing, reads_of, wanted
from ..methods.fusion import Fused, FusionAttention
from ..sites.sitemap import Leaf, SiteMap, Tower
from .routed import Index, RoutedBranch, RoutedDelta, RoutedPrefix, RoutedReadout

Point = tuple[Kind, str]
_BLOCK = re.compile(r"\.blocks\.(\d+)(\.|$)")
_FRONT = re.compile(r"\.front\.\d+$")


def plan_of(
    composition: Composition,
    sites: SiteMap,
    adapter: Callable[[str], Adapter],
    fusion: Callable[[Fuse], Adapter],
    *,
    drop: int = 0,
) -> Plan:
    """What acts where. `adapter` and `fusion` give what the model holds, or raise ValueError.

    `drop`: nothing acts in the lowest `drop` blocks of each tower (AdapterDrop).

    Raises:
        ValueError: a method that cannot take part in the composition, with its site.
    """
    modules: dict[str, dict[Point, list[Any]]] = {}
    for name in composition.names():
        table = modules.setdefault(name, {})
        for site, module in adapter(name).entries():
            table.setdefault((kind_of(module), site), []).append(module)
    points = dict.fromkeys(point for table in modules.values() for point in table)
    builder = _Builder(sites, modules, adapter, fusion)
    plan = Plan()
    for kind, site in points:
        if block_of(site) < drop:
            continue
        for acting in builder.acting(composition, kind, site):
            plan.add(kind, site, acting)
    if isinstance(composition, Parallel):
        plan.copies = len(composition.members)
        plan.starts = _starts(sites, {site for _, site in points}, drop)
    return plan


def block_of(site: str) -> float:
    """The index of the block that a site lies in; 0 for what stands before all blocks, infinite for
    what stands behind them."""
    if _FRONT.search(site):
        return 0.0
    found = _BLOCK.search(site)
    return float("inf") if found is None else int(found[1])


def _starts(sites: SiteMap, used: set[str], drop: int) -> dict[str, int]:
    """Where in each tower the batch is multiplied: its first adapted block, or its first block if
    it looks at another tower whose batch is. Where nothing acts at all, the last block of each."""
    starts: dict[str, int] = {}
    for tower in sites.towers.values():
        names = set(tower.site_names())
        own = [max(drop, block_of(site)) for site in used if site in names]
        if tower.crossed and starts:
            starts[tower.name] = 0
        elif own or not used:
            starts[tower.name] = int(min([*own, len(tower.blocks) - 1]))
        if tower.name in starts and tower.copies is not None:
            raise ValueError(
                f"Parallel cannot multiply the batch inside tower {tower.name!r} of "
                f"{sites.architecture}: {tower.copies}; repeat the inputs and use BatchSplit, or "
                "give the adapters sites in another tower"
            )
    return starts


@dataclass(frozen=True)
class _Builder:
    sites: SiteMap
    modules: dict[str, dict[Point, list[Any]]]
    adapter: Callable[[str], Adapter]
    fusion: Callable[[Fuse], Adapter]
    _distinct: dict[Composition, list[str | Composition]] = field(default_factory=dict)
    _owners: dict[Composition, list[int]] = field(default_factory=dict)

    @functools.cached_property
    def leaves(self) -> dict[str, Leaf]:
        return {leaf.name: leaf for leaf in self.sites.leaves()}

    @functools.cached_property
    def fronts(self) -> set[str]:
        return {layer.name for layer in self.sites.fronts()}

    @functools.cached_property
    def embeddings(self) -> set[str]:
        return {embedding.name for embedding in self.sites.embeddings()}

    @functools.cached_property
    def time_first(self) -> set[str]:
        towers: list[Tower] = [t for t in self.sites.towers.values() if not t.batch_first]
        return {name for tower in towers for name in tower.site_names()}

    def distinct(self, node: Composition) -> Sequence[str | Composition]:
        """The members; of a Route each once, however many samples it has."""
        if not isinstance(node, Route):
            return node.members
        if node not in self._distinct:
            self._distinct[node] = list(dict.fromkeys(node.members))
        return self._distinct[node]

    def owners(self, node: Route) -> list[int]:
        """For every sample of a Route the place of its member in `distinct`."""
        if node not in self._owners:
            place = {member: number for number, member in enumerate(self.distinct(node))}
            self._owners[node] = [place[member] for member in node.members]
        return self._owners[node]

    def acting(self, node: str | Composition, kind: Kind, site: str) -> list[Any]:
        """What acts for `node` at a site, in order; nothing for "base"."""
        if isinstance(node, str):
            return [] if node == BASE else self.modules[node].get((kind, site), [])
        if isinstance(node, Stack):
            return [act for member in node.members for act in self.acting(member, kind, site)]
        members = [self.acting(member, kind, site) for member in self.distinct(node)]
        if not any(members):
            return []
        point = (kind, site)
        if kind == "prompt":
            raise ValueError(
                f"{type(node).__name__} cannot hold the prompts of {self._culprit(node, point)!r}: "
                "they lengthen the sequence for the whole batch; use Stack"
            )
        if isinstance(node, (Split, Fuse, Parallel)):
            self._check_tokens(node, kind, site)
        if isinstance(node, (Split, Route, BatchSplit, Parallel)):
            self._check_axes(node, site)
        if isinstance(node, Fuse):
            return [self._fused(node, kind, site, members)]
        if isinstance(node, (Route, BatchSplit, Parallel)):
            return [self._routed(node, kind, site, members)]
        if kind == "prefix":
            raise ValueError(
                f"{type(node).__name__} cannot hold the prefix of {self._culprit(node, point)!r}: "
                "keys and values can be put one after another (Stack) or dealt out by sample "
                "(Route), not mixed"
            )
        if isinstance(node, Average):
            shares = zip(node.shares(), members, strict=True)
            if kind == "branch":
                return [AveragedBranch([(w, Chain(m)) for w, m in shares if m])]
            if kind == "readout":
                return [AveragedReadout([(w, m) for w, m in shares if m])]
            return [AveragedDelta([(w, DeltaChain(m)) for w, m in shares])]
        assert isinstance(node, Split)
        if kind == "branch":
            self._check_whole(node, members)
            return [SplitBranch(site, node.splits, [Chain(member) for member in members])]
        self._check_called(node, site)
        return [SplitDelta(site, node.splits, [DeltaChain(member) for member in members])]

    def _culprit(self, node: Composition, point: Point) -> str:
        """The first adapter of `node` that acts at `point`."""
        return next(name for name in node.names() if point in self.modules[name])

    def _fused(self, node: Fuse, kind: Kind, site: str, members: list[list[Any]]) -> Fused:
        if kind != "branch":
            name = self._culprit(node, (kind, site))
            raise ValueError(
                f"Fuse cannot hold {name!r}, a {self.adapter(name).config.method}: AdapterFusion "
                "attends over what bottleneck adapters add to a sublayer; use Average or Stack"
            )
        attention = dict(self.fusion(node).entries())[site]
        assert isinstance(attention, FusionAttention)
        present = [m[0] if len(m) == 1 else Chain(m) for m in members if m]
        return Fused(attention, present)

    def _routed(self, node: Composition, kind: Kind, site: str, members: list[list[Any]]) -> Any:
        if isinstance(node, Route):
            index: Index = _Listed(site, self.owners(node), "Route")
        elif isinstance(node, BatchSplit):
            owner = [i for i, size in enumerate(node.batch_sizes) for _ in range(size)]
            index = _Listed(site, owner, "BatchSplit")
        else:
            index = _Even(len(members))
        if kind == "branch":
            return RoutedBranch(site, members, index)
        if kind == "prefix":
            return RoutedPrefix(site, members, index)
        if kind == "readout":
            return RoutedReadout(site, members, index)
        self._check_called(node, site)
        return RoutedDelta(site, members, index)

    def _check_tokens(self, node: Composition, kind: Kind, site: str) -> None:
        what = type(node).__name__
        name = self._culprit(node, (kind, site))
        method = self.adapter(name).config.method
        if kind == "readout":
            raise ValueError(
                f"{what} cannot hold {name!r}, a {method}: it acts on what a whole tower gives, of "
                "all its blocks and tokens; use Stack or Average, or Route for each sample its own"
            )
        if isinstance(node, Parallel) and "image" in self.adapter(name).reads:
            raise ValueError(
                f"Parallel cannot hold {name!r}, a {method}: it looks at the images of the batch "
                "as it came; repeat images and texts and use BatchSplit"
            )
        if site in self.embeddings and not isinstance(node, Parallel):
            raise ValueError(
                f"{what} cannot hold {name!r}, a {method}: at {site} there is one embedding for "
                "each sample and no tokens; use Stack or Average, or Route for each sample its own"
            )
        if site in self.fronts:
            raise ValueError(
                f"{what} cannot hold {name!r}, a {method}: at {site} there are samples of sound "
                "before any block has made tokens of them; use Stack or Average, or Route for "
                "each sample its own"
            )

    def _check_whole(self, node: Composition, members: list[list[Any]]) -> None:
        if "grid" in reads_of(module for modules in members for module in modules):
            name = next(n for n in node.names() if "grid" in self.adapter(n).reads)
            raise ValueError(
                f"{type(node).__name__} cannot hold {name!r}, a {self.adapter(name).config.method}:"
                " it convolves over all patches of an image, which a stretch of tokens is not; use "
                "Stack or Average, or Route for each sample its own"
            )

    def _check_axes(self, node: Composition, site: str) -> None:
        if site in self.time_first:
            raise ValueError(
                f"{type(node).__name__} cannot act at {site} of {self.sites.architecture}: its "
                "blocks take tokens first and the batch second; build it with batch_first=True"
            )

    def _check_called(self, node: Composition, site: str) -> None:
        leaf = self.leaves[site]
        if leaf.raw and not isinstance(leaf.owner, nn.MultiheadAttention):
            raise ValueError(
                f"{type(node).__name__} cannot act at {site}: {self.sites.architecture} reads this "
                "weight itself, so that all samples and tokens share it"
            )


@dataclass(frozen=True)
class _Listed:
    """The owners of samples as they were written."""

    site: str
    owners: list[int]
    what: str

    def __call__(self, batch: int) -> list[int]:
        if batch != len(self.owners):
            raise ValueError(
                f"{self.what} deals out {len(self.owners)} samples, but {batch} reached "
                f"{self.site}: write one member for each sample of the batch"
            )
        return self.owners


@dataclass(frozen=True)
class _Even:
    """The same number of samples for each of `count` members, one member after another."""

    count: int

    def __call__(self, batch: int) -> list[int]:
        each = batch // self.count
        return [row // each for row in range(batch)]


@dataclass(eq=False)
class Chain(Replacing):
    """Branches one after another, as one."""

    members: list[Any]

    @property
    def reads(self) -> frozenset[Read]:
        return reads_of(self.members)

    def __call__(
        self, branch: Tensor, *, residual: Tensor | None, input: Tensor | None, **more: Any
    ) -> Tensor:
        for member in self.members:
            own = wanted(member, more)
            branch = member(branch, residual=residual, input=input, **own)
        return branch

    def change(
        self, branch: Tensor, *, residual: Tensor | None, input: Tensor | None, **more: Any
    ) -> Tensor:
        if len(self.members) == 1:
            member = self.members[0]
            own = wanted(member, more)
            return member.change(branch, residual=residual, input=input, **own)
        return super().change(branch, residual=residual, input=input, **more)


@dataclass(eq=False)
class AveragedBranch(Changing):
    """branch + sum_i w_i change_i."""

    members: list[tuple[float, Chain]]

    @property
    def reads(self) -> frozenset[Read]:
        return reads_of(member for _, member in self.members)

    def change(
        self, branch: Tensor, *, residual: Tensor | None, input: Tensor | None, **more: Any
    ) -> Tensor:
        changes = [
            w * m.change(branch, residual=residual, input=input, **more) for w, m in self.members
        ]
        return functools.reduce(torch.add, changes)


@dataclass(eq=False)
class AveragedReadout:
    """last + sum_i w_i (last_i - last), last_i what the tower gives with member i."""

    members: list[tuple[float, list[Any]]]

    def __call__(self, last: Tensor, *, states: Mapping[int, Tensor]) -> Tensor:
        changes = []
        for weight, modules in self.members:
            own = last
            for module in modules:
                own = module(own, states=states)
            changes.append(weight * (own - last))
        return last + functools.reduce(torch.add, changes)


@dataclass(eq=False)
class SplitBranch(Replacing):
    """Each member on its tokens, axis 1 of (B, N, D)."""

    site: str
    splits: tuple[int, ...]
    members: list[Chain]

    @property
    def reads(self) -> frozenset[Read]:
        return reads_of(self.members)

    def __call__(
        self, branch: Tensor, *, residual: Tensor | None, input: Tensor | None, **more: Any
    ) -> Tensor:
        sizes = token_sizes(self.site, self.splits, len(self.members), branch)
        parts = [_pieces(x, sizes) for x in (branch, residual, input)]
        # Whatever tokens a member has, it sees the whole image.
        pieces = {
            name: [x] * len(sizes) if name == "image" else _pieces(x, sizes)
            for name, x in more.items()
        }
        return torch.cat(
            [
                member(own, residual=res, input=read, **{n: p[i] for n, p in pieces.items()})
                for i, (member, own, res, read) in enumerate(zip(self.members, *parts, strict=True))
            ],
            dim=1,
        )


def _pieces(x: Tensor | None, sizes: Sequence[int]) -> Sequence[Tensor | None]:
    return [None] * len(sizes) if x is None else x.split(list(sizes), dim=1)


def token_sizes(site: str, splits: tuple[int, ...], members: int, x: Tensor) -> list[int]:
    """The tokens of each member.

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
    if given > tokens or (not rest and given != tokens):
        raise ValueError(
            f"Split deals out {given} tokens, but {tokens} reached {site}; leave the last number "
            "out and its member takes the rest"
        )
    return [*splits, *rest]


@dataclass(eq=False)
class DeltaChain:
    """Deltas on one leaf one after another, as one; those that scale the input come first."""

    members: list[Any]

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
class AveragedDelta:
    """sum_i w_i y_i, y_i what the leaf gives with member i; sum_i w_i = 1.

    What scales the input acts in here, on what it would have changed: W (l x) = W x + W (l x - x).
    """

    members: list[tuple[float, DeltaChain]]

    scales_input = False

    @property
    def as_weight(self) -> bool:
        return all(member.as_weight for _, member in self.members)

    def __call__(self, y: Tensor, x: Tensor, leaf: Leaf) -> Tensor:
        outputs = []
        for weight, member in self.members:
            own, read = y, x
            if member.scales_input:
                assert leaf.weight is not None
                read = member.enter(x)
                own = y + F.linear((read - x).to(leaf.weight.dtype), leaf.weight).to(y.dtype)
            outputs.append(weight * (member(own, read, leaf) - y))
        return y + functools.reduce(torch.add, outputs)

    def effective(
        self, weight: Tensor, bias: Tensor | None, leaf: Leaf
    ) -> tuple[Tensor, Tensor | None]:
        found = [(share, *member.effective(weight, bias, leaf)) for share, member in self.members]
        mixed = functools.reduce(torch.add, [share * (w - weight) for share, w, _ in found])
        shifts = [share * b for share, _, b in found if b is not None]
        return weight + mixed, functools.reduce(torch.add, shifts) if shifts else None


@dataclass(eq=False)
class SplitDelta:
    """Deltas of one leaf, each on its tokens; no one weight says what they do."""

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
        return torch.cat([member(own, read, leaf) for member, own, read in pieces], dim=1)
