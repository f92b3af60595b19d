"""Heads of a classifier against the same sums written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families.small import randomise
from torch import Tensor

from mmadapters.tasks.classification.config import HeadConfig
from mmadapters.tasks.classification.head import AttentionPool, ClassificationHead, MeanPool
from mmadapters.tasks.classification.model import class_weights


def states(layers: int = 1) -> list[Tensor]:
    return [torch.randn(3, 5, 8, dtype=torch.float64) for _ in range(layers)]


MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]).bool()


def head(number: int = 1, **config: Any) -> ClassificationHead:
    made = ClassificationHead(HeadConfig(**config), width=8, layers=number, classes=4).double()
    randomise(made)
    return made.eval()


@pytest.mark.parametrize("pool", [MeanPool(), AttentionPool(8, 2)])
def test_padding_never_counts(pool: Any) -> None:
    pool = pool.double()
    (tokens,) = states()
    expected = [pool(row[None, : int(keep.sum())]) for row, keep in zip(tokens, MASK, strict=True)]
    tokens[~MASK] = 1e6
    torch.testing.assert_close(pool(tokens, MASK), torch.cat(expected))


def test_what_is_not_a_number_in_padding_does_not_spread_into_means() -> None:
    (tokens,) = states()
    expected = MeanPool()(tokens, MASK)
    tokens[~MASK] = float("nan")
    torch.testing.assert_close(MeanPool()(tokens, MASK), expected)


def test_attention_pooling_is_softmax_of_query_times_keys() -> None:
    pool = AttentionPool(8, 2).double()
    randomise(pool)
    (tokens,) = states()
    key, value = pool.key_value(pool.norm(tokens)).split(8, dim=-1)
    parts = []
    for h in range(2):
        own = slice(4 * h, 4 * h + 4)
        shares = (key[..., own] @ pool.query[0, h, 0] / 4**0.5).softmax(dim=-1)
        parts.append((shares[..., None] * value[..., own]).sum(dim=1))
    torch.testing.assert_close(pool(tokens), pool.out(torch.cat(parts, dim=-1)))


def test_layers_are_summed_by_the_softmax_of_their_weights() -> None:
    made = head(3, layers="all")
    found = states(3)
    assert made.sum is not None
    shares = made.sum.weight.softmax(dim=0)
    total = sum(share * state for share, state in zip(shares, found, strict=True))
    torch.testing.assert_close(
        made(found, MASK).double(),
        made.classifier(MeanPool()(total, MASK)),  # type: ignore[arg-type]
        check_dtype=False,
    )


def test_a_fresh_layer_sum_is_the_mean() -> None:
    made = ClassificationHead(HeadConfig(layers="all"), width=8, layers=3, classes=4).double()
    found = states(3)
    assert made.sum is not None
    torch.testing.assert_close(made.sum(found), torch.stack(found).mean(dim=0))


def test_every_parameter_of_every_head_learns() -> None:
    for kind in ("linear", "mlp"):
        for pooling in ("mean", "attention"):
            for layers in ("last", "all"):
                made = head(2, kind=kind, pooling=pooling, layers=layers)
                loss = F.cross_entropy(made(states(2), MASK), torch.tensor([0, 1, 2]))
                loss.backward()
                for name, parameter in made.named_parameters():
                    assert parameter.grad is not None, name
                    assert parameter.grad.any(), name


def test_heads_of_attention_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"3 heads .* do not divide .* 8; set head.heads"):
        head(pooling="attention", heads=3)


def test_balanced_weights_make_all_classes_count_the_same() -> None:
    weights = class_weights("balanced", "abc", [10, 30, 60], rows=None)
    assert weights is not None
    torch.testing.assert_close(weights, torch.tensor([100 / 30, 100 / 90, 100 / 180]))
    counts = torch.tensor([10, 30, 60])
    torch.testing.assert_close((weights * counts), torch.full((3,), 100 / 3))
    assert (weights * counts).sum() / 100 == pytest.approx(1)


def test_balanced_weights_of_several_labels_are_absences_for_each_presence() -> None:
    weights = class_weights("balanced", "abc", [10, 50, 0], rows=100)
    assert weights is not None
    torch.testing.assert_close(weights, torch.tensor([9.0, 1.0, 99.0]))


def test_weights_by_name_and_what_is_wrong_with_them() -> None:
    weights = class_weights({"dog": 3.0}, ["cat", "dog"], [1, 1], rows=None)
    assert weights is not None
    assert weights.tolist() == [1.0, 3.0]
    assert class_weights("none", ["cat", "dog"], [1, 1], rows=None) is None
    with pytest.raises(ValueError, match="has 'dogg', no class; did you mean 'dog'"):
        class_weights({"dogg": 3.0}, ["cat", "dog"], [1, 1], rows=None)
