"""What a card claims beside what was measured again: the unit `mmadapters zoo verify` reports."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of an encoder's card, recomputed from the weights that ship.

    Attributes:
        name: what is measured, as the card words it ("WER, en-us, held-out voices").
        expected: the card's value.
        measured: the value found now; None when it could not be measured here.
        tolerance: how much worse than `expected` the measured value may be and still hold.
        higher_is_better: True for an accuracy, False for an error rate.
        note: why it was not measured, or on what it was.
    """

    name: str
    expected: float
    measured: float | None
    tolerance: float
    higher_is_better: bool
    note: str = ""

    @classmethod
    def of_card(cls, claimed: Mapping[str, Any], measured: float | None, note: str) -> "Figure":
        """Of a figure of `config.json` where greater is better."""
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
        """True or False once measured; None ("not checked") is never a pass."""
        if self.measured is None:
            return None
        worse_by = self.expected - self.measured
        if not self.higher_is_better:
            worse_by = -worse_by
        return worse_by <= self.tolerance
