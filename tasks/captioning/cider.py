"""CIDEr-D: the similarity of a caption to people's captions, by n-grams that tell images apart.

No maintained and small package computes it: `pycocoevalcap`, the reference, was last released in
2020 and contains 100 MB of Java. This file gives the same values (Vedantam et al. 2015, eqs. 1–3
and §8: clipping and a Gaussian penalty on lengths).

Shape legend: I images, R references of all of them, S = I + R captions, L words of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ORDERS = 4  # n-grams of one word to four words
SIGMA = 6.0  # standard deviation of the penalty on differences in length, in words


def cider(candidates: Sequence[list[str]], references: Sequence[list[list[str]]]) -> np.ndarray:
    """Returns CIDEr-D of each candidate, (I,), from 0 to 10. That of a split is the mean.

    The document frequency of an n-gram is the number of images that have it in a reference. It is
    counted in these references, so a score depends on the other images and is 0 for a lone image.

    Args:
        candidates: the words of a caption for each image.
        references: the words of one reference or several for each image.
    """
    image_of_reference = np.repeat(np.arange(len(candidates)), [len(some) for some in references])
    captions = [*candidates, *(one for some in references for one in some)]
    lengths = np.array([len(caption) for caption in captions])
    image_of = np.concatenate([np.arange(len(candidates)), image_of_reference])
    similarity = np.zeros(len(image_of_reference))
    words = _numbered(captions)
    grams = words
    for order in range(ORDERS):
        if order:
            grams = _longer(grams, words[:, order:])
        similarity += _similarity(grams, image_of, len(candidates))
    difference = lengths[len(candidates) :] - lengths[image_of_reference]
    similarity *= np.exp(-(difference**2) / (2 * SIGMA**2)) / ORDERS
    sums = np.bincount(image_of_reference, similarity, minlength=len(candidates))
    return 10 * sums / np.array([len(some) for some in references])


def _numbered(captions: Sequence[list[str]]) -> np.ndarray:
    """Returns (S, L) numbers of words, −1 after the last word of a caption."""
    numbers: dict[str, int] = {}
    longest = max(map(len, captions), default=0)
    table = np.full((len(captions), max(longest, 1)), -1)
    for row, caption in zip(table, captions, strict=True):
        row[: len(caption)] = [numbers.setdefault(word, len(numbers)) for word in caption]
    return table


def _longer(grams: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Returns the numbers of n-grams that are one word longer, −1 where the caption ends.

    Args:
        grams: (S, K) numbers of n-grams.
        words: (S, K − 1) numbers of the word after each of them.
    """
    grams = grams[:, : words.shape[1]]
    pairs = np.where((grams < 0) | (words < 0), -1, grams * (words.max(initial=0) + 1) + words)
    known, numbers = np.unique(pairs, return_inverse=True)
    return numbers.reshape(pairs.shape) - int(known[:1].tolist() == [-1])


def _similarity(grams: np.ndarray, image_of: np.ndarray, images: int) -> np.ndarray:
    """Returns (R,) clipped cosines of each reference and its image's candidate, for one order.

    Args:
        grams: (S, K) numbers of n-grams, the candidates of the images first.
        image_of: (S,) the image of each caption.
        images: I.
    """
    caption, place = np.nonzero(grams >= 0)
    count = int(grams.max(initial=-1)) + 1
    # One entry for each n-gram of each caption, in order of captions.
    keys, frequency = np.unique(caption * count + grams[caption, place], return_counts=True)
    if not len(keys):
        return np.zeros(len(image_of) - images)
    caption, gram = np.divmod(keys, count)
    reference = caption >= images
    known = np.unique(image_of[caption[reference]] * count + gram[reference])
    documents = np.bincount(known % count, minlength=count)
    weight = frequency * (np.log(images) - np.log(np.maximum(documents, 1)))[gram]
    norm = np.sqrt(np.bincount(caption, weight**2, minlength=len(image_of)))
    # The candidates' entries stand first, in order of image and n-gram.
    wanted = image_of[caption[reference]] * count + gram[reference]
    of_candidates = keys[~reference]
    at = np.minimum(np.searchsorted(of_candidates, wanted), max(len(of_candidates) - 1, 0))
    shared = (
        of_candidates[at] == wanted if len(of_candidates) else np.zeros(len(wanted), dtype=bool)
    )
    theirs = weight[reference][shared]
    products = np.minimum(weight[~reference][at[shared]], theirs) * theirs
    dots = np.bincount(caption[reference][shared], products, minlength=len(image_of))[images:]
    norms = norm[image_of[images:]] * norm[images:]
    return np.divide(dots, norms, out=np.zeros(len(dots)), where=norms > 0)
