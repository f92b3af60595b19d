"""CIDEr-D: how much a caption shares with what people wrote, by n-grams that tell images apart.

No package gives it that is kept and light: `pycocoevalcap`, the reference, was last released in
2020 and carries 100 MB of Java. This gives the same figures (Vedantam et al. 2015, eqs. 1–3 and
§8: clipping and a Gaussian penalty on lengths).

Shape legend: I images, R references of all of them, S = I + R captions, L words of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ORDERS = 4  # n-grams of one word to four
SIGMA = 6.0  # words of difference in length that the penalty allows for


def cider(candidates: Sequence[list[str]], references: Sequence[list[list[str]]]) -> np.ndarray:
    """(I,): CIDEr-D of each candidate, of at most 10; a split's is the mean.

    How rare an n-gram is (its document frequency: the images one of whose references holds it) is
    taken from these references: a score depends on the images that it is measured beside, and is 0
    for one image alone.

    Args:
        candidates: the words of a caption for each image.
        references: those of one reference or several for each image.
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
    """(S, L): a number for each word, −1 behind the last one."""
    numbers: dict[str, int] = {}
    longest = max(map(len, captions), default=0)
    found = np.full((len(captions), max(longest, 1)), -1)
    for row, caption in zip(found, captions, strict=True):
        row[: len(caption)] = [numbers.setdefault(word, len(numbers)) for word in caption]
    return found


def _longer(grams: np.ndarray, words: np.ndarray) -> np.ndarray:
    """(S, K) numbers of n-grams and (S, K − 1) of the word behind each -> those of n-grams of one
    word more, −1 where the caption ends."""
    grams = grams[:, : words.shape[1]]
    pairs = np.where((grams < 0) | (words < 0), -1, grams * (words.max(initial=0) + 1) + words)
    known, numbers = np.unique(pairs, return_inverse=True)
    return numbers.reshape(pairs.shape) - int(known[:1].tolist() == [-1])


def _similarity(grams: np.ndarray, image_of: np.ndarray, images: int) -> np.ndarray:
    """(R,): the clipped cosine of each reference and its image's candidate, for one order.

    Args:
        grams: (S, K) numbers of n-grams, the candidates of the images first.
        image_of: (S,) the image of each caption.
    """
    caption, place = np.nonzero(grams >= 0)
    count = int(grams.max(initial=-1)) + 1
    # One line for each n-gram of each caption, in order of captions.
    keys, frequency = np.unique(caption * count + grams[caption, place], return_counts=True)
    if not len(keys):
        return np.zeros(len(image_of) - images)
    caption, gram = np.divmod(keys, count)
    reference = caption >= images
    known = np.unique(image_of[caption[reference]] * count + gram[reference])
    documents = np.bincount(known % count, minlength=count)
    weight = frequency * (np.log(images) - np.log(np.maximum(documents, 1)))[gram]
    norm = np.sqrt(np.bincount(caption, weight**2, minlength=len(image_of)))
    # The candidates' lines stand first, in order of image and n-gram.
    wanted = image_of[caption[reference]] * count + gram[reference]
    own = keys[~reference]
    at = np.minimum(np.searchsorted(own, wanted), max(len(own) - 1, 0))
    shared = own[at] == wanted if len(own) else np.zeros(len(wanted), dtype=bool)
    theirs = weight[reference][shared]
    products = np.minimum(weight[~reference][at[shared]], theirs) * theirs
    dots = np.bincount(caption[reference][shared], products, minlength=len(image_of))[images:]
    norms = norm[image_of[images:]] * norm[images:]
    return np.divide(dots, norms, out=np.zeros(len(dots)), where=norms > 0)
