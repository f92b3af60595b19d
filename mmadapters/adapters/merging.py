"""Folding an adapter into the frozen weights, and undoing it to the bit.

A change of a linear map becomes part of its weight. A bottleneck beside a feed-forward part,

    F(n) + U act(D n + b_D) + b_U    where    F(n) = W_2 act(W_1 n + b_1) + b_2,

becomes more channels of that part where both read n and have the same activation:

    [W_2 U] act([W_1; D] n + [b_1; b_D]) + b_2 + b_U.

Where the part ends in a LayerScale g, as in g (W_2 ... + b_2), U / g and b_U / g take the place of
U and b_U.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..injectors.raw_weights import changed_weight
from ..sites.sitemap import Block, Leaf, Parameter, SiteMap, Sublayer
from .adapter import Adapter

Changes = list[tuple[Parameter, Tensor]]


@dataclass(eq=False)
class MergedAdapter:
    """An adapter that is merged into the encoder's weights.

    Attributes:
        name: the adapter's name.
        originals: the tensors that it changed, with the values that they had.
        widened: the linear maps that have got more channels.
    """

    name: str
    originals: Changes
    widened: list[Leaf]

    @classmethod
    def into_weights(cls, name: str, changes: Changes, sites: SiteMap) -> MergedAdapter:
        """Writes the changed tensors into the encoder and keeps the old ones."""
        originals = [(place, place.tensor.detach().clone()) for place, _ in changes]
        merged = cls(name, originals, widened_leaves(changes, sites))
        merged._write(changes)
        return merged

    def undo(self) -> None:
        """Writes the old tensors back."""
        self._write(self.originals)

    def _write(self, changes: Changes) -> None:
        for place, value in changes:
            if value.shape == place.tensor.shape:
                place.tensor.data.copy_(value)
            else:
                place.whole.data = value
        for leaf in self.widened:
            assert leaf.weight is not None
            leaf.out_features, leaf.in_features = leaf.weight.shape
            assert isinstance(leaf.module, nn.Linear)
            leaf.module.out_features, leaf.module.in_features = leaf.weight.shape


@contextlib.contextmanager
def while_merged(name: str, adapter: Adapter, sites: SiteMap) -> Iterator[None]:
    """Keeps the adapter merged into the encoder's weights inside the block.

    Raises:
        ValueError: see `merged_tensors`.
    """
    folded = MergedAdapter.into_weights(name, merged_tensors(name, adapter, sites), sites)
    try:
        yield
    finally:
        folded.undo()


def widened_leaves(changes: Changes, sites: SiteMap) -> list[Leaf]:
    """Returns the linear maps whose weight gets another shape."""
    grown = {id(place.whole) for place, new in changes if new.shape != place.tensor.shape}
    return [leaf for leaf in sites.leaves() if leaf.weight is not None and id(leaf.weight) in grown]


@torch.no_grad()
def merged_tensors(name: str, adapter: Adapter, sites: SiteMap) -> Changes:
    """Returns the weights and biases with which the encoder computes the same as with `adapter`.

    Raises:
        ValueError: a site has no bias or weight that could hold the adapter's change, or a
            feed-forward part cannot get more channels.
    """
    changes = [*_changed_leaves(name, adapter, sites), *_more_channels(name, adapter, sites)]
    wide = {leaf.name for leaf in widened_leaves(changes, sites)}
    for site in adapter.plan().delta.keys() & wide:
        raise ValueError(
            f"adapter {name!r} cannot be merged: it both changes {site} and adds channels to it"
        )
    return changes


def _changed_leaves(name: str, adapter: Adapter, sites: SiteMap) -> Iterator[tuple]:
    """Yields (place, tensor) for the linear maps whose weight or bias the adapter changes."""
    leaves = {leaf.name: leaf for leaf in sites.leaves()}
    for site, deltas in adapter.plan().delta.items():
        leaf = leaves[site]
        weight = leaf.weight
        if weight is None:
            weight = torch.ones(leaf.out_features, **leaf.like())
        changed, bias = changed_weight(leaf, weight, deltas)
        for place, new, old in (
            (leaf.weight_at, changed, weight),
            (leaf.bias_at, bias, leaf.bias),
        ):
            if place is not None and new is not None:
                yield place, new
            elif new is not None and (old is None or not torch.equal(new, old)):
                raise _nowhere(name, site)


def _more_channels(name: str, adapter: Adapter, sites: SiteMap) -> Iterator[tuple]:
    """Yields (place, tensor) for the feed-forward parts whose channels the adapter becomes."""
    sublayers = {sublayer.name: sublayer for sublayer in sites.sublayers()}
    blocks = {part.name: block for block in sites.blocks() for part in block.sublayers.values()}
    users: dict[int, int] = {}
    for leaf in sites.leaves():
        users[id(leaf.weight)] = users.get(id(leaf.weight), 0) + 1
    for site, branches in adapter.plan().branch.items():
        leaves = sublayers[site].leaves if site in sublayers else {}
        first, second = leaves.get("up"), leaves.get("down")
        given = [branch.channels() for branch in branches]
        if (
            first is None
            or second is None
            or "gate" in leaves
            or any(part is None for part in given)
            or any(not _can_grow(leaf) or users[id(leaf.weight)] > 1 for leaf in (first, second))
        ):
            raise ValueError(
                f"adapter {name!r} cannot be merged: {site} is not made of two linear maps of its "
                "own that could get more channels"
            )
        downs, down_biases, ups, up_biases = zip(*given, strict=True)  # type: ignore[arg-type]
        if first.bias_at is None and any(bias.any() for bias in down_biases):
            raise _nowhere(name, first.name)
        if second.bias_at is None and any(bias.any() for bias in up_biases):
            raise _nowhere(name, second.name)
        gain = _layer_scale(sublayers[site], blocks[site])
        if gain is not None and not gain.all():
            raise ValueError(
                f"adapter {name!r} cannot be merged: the LayerScale of {site} has zeros"
            )
        if gain is not None:
            ups = tuple(up / gain.reshape(-1, 1) for up in ups)
            up_biases = tuple(bias / gain for bias in up_biases)
        yield first.weight_at, _joined([first.weight, *downs], 0)
        yield second.weight_at, _joined([second.weight, *ups], 1)
        if first.bias_at is not None:
            yield first.bias_at, _joined([first.bias, *down_biases], 0)
        if second.bias is not None:
            total = second.bias + sum(up_biases[1:], up_biases[0]).to(second.bias.dtype)
            yield second.bias_at, total


def _layer_scale(sublayer: Sublayer, block: Block) -> Tensor | None:
    """Returns the factors (D,) by which the part's output is multiplied, or None without any."""
    scales: list = list(sublayer.output.parameters())
    if not scales:  # In timm the output is a DropPath behind the LayerScale.
        scale = getattr(block.module, "ls2", None)
        scales = (
            [block.module._parameters.get("gamma_2")] if scale is None else [*scale.parameters()]
        )
    single = scales[0] if len(scales) == 1 else None
    return single if single is not None and single.shape == (sublayer.width,) else None


def _can_grow(leaf: Leaf) -> bool:
    """Whether the leaf is a whole linear map with a weight of its own."""
    return (
        isinstance(leaf.module, nn.Linear)
        and leaf.parts == 1
        and leaf.weight_at is not None
        and leaf.weight_at.start is None
        and leaf.weight_at.whole.is_floating_point()
    )


def _joined(parts: list, dim: int) -> Tensor:
    """Concatenates tensors in the dtype of the first."""
    return torch.cat([part.detach().to(parts[0].dtype) for part in parts], dim=dim)


def _nowhere(name: str, site: str) -> ValueError:
    return ValueError(
        f"adapter {name!r} cannot be merged: {site} has no parameter to hold its shift or scale"
    )
