"""Folding an adapter into the frozen weights, and undoing it to the bit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .adapter import Adapter
from .injectors.raw import changed_weight
from .sites import Parameter, SiteMap

Changes = list[tuple[Parameter, Tensor]]


@dataclass(eq=False)
class Merged:
    """One merged adapter: the tensors that it changed, as they were."""

    name: str
    originals: Changes

    @classmethod
    def into_weights(cls, name: str, changes: Changes) -> Merged:
        """Writes the changed tensors into the encoder."""
        originals = [(place, place.tensor.detach().clone()) for place, _ in changes]
        _write(changes)
        return cls(name, originals)

    def undo(self) -> None:
        _write(self.originals)


def _write(changes: Changes) -> None:
    for place, value in changes:
        place.tensor.data.copy_(value)


def merged_tensors(name: str, adapter: Adapter, sites: SiteMap) -> Changes:
    """The weights and biases that compute the same as the encoder with `adapter` acting.

    Raises:
        ValueError: a site has no bias or weight to hold what the adapter adds there.
    """
    leaves = {leaf.name: leaf for leaf in sites.leaves()}
    changes: list[tuple[Parameter, Tensor]] = []
    for site, deltas in adapter.plan().delta.items():
        leaf = leaves[site]
        weight = leaf.weight
        if weight is None:
            weight = torch.ones(leaf.out_features, **leaf.like())
        with torch.no_grad():
            changed, bias = changed_weight(leaf, weight, deltas)
        for place, new, old in (
            (leaf.weight_at, changed, weight),
            (leaf.bias_at, bias, leaf.bias),
        ):
            if place is not None and new is not None:
                changes.append((place, new))
            elif new is not None and (old is None or not torch.equal(new, old)):
                raise ValueError(
                    f"adapter {name!r} cannot be merged: {site} has no parameter to hold its "
                    "shift or scale"
                )
    return changes
