"""Labels of rows as numbers of classes, and back."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmadapters.suggest import nearest

from ..core.errors import BadRow
from ..core.rows import Rows
from ..data.cells import listed


@dataclass(frozen=True)
class LabelMap:
    """The classes of a job, in order.

    Attributes:
        names: of the classes.
        coded: the names that a data set has for its integer labels; empty if it has none.
        separator: between the labels of a text; None if a row has one label.
    """

    names: tuple[str, ...]
    coded: tuple[str, ...] = ()
    separator: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "_index", {name: i for i, name in enumerate(self.names)})

    def indices(self, value: Any) -> list[int]:
        """Returns the numbers of the classes of a row's label, rising.

        There is one class, or with a separator any number of classes.

        Raises:
            BadRow: there is no label, or one that the training split does not have.
        """
        index: Mapping[str, int] = self._index  # type: ignore[attr-defined]
        labels = labels_of(value, self.coded, self.separator)
        for label in labels:
            if label not in index:
                hint = nearest(label, self.names)
                raise BadRow(f"its label {label!r} is not a class of the training split{hint}")
        return sorted({index[label] for label in labels})

    def to_state(self) -> dict[str, Any]:
        """Returns the label map in a JSON-ready form."""
        return {
            "names": list(self.names),
            "coded": list(self.coded),
            "separator": self.separator,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> LabelMap:
        """Returns the label map that `to_state` gave."""
        return cls(tuple(state["names"]), tuple(state["coded"]), state["separator"])


def labels_of(value: Any, coded: Sequence[str], separator: str | None) -> list[str]:
    """Returns the class names in a row's label.

    Args:
        value: a text, a number, or with a separator a list of them. An empty text or list is then a
            label without classes.
        coded: as in `LabelMap`.
        separator: as in `LabelMap`.

    Raises:
        BadRow: there is no label.
    """
    if separator is None:
        return [_name(value, coded)]
    several = listed(value)
    if several is not None:
        return [_name(part, coded) for part in several]
    if isinstance(value, str):
        return [part.strip() for part in value.split(separator) if part.strip()]
    return [_name(value, coded)]


def _name(value: Any, coded: Sequence[str]) -> str:
    if hasattr(value, "item"):
        value = value.item()
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        raise BadRow("it has no label")
    if isinstance(value, (list, tuple, dict)):
        raise BadRow(f"its label {value!r} is not one name or number; for several, set multi_label")
    # Integers of a CSV column with gaps are read as floats.
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if coded and isinstance(value, int) and not isinstance(value, bool):
        if not 0 <= value < len(coded):
            raise BadRow(f"its label {value} is out of range: the data set names {len(coded)}")
        return coded[value]
    return str(value).strip()


def fit_labels(
    rows: Rows | None, *, names: Sequence[str], separator: str | None
) -> tuple[LabelMap, list[int]]:
    """Returns the label map of a training split, and the number of rows of each class.

    Args:
        rows: of the training split; None if nothing is trained and the classes are `names`.
        names: the classes, if the config gives them; else empty.
        separator: as in `LabelMap`.

    Raises:
        ValueError: there are fewer classes than a classifier needs, a class is named twice, or no
            row has one of the given classes.
    """
    coded = () if rows is None else coded_names(rows)
    counts: Counter[str] = Counter()
    for value in () if rows is None else rows["label"]:
        try:
            counts.update(set(labels_of(value, coded, separator)))
        except BadRow:
            continue  # the row is reported when it is used
    names = tuple(names) or _ordered(counts, coded)
    least = 1 if separator is not None else 2
    if len(set(names)) < least:
        labels = f"only {names[0]!r}" if names else "no label at all"
        raise ValueError(f"the training split has {labels}; a classifier needs {least} classes")
    if len(set(names)) < len(names):
        raise ValueError("data.labels names a class twice")
    if rows is not None and not any(counts[name] for name in names):
        raise ValueError(
            f"no training row has one of data.labels ({', '.join(names[:3])}, …); there are "
            f"{', '.join(list(counts)[:3]) or 'no labels'}"
        )
    return LabelMap(names, coded, separator), [counts[name] for name in names]


def coded_names(rows: Rows) -> tuple[str, ...]:
    """Returns the names of a `datasets.ClassLabel` column, or of one of lists of such labels."""
    feature = (getattr(rows, "features", None) or {}).get("label")
    feature = getattr(feature, "feature", feature)
    return tuple(getattr(feature, "names", None) or ())


def _ordered(counts: Iterable[str], coded: Sequence[str]) -> tuple[str, ...]:
    """Returns the classes in the data set's own order, else by number if all are numbers, else by
    name."""
    names = list(counts)
    if coded:
        return tuple(name for name in coded if name in set(names))
    if all(_is_number(name) for name in names):
        return tuple(sorted(names, key=float))
    return tuple(sorted(names))


def _is_number(name: str) -> bool:
    try:
        return math.isfinite(float(name))
    except ValueError:
        return False
