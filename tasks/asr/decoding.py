"""Decoding of CTC's log probabilities to characters: greedy, and by a prefix beam search.

Shape legend: B utterances, F frames, C characters, K beams.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .config import DecodingConfig
from .language_model import END, START, LanguageModel
from .text import Vocabulary

_NEVER = -np.inf


@dataclass(frozen=True)
class Decoded:
    """The characters of an utterance.

    Attributes:
        ids: of the characters.
        frames: the frame in which each character began; None after a beam search.
    """

    ids: list[int]
    frames: list[int] | None = None


def greedy(log_probs: Tensor, counts: Tensor, *, blank: int) -> list[Decoded]:
    """Takes the best character of each frame, merges repeats and removes blanks.

    Args:
        log_probs: (B, F, C).
        counts: (B,) valid frames.
        blank: the id of the blank.
    """
    best = log_probs.argmax(dim=-1)
    previous = torch.nn.functional.pad(best[:, :-1], (1, 0), value=-1)
    valid = torch.arange(best.shape[1], device=best.device) < counts[:, None]
    kept = (best != previous) & (best != blank) & valid
    rows, frames = (part.tolist() for part in kept.nonzero(as_tuple=True))
    ids = best[kept].tolist()
    decoded = [Decoded([], []) for _ in range(len(best))]
    for row, frame, i in zip(rows, frames, ids, strict=True):
        decoded[row].ids.append(i)
        decoded[row].frames.append(frame)  # type: ignore[union-attr]
    return decoded


class BeamSearch:
    """Prefix beam search (Hannun et al. 2014) with a word n-gram model at the ends of words.

    A beam is a prefix with two log probabilities: of all its alignments that end in a blank, and of
    all others. All beams are extended by all characters at once. Two of the new prefixes are equal
    only if the extension of one beam is another beam.

    Args:
        vocabulary: of the head.
        config: the number of beams and the weights.
        model: the language model; None for none.
        lowercase: whether words are put into lower case for the language model.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        config: DecodingConfig,
        model: LanguageModel | None = None,
        *,
        lowercase: bool = True,
    ) -> None:
        self.vocabulary, self.config, self.model = vocabulary, config, model
        self.lowercase = lowercase

    def __call__(self, log_probs: Tensor, counts: Tensor) -> list[Decoded]:
        """Returns the best prefix of each utterance.

        Args:
            log_probs: (B, F, C).
            counts: (B,) valid frames.
        """
        values = log_probs.double().cpu().numpy()
        return [self.search(values[row, :count]) for row, count in enumerate(counts.tolist())]

    def search(self, log_probs: np.ndarray) -> Decoded:
        """Returns the best prefix for log probabilities (F, C)."""
        blank, width = self.vocabulary.blank, self.config.beams
        trie = _Trie(self)
        nodes = np.zeros(1, dtype=np.int64)  # of the trie, one for each beam
        ends_blank, ends_not = np.zeros(1), np.full(1, _NEVER)
        for frame in log_probs:
            last, bonus = trie.last[nodes], trie.bonus[nodes]
            total = np.logaddexp(ends_blank, ends_not)
            stay_blank = total + frame[blank]
            stay_not = np.where(last >= 0, ends_not + frame[last], _NEVER)
            extended = total[:, None] + frame[None, :]  # (K, C)
            rows = np.arange(len(nodes))
            repeats = last >= 0
            extended[rows[repeats], last[repeats]] = ends_blank[repeats] + frame[last[repeats]]
            extended[:, blank] = _NEVER
            self._merge(nodes, last, trie, stay_not, extended)
            gains = bonus[:, None] + trie.gains(nodes, frame)
            scores = np.concatenate(
                [np.logaddexp(stay_blank, stay_not) + bonus, (extended + gains).ravel()]
            )
            best = np.argpartition(-scores, min(width, len(scores)) - 1)[:width]
            best = best[np.isfinite(scores[best])]
            stays = best[best < len(nodes)]
            parents, characters = np.divmod(best[best >= len(nodes)] - len(nodes), len(frame))
            ends_blank = np.concatenate([stay_blank[stays], np.full(len(parents), _NEVER)])
            ends_not = np.concatenate([stay_not[stays], extended[parents, characters]])
            children = trie.children(nodes[parents], characters, gains[parents, characters])
            nodes = np.concatenate([nodes[stays], children])
        scores = np.logaddexp(ends_blank, ends_not) + trie.bonus[nodes] + trie.endings(nodes)
        return Decoded(trie.prefix(int(nodes[int(np.argmax(scores))])))

    @staticmethod
    def _merge(
        nodes: np.ndarray,
        last: np.ndarray,
        trie: _Trie,
        stay_not: np.ndarray,
        extended: np.ndarray,
    ) -> None:
        """Adds each extension that is a beam already to that beam, and removes the extension.

        Args:
            nodes: (K,) of the beams.
            last: (K,) last character of each beam.
            trie: of the prefixes.
            stay_not: (K,) log probabilities of the beams that do not end in a blank; changed.
            extended: (K, C) log probabilities of the extensions; changed.
        """
        parent_of, beam = np.nonzero(nodes[:, None] == trie.parent[nodes][None, :])
        stay_not[beam] = np.logaddexp(stay_not[beam], extended[parent_of, last[beam]])
        extended[parent_of, last[beam]] = _NEVER


class _Trie:
    """Prefixes as nodes.

    Attributes:
        parent: of each node; -1 for the root.
        last: the last character of each node; -1 for the root.
        bonus: the language model's part of each node's score so far.
    """

    def __init__(self, search: BeamSearch) -> None:
        self.search = search
        self.delimiter = search.vocabulary.delimiter
        self.parent = np.full(1, -1, dtype=np.int64)
        self.last = np.full(1, -1, dtype=np.int64)
        self.bonus = np.zeros(1)
        self._ends: dict[int, float] = {}
        self._known: dict[tuple[int, int], int] = {}

    def children(
        self, parents: np.ndarray, characters: np.ndarray, bonus: np.ndarray
    ) -> np.ndarray:
        """Returns the nodes below `parents`. A prefix that was dropped keeps its node."""
        nodes = []
        start = len(self.parent)
        fresh: list[int] = []
        for i, key in enumerate(zip(parents.tolist(), characters.tolist(), strict=True)):
            if key not in self._known:
                self._known[key] = start + len(fresh)
                fresh.append(i)
            nodes.append(self._known[key])
        self.parent = np.concatenate([self.parent, parents[fresh]])
        self.last = np.concatenate([self.last, characters[fresh]])
        self.bonus = np.concatenate([self.bonus, bonus[fresh]])
        return np.array(nodes, dtype=np.int64)

    def prefix(self, node: int) -> list[int]:
        """Returns the characters of a node, the first one first."""
        ids = []
        while node > 0:
            ids.append(int(self.last[node]))
            node = int(self.parent[node])
        return ids[::-1]

    def gains(self, nodes: np.ndarray, frame: np.ndarray) -> np.ndarray:
        """Returns the language model's score (K, C) of words that a character ends, else 0."""
        gains = np.zeros((len(nodes), len(frame)))
        if self.search.model is not None and self.delimiter is not None:
            gains[:, self.delimiter] = [self._ending(node) for node in nodes.tolist()]
        return gains

    def endings(self, nodes: np.ndarray) -> np.ndarray:
        """Returns the language model's score (K,) of the utterance's end."""
        if self.search.model is None:
            return np.zeros(len(nodes))
        return np.array([self._ending(node) + self._sentence(node) for node in nodes.tolist()])

    def _words(self, node: int) -> list[str]:
        text = self.search.vocabulary.decode(self.prefix(node), lowercase=self.search.lowercase)
        return text.split()

    def _ending(self, node: int) -> float:
        """Returns the score of the last word, or 0 if the word has ended before."""
        if node == 0 or self.last[node] == self.delimiter:
            return 0.0
        if node not in self._ends:
            assert self.search.model is not None
            *before, word = self._words(node) or [""]
            score = self.search.model.score(word, (START, *before)) if word else 0.0
            config = self.search.config
            self._ends[node] = config.alpha * score + config.beta
        return self._ends[node]

    def _sentence(self, node: int) -> float:
        """Returns the score of the sentence's end after the words of a node."""
        assert self.search.model is not None
        score = self.search.model.score(END, (START, *self._words(node)))
        return self.search.config.alpha * score
