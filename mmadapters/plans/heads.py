"""Linear heads of several tasks, each for its own samples of a batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..composition import Route
from ..suggest import nearest
from .stacked import linear_by_row, padded


class RoutedHeads(nn.Module):
    """The heads of the adapters in a `Route`, computed in one batched product.

    Args:
        heads: by the name of an adapter, a linear map from D features to C of its own.

    Raises:
        ValueError: there are no heads, or they read different widths.
    """

    def __init__(self, heads: Mapping[str, nn.Linear]) -> None:
        super().__init__()
        if not heads:
            raise ValueError("RoutedHeads needs at least one head")
        widths = {head.in_features for head in heads.values()}
        if len(widths) > 1:
            raise ValueError(f"heads of one encoder read one width, not {sorted(widths)}")
        self.heads = nn.ModuleDict(heads)

    def forward(self, x: Tensor, route: Route | Iterable[str]) -> Tensor:
        """x: (B, ..., D), a name for each sample -> logits (B, ..., C), C of the largest head.

        If the head of a sample has fewer outputs, its other logits are -inf, so that softmax and
        argmax ignore them.

        Raises:
            ValueError: a name has no head, or there are not as many names as samples.
        """
        names = [str(name) for name in (route.members if isinstance(route, Route) else route)]
        known = list(self.heads)
        for name in names:
            if name not in self.heads:
                hint = nearest(name, known)
                raise ValueError(f"no head is called {name!r}{hint}; there are {', '.join(known)}")
        if len(names) != len(x):
            raise ValueError(f"{len(names)} names were given for a batch of {len(x)} samples")
        places = torch.tensor([known.index(name) for name in names], device=x.device)
        heads = [head for head in self.heads.values() if isinstance(head, nn.Linear)]
        most = max(head.out_features for head in heads)
        shape = (most, heads[0].in_features)
        weights = torch.stack([padded(head.weight, shape) for head in heads])
        biases = torch.stack([padded(_bias(head), (most,), -torch.inf) for head in heads])
        return linear_by_row(x, weights[places], biases[places])


def _bias(head: nn.Linear) -> Tensor:
    return head.weight.new_zeros(head.out_features) if head.bias is None else head.bias
