"""Finds the train, validation and test split among the splits of a source."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from mmadapters.suggest import nearest

from ..config.schema import SPLITS, DataConfig, Split

# The names that data sets give to their splits.
ALIASES: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
SPLIT_COLUMN = "split"  # the column that names the splits of rows, where no setting says another
KNOWN = frozenset(alias for aliases in ALIASES.values() for alias in aliases)


def find_splits(config: DataConfig, names: Sequence[str]) -> dict[Split, tuple[str, ...]]:
    """Returns the source's names of each of our splits that it has; rows of several names are put
    together.

    Args:
        names: the source's names of its splits.

    Raises:
        ValueError: the config names a split that the source does not have; the source has none of
            our splits; or a key of the config names a split that neither exists nor is cut by
            data.fractions, and would have no effect.
    """
    known = {s: (some,) if isinstance(some, str) else some for s, some in config.splits.items()}
    for split, some in known.items():
        if missing := [name for name in some if name not in names]:
            raise ValueError(
                f"data.splits: {split} is {missing[0]!r}, which the data does not have"
                f"{nearest(missing[0], names)}; its splits are {', '.join(names)}"
            )
    given = {name for some in known.values() for name in some}
    by_lower = {name.lower(): name for name in reversed(names) if name not in given}
    for split in SPLITS:
        if split not in known and (aliases := [a for a in ALIASES[split] if a in by_lower]):
            known[split] = (by_lower[aliases[0]],)
    if not known:
        raise ValueError(
            f"data.source: none of its splits {', '.join(names)} is called train, validation or "
            f"test: name them in data.splits, as {{train: {names[0]}}}"
        )
    _check(config, {*known, *config.fractions})
    return known


def check_split_column(config: DataConfig, names: Sequence[str]) -> None:
    """Checks that the splits of a source are named once.

    Args:
        names: the splits that its files have.

    Raises:
        ValueError: data.split_column names them too.
    """
    if len(names) > 1 and config.split_column is not None:
        raise ValueError(f"data.split_column: the data comes in splits already, {', '.join(names)}")


def _check(config: DataConfig, present: Collection[Split]) -> None:
    for setting in ("keep", "drop", "limit"):
        if unknown := [split for split in getattr(config, setting) if split not in present]:
            raise ValueError(
                f"data.{setting} names the split {unknown[0]}, but the data has "
                f"{', '.join(split for split in SPLITS if split in present)}: say its share in "
                f"data.fractions, or its name in data.splits"
            )
