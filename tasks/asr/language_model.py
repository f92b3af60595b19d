"""An n-gram model over words from an ARPA file, with back-off."""

from __future__ import annotations

import gzip
import math
import re
import zlib
from collections import Counter
from pathlib import Path

START, END, UNKNOWN = "<s>", "</s>", "<unk>"
_LN10 = math.log(10.0)
_FLOOR = -99.0 * _LN10  # what ARPA files write for an impossible word


_DECLARED = re.compile(r"ngram\s+(\d+)\s*=\s*(\d+)")


class LanguageModel:
    """log p(word | the words before it), natural logarithms.

    Source: the ARPA format of CMU's and SRI's toolkits; Katz 1987 for the back-off.
    """

    def __init__(self, table: dict[tuple[str, ...], tuple[float, float]], order: int) -> None:
        self.table, self.order = table, order

    @classmethod
    def read(cls, path: str | Path, *, lowercase: bool = False) -> LanguageModel:
        """From an ARPA file, plain or .gz.

        Args:
            lowercase: its words are read in lower case; of n-grams that become one, the likeliest
                stays.

        Raises:
            ValueError: the file is not one, or not all of one; names the line.
        """
        path = Path(path)
        table: dict[tuple[str, ...], tuple[float, float]] = {}
        declared: dict[int, int] = {}
        found: Counter[int] = Counter()
        order, ended = 0, False
        for number, line in enumerate(_lines(path), start=1):
            line = line.strip()
            if line.startswith("\\") and line.endswith("-grams:"):
                order = int(line[1:].partition("-")[0])
            elif line == "\\end\\":
                ended = True
                break
            elif order == 0 and (said := _DECLARED.fullmatch(line)):
                declared[int(said[1])] = int(said[2])
            elif order and line:
                gram = _gram(line.split(), order, lowercase=lowercase)
                if gram is None:
                    raise ValueError(f"{path}:{number} is no {order}-gram of an ARPA file")
                words, values = gram
                table[words] = max(values, table.get(words, values))
                found[order] += 1
        if not declared:
            raise ValueError(f"{path} is no ARPA file: it declares no n-grams")
        short = [
            f"{found[n]} of {count} {n}-grams" for n, count in declared.items() if found[n] != count
        ]
        if short or not ended:
            raise ValueError(f"{path} is cut off: it holds {', '.join(short) or 'no end'}")
        return cls(table, max(declared))

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


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f"there is no language model {str(path)!r}")
    try:
        data = path.read_bytes()
        return (
            (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8").splitlines()
        )
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no ARPA file that can be read: {error}") from None


def _gram(
    fields: list[str], order: int, *, lowercase: bool
) -> tuple[tuple[str, ...], tuple[float, float]] | None:
    """The words of a line and its ln probability and back-off weight; None where it is not one."""
    if len(fields) not in (order + 1, order + 2):
        return None
    try:
        probability = max(float(fields[0]) * _LN10, _FLOOR)
        backoff = float(fields[order + 1]) * _LN10 if len(fields) > order + 1 else 0.0
    except ValueError:
        return None
    if math.isnan(probability + backoff):
        return None
    # <s>, </s> and <UNK> are in lower case wherever they are looked up.
    words = (w.lower() if lowercase or w.startswith("<") else w for w in fields[1 : order + 1])
    return tuple(words), (probability, backoff)
