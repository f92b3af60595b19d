"""Heads of several tasks on one batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmadapters import Route, RoutedHeads


def heads() -> dict[str, nn.Linear]:
    return {"fr": nn.Linear(8, 5), "de": nn.Linear(8, 3), "it": nn.Linear(8, 5, bias=False)}


@pytest.mark.parametrize("shape", [(4, 8), (4, 6, 8)], ids=["pooled", "tokens"])
def test_each_sample_gets_its_own_head(shape: tuple[int, ...]) -> None:
    own, x, names = heads(), torch.randn(shape), ["de", "fr", "it", "de"]
    logits = RoutedHeads(own)(x, Route(names))
    assert logits.shape == (*shape[:-1], 5)
    for row, name in enumerate(names):
        alone = own[name](x[row])
        assert torch.allclose(logits[row][..., : alone.shape[-1]], alone, atol=1e-6)
        assert bool((logits[row][..., alone.shape[-1] :] == -torch.inf).all())


def test_gradient_of_each_head_is_that_of_its_samples() -> None:
    own, x, names = heads(), torch.randn(4, 8), ["de", "fr", "it", "de"]
    RoutedHeads(own)(x, names).softmax(-1)[:, 0].sum().backward()
    together = {name: head.weight.grad.clone() for name, head in own.items()}  # type: ignore[union-attr]
    for head in own.values():
        head.weight.grad = None
    sum(own[name](x[row]).softmax(-1)[0] for row, name in enumerate(names)).backward()  # type: ignore[union-attr]
    for name, head in own.items():
        assert head.weight.grad is not None
        assert torch.allclose(together[name], head.weight.grad, atol=1e-6)


@pytest.mark.parametrize(
    ("names", "message"),
    [(["fr", "ed"], "did you mean 'de'"), (["fr"], "1 names were given for a batch of 2")],
)
def test_names_that_do_not_fit_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RoutedHeads(heads())(torch.randn(2, 8), names)


def test_heads_of_different_widths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one width, not \[4, 8\]"):
        RoutedHeads({"a": nn.Linear(8, 2), "b": nn.Linear(4, 2)})
    with pytest.raises(ValueError, match="at least one head"):
        RoutedHeads({})
