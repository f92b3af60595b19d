"""Metrics of a split's captions: CIDEr, BLEU, ROUGE-L and perplexity, in total and by group.

The values are as papers print them: CIDEr times 100 (133.3 is 1.333 in COCO's evaluation), BLEU and
ROUGE-L in percent. METEOR and SPICE need Java and are left out.

Shape legend: I images, S resamples.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..core.metrics import Metric, summed_metric
from ..core.results import Scores, Table
from ..core.rows import Record
from .cider import cider
from .words import words

CIDER, ROUGE, PERPLEXITY = "CIDEr", "ROUGE-L", "perplexity"
BLEU = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4")
BETA = 1.2  # of ROUGE-L's F measure, as in COCO's evaluation
SHOWN = 10


@dataclass
class Image:
    """One image with the references and sums of all of its rows.

    Attributes:
        record: of the image's first row.
        references: the captions that people wrote.
        said: the words of the caption that was written.
        right: the words of each reference.
        likelihood: the log-likelihood of the references, summed.
        tokens: the number of tokens in `likelihood`.
        cider: the image's CIDEr, times 100.
    """

    record: Record
    references: list[str]
    said: list[str] = field(default_factory=list)
    right: list[list[str]] = field(default_factory=list)
    likelihood: float = 0.0
    tokens: int = 0
    cider: float = 0.0

    @property
    def caption(self) -> str:
        return self.record["caption"]


def images_of(records: Sequence[Record]) -> list[Image]:
    """Returns the images of a split in order, each with the references of all of its rows.

    CIDEr of an image depends on the other images.
    """
    by_id: dict[int, Image] = {}
    for record in records:
        image = by_id.setdefault(record["image_id"], Image(record, []))
        image.references += record["captions"]
        image.likelihood += record["likelihood"]
        image.tokens += record["tokens"]
    images = list(by_id.values())
    for image in images:
        image.said = words(image.caption)
        image.right = [words(text) for text in image.references]
    values = cider([image.said for image in images], [image.right for image in images])
    for image, value in zip(images, values, strict=True):
        image.cider = 100 * float(value)
    return images


def scores(
    records: Sequence[Record], *, deciding: str, groups: Sequence[str], resamples: int
) -> Scores:
    """Returns the scores of a split, with intervals over resampled images.

    Rows of one image are one image. In a group, document frequencies of n-grams are those of the
    whole split, so that CIDEr of groups can be compared.

    Args:
        records: of the split.
        deciding: the metric that stands first.
        groups: columns whose values form groups.
        resamples: for the intervals; 0 for none.
    """
    images = images_of(records)
    statistics = _statistics(images)

    def of(chosen: np.ndarray) -> list[Metric]:
        count = len(images)
        metrics = [
            summed_metric(
                name,
                np.concatenate([values, np.ones((count, 1))], axis=1)[chosen],
                _FUNCTIONS[name],
                resamples=resamples,
                unit="%" if name in (ROUGE, *BLEU) else "",
                greater_is_better=name != PERPLEXITY,
            )
            for name, values in statistics.items()
        ]
        return sorted(metrics, key=lambda metric: metric.name != deciding)

    by_column = {}
    for column in groups:
        values = np.array([str(image.record["row"].get(column)) for image in images])
        by_column[column] = {
            str(value): of(np.flatnonzero(values == value)) for value in np.unique(values)
        }
    return Scores(of(np.arange(len(images))), by_column, _tables(images))


def _statistics(images: Sequence[Image]) -> dict[str, np.ndarray]:
    """Returns the statistics of each image from which a metric is summed: name -> (I, K)."""
    counts = bleu_counts([image.said for image in images], [image.right for image in images])
    rouge = [rouge_l(image.said, image.right) for image in images]
    return {
        CIDER: np.array([[image.cider] for image in images]),
        **dict.fromkeys(BLEU, counts),
        ROUGE: np.array(rouge)[:, None],
        PERPLEXITY: np.array([[image.likelihood, image.tokens] for image in images]),
    }


def bleu_counts(
    candidates: Sequence[list[str]], references: Sequence[list[list[str]]]
) -> np.ndarray:
    """Returns the counts of BLEU for each image, (I, 10), as sacrebleu counts them.

    Returns:
        Matching n-grams of 1 to 4 words, all n-grams of 1 to 4 words, the words of the caption, and
        the words of the reference that is nearest in length (the shorter one of two).
    """
    from sacrebleu.metrics import BLEU as Counter

    # Only counts are used, so smoothing does not matter. Without an effective order sacrebleu warns
    # about single sentences.
    counter = Counter(tokenize="none", effective_order=True)
    counts = []
    for candidate, some in zip(candidates, references, strict=True):
        one = counter.sentence_score(" ".join(candidate), [" ".join(other) for other in some])
        counts.append([*one.counts, *one.totals, one.sys_len, one.ref_len])
    return np.array(counts, dtype=np.float64)


def bleu(sums: np.ndarray, order: int) -> np.ndarray:
    """Returns BLEU of n-grams up to `order` (Papineni et al. 2002), without smoothing.

    It is 0 if an order has no match.

    Args:
        sums: (…, 10 or more) sums of `bleu_counts`.
        order: 1 to 4.

    Returns:
        (…) values from 0 to 1.
    """
    matches, totals = sums[..., :order], sums[..., 4 : 4 + order]
    said, right = sums[..., 8], sums[..., 9]
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.where(totals > 0, matches / totals, 0.0)
        brevity = np.where(said > 0, np.minimum(1 - right / said, 0), -np.inf)
        return np.exp(brevity + np.log(precision).mean(axis=-1))


def rouge_l(candidate: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Returns the F measure of the longest common subsequence (Lin 2004).

    As in COCO's evaluation, it is made of the best precision and the best recall among the
    references.
    """
    common = [_common(candidate, reference) for reference in references]
    if not any(common):
        return 0.0
    precision = max(common) / len(candidate)
    recall = max(n / len(r) for n, r in zip(common, references, strict=True) if r)
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """Returns the length of the longest common subsequence."""
    last = [0] * (len(other) + 1)
    for word in one:
        line = [0]
        for place, second in enumerate(other):
            line.append(last[place] + 1 if word == second else max(last[place + 1], line[-1]))
        last = line
    return last[-1]


def _mean(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., -1]


def _perplexity(sums: np.ndarray) -> np.ndarray:
    return np.exp(-sums[..., 0] / sums[..., 1])


_FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    CIDER: _mean,
    **{name: functools.partial(bleu, order=order) for order, name in enumerate(BLEU, 1)},
    ROUGE: _mean,
    PERPLEXITY: _perplexity,
}


def _tables(images: Sequence[Image]) -> list[Table]:
    order = np.argsort([image.cider for image in images], kind="stable")
    tables = []
    for title, chosen in (("Lowest", order[:SHOWN]), ("Highest", order[::-1][:SHOWN])):
        rows = [
            (round(images[n].cider, 1), images[n].caption, " | ".join(images[n].references))
            for n in chosen
        ]
        tables.append(Table(f"{title} CIDEr", ("CIDEr", "written", "what people wrote"), rows))
    return tables
