"""An n-gram model over words from an ARPA file, with back-off."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

START, END, UNKNOWN = "<s>", "</s>", "<unk>"
_LN10 = math.log(10.0)
_FLOOR = -99.0 * _LN10  # what ARPA files write for an impossible word


class LanguageModel:
    """log p(word | the words before it), natural logarithms.

    Source: the ARPA format of CMU's and SRI's toolkits; Katz 1987 for the back-off.
    """

    def __init__(self, table: dict[tuple[str, ...], tuple[float, float]], order: int) -> None:
        self.table, self.order = table, order

    @classmethod
    def read(cls, path: str | Path) -> LanguageModel:
        """From an ARPA file, plain or .gz.

        Raises:
            ValueError: the file is not one; names the line.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"there is no language model {str(path)!r}")
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
        table: dict[tuple[str, ...], tuple[float, float]] = {}
        order = 0
        for number, line in enumerate(text.splitlines(), start=1):
            line = line.strip()
            if line.startswith("\\") and line.endswith("-grams:"):
                order = int(line[1:].partition("-")[0])
                continue
            if not line or line.startswith(("\\", "ngram ")) or order == 0:
                continue
            fields = line.split()
            try:
                if len(fields) not in (order + 1, order + 2):
                    raise ValueError
                backoff = float(fields[order + 1]) if len(fields) > order + 1 else 0.0
                table[tuple(fields[1 : order + 1])] = (
                    max(float(fields[0]) * _LN10, _FLOOR),
                    backoff * _LN10,
                )
            except ValueError:
                raise ValueError(f"{path}:{number} is no {order}-gram of an ARPA file") from None
        if not table:
            raise ValueError(f"{path} is no ARPA file: it has no n-grams")
        return cls(table, order)

    def score(self, word: str, history: tuple[str, ...]) -> float:
        """ln p(word | history); a word that is not in the model is its <unk>."""
        if (word,) not in self.table:
            word = UNKNOWN
        history = tuple(w if (w,) in self.table else UNKNOWN for w in history)
        history = history[max(len(history) - self.order + 1, 0) :]
        backed = 0.0
        while True:
            found = self.table.get((*history, word))
            if found is not None:
                return backed + found[0]
            if not history:
                return backed + _FLOOR
            backed += self.table.get(history, (0.0, 0.0))[1]
            history = history[1:]
