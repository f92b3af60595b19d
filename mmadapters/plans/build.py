"""Builds the plan of a composition: the modules that act at every site.

At a site, a Stack is its members in order. Every other composition becomes one object that an
injector calls like a single module (`mixed.py`, `routed.py`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

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
from ..methods.base import reads_of
from ..methods.fusion import Fused, FusionAttention
from ..sites.acting import Acting
from ..sites.sitemap import Leaf, SiteMap, Tower
from .mixed import (
    AveragedBranch,
    AveragedDelta,
    AveragedReadout,
    BranchChain,
    DeltaChain,
    SplitBranch,
    SplitDelta,
)
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
    """Builds the plan of a composition.

    Args:
        adapter: gives the adapter of a name, or raises ValueError.
        fusion: gives the fusion that a Fuse names, or raises ValueError.
        drop: nothing acts in the lowest `drop` blocks of each tower (AdapterDrop).

    Raises:
        ValueError: a method cannot take part in the composition; names the site.
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
    """Returns the number of the block that a site lies in.

    It is 0 for a site before all blocks, and infinite for a site behind them.
    """
    if _FRONT.search(site):
        return 0.0
    match = _BLOCK.search(site)
    return float("inf") if match is None else int(match[1])


def _starts(sites: SiteMap, used: set[str], drop: int) -> dict[str, int]:
    """Returns the block of each tower in which the batch is multiplied.

    It is the tower's first adapted block, or its first block if it looks at another tower whose
    batch is multiplied. If nothing acts at all, it is the last block of each tower.
    """
    starts: dict[str, int] = {}
    for tower in sites.towers.values():
        names = set(tower.site_names())
        adapted = [max(drop, block_of(site)) for site in used if site in names]
        if tower.crossed and starts:
            starts[tower.name] = 0
        elif adapted or not used:
            starts[tower.name] = int(min([*adapted, len(tower.blocks) - 1]))
        if tower.name in starts and tower.copies is not None:
            able = [name for name, other in sites.towers.items() if other.copies is None]
            hint = f", or give the adapters sites=({able[0]!r},)" if able else ""
            raise ValueError(
                f"Parallel cannot multiply the batch inside tower {tower.name!r} of "
                f"{sites.architecture}: {tower.copies}; repeat the inputs and use BatchSplit{hint}"
            )
    return starts


@dataclass(frozen=True)
class _Builder:
    """Makes the acting objects of a composition, site by site.

    `modules`: by adapter and point, its modules in order. What they are follows from the kind of
    the point, which the type checker cannot see: hence `Any`.
    """

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
        """Returns the members; those of a Route once each, however many samples they have."""
        if not isinstance(node, Route):
            return node.members
        if node not in self._distinct:
            self._distinct[node] = list(dict.fromkeys(node.members))
        return self._distinct[node]

    def owners(self, node: Route) -> list[int]:
        """Returns, for every sample of a Route, the place of its member in `distinct`."""
        if node not in self._owners:
            place = {member: number for number, member in enumerate(self.distinct(node))}
            self._owners[node] = [place[member] for member in node.members]
        return self._owners[node]

    def acting(self, node: str | Composition, kind: Kind, site: str) -> list[Acting]:
        """Returns the objects that act for `node` at a site, in order; none for "base"."""
        if isinstance(node, str):
            return [] if node == BASE else self.modules[node].get((kind, site), [])
        if isinstance(node, Stack):
            return [act for member in node.members for act in self.acting(member, kind, site)]
        members: list[list[Any]] = [
            [*self.acting(member, kind, site)] for member in self.distinct(node)
        ]
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
                return [AveragedBranch([(w, BranchChain(m)) for w, m in shares if m])]
            if kind == "readout":
                return [AveragedReadout([(w, m) for w, m in shares if m])]
            return [AveragedDelta([(w, DeltaChain(m)) for w, m in shares])]
        assert isinstance(node, Split)
        if kind == "branch":
            self._check_whole(node, members)
            return [SplitBranch(site, node.splits, [BranchChain(member) for member in members])]
        self._check_called(node, site)
        return [SplitDelta(site, node.splits, [DeltaChain(member) for member in members])]

    def _culprit(self, node: Composition, point: Point) -> str:
        """Returns the name of the first adapter in `node` that acts at `point`."""
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
        present = [m[0] if len(m) == 1 else BranchChain(m) for m in members if m]
        return Fused(attention, present)

    def _routed(self, node: Composition, kind: Kind, site: str, members: list[list[Any]]) -> Acting:
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
    """Gives each sample the member that the composition lists for it."""

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
    """Gives each of `count` members the same number of samples, one member after another."""

    count: int

    def __call__(self, batch: int) -> list[int]:
        each = batch // self.count
        return [row // each for row in range(batch)]
