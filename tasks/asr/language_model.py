"""An n-gram model over words from an ARPA file, with back-off."""

from __future__ import annotations

import gzip
import math
import re
import zlib
from collections import Counter
from pathlib import Path

from .text import lower

START, END, UNKNOWN = "<s>", "</s>", "<unk>"
_LN10 = math.log(10.0)
_FLOOR = -99.0 * _LN10  # ARPA files write -99 for an impossible word


_DECLARED = re.compile(r"ngram\s+(\d+)\s*=\s*(\d+)")


class LanguageModel:
    """log p(word | the words before it), in natural logarithms.

    Source: the ARPA format of CMU's and SRI's toolkits; Katz 1987 for the back-off.

    Args:
        table: n-gram -> its ln probability and the ln of its back-off weight.
        order: the number of words of the longest n-grams.
    """

    def __init__(self, table: dict[tuple[str, ...], tuple[float, float]], order: int) -> None:
        self.table, self.order = table, order

    @classmethod
    def read(
        cls, path: str | Path, *, lowercase: bool = False, language: str | None = None
    ) -> LanguageModel:
        """Reads a model from an ARPA file, plain or .gz.

        Args:
            path: of the file.
            lowercase: whether words are put into lower case. Of n-grams that become the same, the
                likeliest stays.
            language: the language whose rules of case hold.

        Raises:
            ValueError: the file is missing, is no ARPA file or is cut off. The message names a line
                that cannot be read.
        """
        path = Path(path)
        table: dict[tuple[str, ...], tuple[float, float]] = {}
        declared: dict[int, int] = {}
        read: Counter[int] = Counter()
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
                # <s>, </s> and <UNK> are in lower case wherever they are looked up.
                fields = [
                    lower(word, None if word.startswith("<") else language)
                    if lowercase or word.startswith("<")
                    else word
                    for word in line.split()
                ]
                gram = _gram(fields, order)
                if gram is None:
                    raise ValueError(f"{path}:{number} is no {order}-gram of an ARPA file")
                words, values = gram
                table[words] = max(values, table.get(words, values))
                read[order] += 1
        if not declared:
            raise ValueError(f"{path} is no ARPA file: it declares no n-grams")
        short = [
            f"{read[n]} of {count} {n}-grams" for n, count in declared.items() if read[n] != count
        ]
        if short or not ended:
            raise ValueError(f"{path} is cut off: it holds {', '.join(short) or 'no end'}")
        return cls(table, max(declared))

    def score(self, word: str, history: tuple[str, ...]) -> float:
        """Returns ln p(word | history). A word that is not in the model counts as <unk>."""
        if (word,) not in self.table:
            word = UNKNOWN
        history = tuple(w if (w,) in self.table else UNKNOWN for w in history)
        history = history[max(len(history) - self.order + 1, 0) :]
        backed = 0.0
        while True:
            values = self.table.get((*history, word))
            if values is not None:
                return backed + values[0]
            if not history:
                return backed + _FLOOR
            backed += self.table.get(history, (0.0, 0.0))[1]
            history = history[1:]


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f"there is no language model {str(path)!r}")
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no ARPA file that can be read: {error}") from None
    return text.replace("\r\n", "\n").split("\n")  # words may hold what `splitlines` cuts at


def _gram(fields: list[str], order: int) -> tuple[tuple[str, ...], tuple[float, float]] | None:
    """Returns the words of a line with its ln probability and ln back-off weight.

    Returns:
        None if the line is no n-gram of this order.
    """
    if len(fields) not in (order + 1, order + 2):
        return None
    try:
        probability = max(float(fields[0]) * _LN10, _FLOOR)
        backoff = float(fields[order + 1]) * _LN10 if len(fields) > order + 1 else 0.0
    except ValueError:
        return None
    if math.isnan(probability + backoff):
        return None
    return tuple(fields[1 : order + 1]), (probability, backoff)
