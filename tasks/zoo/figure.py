"""A figure of a card next to the value that was measured again, for `mmadapters zoo verify`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class CardFigure:
    """One figure of an encoder's card, recomputed from the shipped weights.

    Attributes:
        name: the measure in the card's words ("WER, en-us, held-out voices").
        expected: the card's value.
        measured: the value measured now; None if it could not be measured here.
        tolerance: how much worse than `expected` the measured value may be; 0 or more.
        higher_is_better: True for an accuracy, False for an error rate.
        note: the data of the measurement, or the reason why there was none.
    """

    name: str
    expected: float
    measured: float | None
    tolerance: float
    higher_is_better: bool
    note: str = ""

    @classmethod
    def of_card(cls, claimed: Mapping[str, Any], measured: float | None, note: str) -> "CardFigure":
        """Builds it from a figure of `config.json` for which greater is better."""
        return cls(
            name=claimed["name"],
            expected=claimed["value"],
            measured=measured,
            tolerance=claimed["tolerance"],
            higher_is_better=True,
            note=note,
        )

    @property
    def holds(self) -> bool | None:
        """Tells whether the measured value holds; None means "not checked" and is no pass."""
        if self.measured is None:
            return None
        worse_by = self.expected - self.measured
        if not self.higher_is_better:
            worse_by = -worse_by
        return worse_by <= self.tolerance
