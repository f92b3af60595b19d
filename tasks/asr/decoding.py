"""From CTC's log probabilities to characters: greedy, and a prefix beam search.

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
    """Character ids of an utterance, and the frame in which each began (greedy decoding only)."""

    ids: list[int]
    frames: list[int] | None = None


def greedy(log_probs: Tensor, counts: Tensor, *, blank: int) -> list[Decoded]:
    """The best character of each frame, repeats merged, blanks dropped.

    Args:
        log_probs: (B, F, C).
        counts: (B,) valid frames.
    """
    best = log_probs.argmax(dim=-1)
    previous = torch.nn.functional.pad(best[:, :-1], (1, 0), value=-1)
    valid = torch.arange(best.shape[1], device=best.device) < counts[:, None]
    kept = (best != previous) & (best != blank) & valid
    rows, frames = (part.tolist() for part in kept.nonzero(as_tuple=True))
    ids = best[kept].tolist()
    found: list[Decoded] = [Decoded([], []) for _ in range(len(best))]
    for row, frame, i in zip(rows, frames, ids, strict=True):
        found[row].ids.append(i)
        found[row].frames.append(frame)  # type: ignore[union-attr]
    return found


class BeamSearch:
    """Prefix beam search (Hannun et al. 2014) with a word n-gram at the ends of words.

    A beam is a prefix with the log probabilities of all its alignments that end in a blank and of
    those that do not. All beams are extended by all characters at once; two of the new prefixes can
    be equal in one way only: the extension of a beam that another beam is already.
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
        """(B, F, C) and (B,) -> the best prefix of each utterance."""
        values = log_probs.double().cpu().numpy()
        return [self.search(values[row, :count]) for row, count in enumerate(counts.tolist())]

    def search(self, log_probs: np.ndarray) -> Decoded:
        """(F, C) -> the best prefix."""
        blank, width = self.vocabulary.blank, self.config.beams
        trie = _Trie(self)
        nodes = np.zeros(1, dtype=np.int64)  # of the trie, one a beam
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
        """Moves the extensions that are beams already over to those."""
        parent_of, beam = np.nonzero(nodes[:, None] == trie.parent[nodes][None, :])
        stay_not[beam] = np.logaddexp(stay_not[beam], extended[parent_of, last[beam]])
        extended[parent_of, last[beam]] = _NEVER


class _Trie:
    """Prefixes as nodes. `bonus`: what the language model has added to a node's score so far."""

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
        """Nodes below `parents`: a prefix that was dropped and comes back is the node it was."""
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
        ids = []
        while node > 0:
            ids.append(int(self.last[node]))
            node = int(self.parent[node])
        return ids[::-1]

    def gains(self, nodes: np.ndarray, frame: np.ndarray) -> np.ndarray:
        """(K, C): what the language model adds where a character ends a word."""
        gains = np.zeros((len(nodes), len(frame)))
        if self.search.model is not None and self.delimiter is not None:
            gains[:, self.delimiter] = [self._ending(node) for node in nodes.tolist()]
        return gains

    def endings(self, nodes: np.ndarray) -> np.ndarray:
        """(K,): what it adds where the utterance ends."""
        if self.search.model is None:
            return np.zeros(len(nodes))
        return np.array([self._ending(node) + self._sentence(node) for node in nodes.tolist()])

    def _words(self, node: int) -> list[str]:
        text = self.search.vocabulary.decode(self.prefix(node), lowercase=self.search.lowercase)
        return text.split()

    def _ending(self, node: int) -> float:
        """The last word's score; nothing where a word has ended already."""
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
        assert self.search.model is not None
        score = self.search.model.score(END, (START, *self._words(node)))
        return self.search.config.alpha * score
