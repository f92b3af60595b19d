"""Recall with several captions for each image, against counting by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mmadapters.tasks.retrieval import metrics
from mmadapters.tasks.retrieval.gallery import Gallery
from mmadapters.tasks.retrieval.metrics import (
    TO_IMAGE,
    TO_TEXT,
    candidates,
    ranks,
    recalls,
    reranked,
)


def records(counts: list[int], *, width: int = 6, seed: int = 0, noise: float = 1.2) -> list[dict]:
    """Images with so many captions each, whose vectors lie near the image's."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number, count in enumerate(counts):
        image = F.normalize(torch.randn(width, generator=generator), dim=0)
        texts = image + noise * torch.randn(count, width, generator=generator)
        found.append(
            {
                "image": image.numpy(),
                "texts": F.normalize(texts, dim=1).numpy(),
                "image_id": 1000 - number,
                "captions": [f"{number}.{place}" for place in range(count)],
                "index": number,
                "row": {},
            }
        )
    return found


def brute_force(gallery: Gallery) -> tuple[list[int], list[int]]:
    """Ranks of images and of texts by sorting, a right answer behind all that score the same."""
    images, texts = gallery.images.double().numpy(), gallery.texts.double().numpy()
    of = gallery.image_of.numpy()
    image_ranks, text_ranks = [], []
    for number, image in enumerate(images):
        scores = [float(image @ text) for text in texts]
        order = sorted(range(len(texts)), key=lambda t: (-scores[t], of[t] == number))
        image_ranks.append(next(place for place, t in enumerate(order) if of[t] == number))
    for number, text in enumerate(texts):
        scores = [float(text @ image) for image in images]
        order = sorted(range(len(images)), key=lambda i: (-scores[i], i == of[number]))
        text_ranks.append(order.index(of[number]))
    return image_ranks, text_ranks


@pytest.mark.parametrize("at_a_time", [2**24, 7])
def test_ranks_equal_sorting_everything(at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "AT_A_TIME", at_a_time)
    gallery = Gallery.of(records([1, 5, 2, 3, 5, 1, 4, 2, 2, 5]))
    image_ranks, text_ranks = brute_force(gallery)
    assert gallery.direction(TO_TEXT).ranks().tolist() == image_ranks
    assert gallery.direction(TO_IMAGE).ranks().tolist() == text_ranks
    assert 0 < np.mean(text_ranks) < 5  # neither all right nor chance


def test_an_images_other_captions_are_not_before_its_best() -> None:
    image = torch.tensor([[1.0, 0.0]])
    texts = F.normalize(torch.tensor([[1.0, 0.1], [1.0, 0.2], [1.0, 0.3], [0.0, 1.0]]), dim=1)
    labels = torch.tensor([0, 0, 0, 1])
    assert ranks(image, texts, torch.tensor([0]), labels).tolist() == [0]


def test_one_wrong_text_between_two_own_ones_costs_nothing() -> None:
    texts = F.normalize(torch.tensor([[1.0, 0.1], [1.0, 0.2], [1.0, 0.3]]), dim=1)
    labels = torch.tensor([0, 1, 0])
    assert ranks(torch.tensor([[1.0, 0.0]]), texts, torch.tensor([0]), labels).tolist() == [0]


def test_ties_count_against_the_query() -> None:
    same = F.normalize(torch.ones(5, 8), dim=1)
    numbers = torch.arange(5)
    assert ranks(same, same, numbers, numbers).tolist() == [4] * 5


def test_a_collapsed_encoder_is_last_whatever_its_rounding() -> None:
    # Equal rows in odd shapes: blocks of a matmul need not round alike.
    vectors = F.normalize(torch.randn(1, 67), dim=1).expand(1013, 67).contiguous()
    numbers = torch.arange(1013)
    assert ranks(vectors, vectors, numbers, numbers).tolist() == [1012] * 1013


def test_embeddings_that_are_not_finite_find_nothing() -> None:
    vectors = torch.full((4, 8), torch.nan)
    numbers = torch.arange(4)
    assert ranks(vectors, vectors, numbers, numbers).tolist() == [3] * 4


def test_rows_of_one_image_are_one_image() -> None:
    together = records([3, 2, 1])
    apart = [
        {**record, "texts": record["texts"][place : place + 1], "captions": [caption]}
        for record in together
        for place, caption in enumerate(record["captions"])
    ]
    one, other = Gallery.of(together), Gallery.of(apart)
    assert len(other.images) == 3
    assert other.captions == one.captions
    for direction in (TO_TEXT, TO_IMAGE):
        expected = one.direction(direction).ranks()
        np.testing.assert_array_equal(other.direction(direction).ranks(), expected)
    assert other.first.tolist() == [0, 3, 5]


def named(found: list, name: str):  # type: ignore[no-untyped-def]
    return next(metric for metric in found if metric.name == name)


def recalled(resamples: int = 0, deciding: str = "mean R@1") -> list:
    image_ranks, text_ranks = np.array([0, 7, 2, 40]), np.array([0, 0, 3, 5, 9, 10])
    return recalls(
        image_ranks,
        text_ranks,
        images=np.arange(4),
        image_of=np.array([0, 0, 1, 1, 2, 3]),
        deciding=deciding,
        resamples=resamples,
    )


def test_recall_and_median_count_ranks_from_one() -> None:
    found = recalled()
    values = {metric.name: metric.value for metric in found}
    assert values == {
        "mean R@1": pytest.approx((1 / 4 + 2 / 6) / 2),
        "text-to-image R@1": pytest.approx(2 / 6),
        "text-to-image R@5": pytest.approx(3 / 6),
        "text-to-image R@10": pytest.approx(5 / 6),
        "text-to-image median rank": 5.0,
        "image-to-text R@1": 1 / 4,
        "image-to-text R@5": 2 / 4,
        "image-to-text R@10": 3 / 4,
        "image-to-text median rank": 5.5,
    }
    assert not named(found, "text-to-image median rank").greater_is_better
    assert named(found, "text-to-image R@1").count == 6


def test_the_deciding_metric_comes_first() -> None:
    assert recalled(deciding="text-to-image R@1")[0].name == "text-to-image R@1"
    assert recalled()[0].name == "mean R@1"


def test_intervals_resample_images_with_all_their_texts() -> None:
    """Five identical captions of an image are one observation, not five."""
    generator = np.random.default_rng(0)
    hits = generator.random(200) < 0.3
    text_ranks = np.where(np.repeat(hits, 5), 0, 99)
    found = recalls(
        np.where(hits, 0, 99),
        text_ranks,
        images=np.arange(200),
        image_of=np.repeat(np.arange(200), 5),
        deciding="mean R@1",
        resamples=2000,
    )
    share = hits.mean()
    error = 1.96 * np.sqrt(share * (1 - share) / 200)
    for name in ("text-to-image R@1", "image-to-text R@1", "mean R@1"):
        metric = named(found, name)
        assert (metric.high - metric.low) / 2 == pytest.approx(error, rel=0.1)


def test_candidates_are_the_most_similar() -> None:
    queries, gallery = torch.randn(9, 4), torch.randn(30, 4)
    values, chosen = candidates(queries, gallery, 5)
    expected = np.argsort(-(queries @ gallery.T).numpy(), axis=1)[:, :5]
    np.testing.assert_array_equal(chosen.numpy(), expected)
    torch.testing.assert_close(values, (queries @ gallery.T).gather(1, chosen))
    assert candidates(queries, gallery[:3], 5)[1].shape == (9, 3)


def test_reranking_orders_candidates_and_leaves_the_rest_behind_them() -> None:
    generator = torch.Generator().manual_seed(0)
    queries = F.normalize(torch.randn(40, 4, generator=generator), dim=1)
    of_query, of_gallery = torch.arange(40), torch.arange(60) % 40
    gallery = F.normalize(queries[of_gallery] + torch.randn(60, 4, generator=generator), dim=1)
    _, chosen = candidates(queries, gallery, 8)
    scores = torch.randn(40, 8, generator=generator)
    found = reranked(
        ranks(queries, gallery, of_query, of_gallery), chosen, scores, of_query, of_gallery
    )
    similar = queries @ gallery.T

    def by_hand(query: int) -> int:
        second = {int(g): float(s) for g, s in zip(chosen[query], scores[query], strict=True)}
        order = sorted(
            range(60), key=lambda g: (g not in second, -second.get(g, float(similar[query, g])))
        )
        own = [place for place, g in enumerate(order) if g % 40 == query]
        return own[0]

    expected = [by_hand(query) for query in range(40)]
    inside = [bool(set(chosen[q].tolist()) & {q, q + 40}) for q in range(40)]
    assert 5 < sum(inside) < 35
    assert found.tolist() == expected


def test_top_gives_what_ranks_say() -> None:
    gallery = Gallery.of(records([2, 3, 1, 4]))
    direction = gallery.direction(TO_IMAGE)
    for query, rank in enumerate(direction.ranks()):
        numbers, scores = direction.top(query, 4)
        assert numbers.index(int(gallery.image_of[query])) == rank
        assert scores == sorted(scores, reverse=True)
