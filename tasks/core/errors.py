"""Rows and inputs that cannot be used, and the errors of runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal


class BadRow(ValueError):
    """A row cannot be used. The message says what is wrong with it, not where it is."""


@dataclass(frozen=True)
class Problem:
    """A problem of a row: the row's number in its split, and the reason."""

    index: int
    reason: str


class AlreadyFinished(ValueError):
    """A run is to be resumed that is finished. Nothing needs to be done."""


class DataError(ValueError):
    """Rows cannot be used, and the config says that the run ends then."""


def refuse(
    problems: Sequence[Problem], *, on_error: Literal["refuse", "skip"], rows: int | None = None
) -> None:
    """Raises an error for bad rows that the config does not let pass.

    Args:
        problems: the bad rows of a batch or a split; may be empty.
        on_error: `data.on_error` of the config, "skip" or "refuse".
        rows: the number of rows of the split, if `problems` holds all bad rows of it.

    Raises:
        DataError: there are problems, and `on_error` is "refuse" or no row of the split is good.
    """
    if not problems:
        return
    first = problems[0]
    reason = f"row {first.index} cannot be used: {first.reason}"
    others = len({problem.index for problem in problems}) - 1
    if others:
        reason += f" (and {others} more)"
    if on_error == "refuse":
        raise DataError(
            f"{reason}; mend it, or set data.on_error: skip; `mmadapters doctor` lists all"
        )
    if rows is not None and others + 1 == rows:
        raise DataError(f"no row of the split can be used: {reason}; `mmadapters doctor` lists all")


class BadInputs(ValueError):
    """Inputs of `predict` cannot be used; the message names each of them.

    Attributes:
        reasons: a sentence for each of them, with its name.
    """

    def __init__(self, reasons: Sequence[str]) -> None:
        self.reasons = list(reasons)
        count = f"{len(reasons)} inputs cannot be used:"
        super().__init__(reasons[0] if len(reasons) == 1 else "\n".join((count, *reasons)))


class InputErrors:
    """Collects the inputs of `predict` that cannot be used, so that the others can.

    Args:
        tell: is called with the name of such an input and the reason, as soon as it is met.

    Attributes:
        reasons: a sentence for each of them, with its name.
    """

    def __init__(self, tell: Callable[[str, str], None] = lambda name, reason: None) -> None:
        self.reasons: list[str] = []
        self._tell = tell

    @contextmanager
    def guarded(self, name: str, start: str = "") -> Iterator[None]:
        """Records the error of the block if it says that an input cannot be used.

        Args:
            name: the input.
            start: what stands before the reason of a `BadRow`, such as "a.png: ". The messages of
                other ValueErrors name their input themselves.
        """
        try:
            yield
        except BadRow as error:
            self.add(name, str(error), f"{start}{error}")
        except ValueError as error:
            self.add(name, str(error), str(error))

    def add(self, name: str, reason: str, sentence: str) -> None:
        """Records an input that cannot be used.

        Args:
            name: the input.
            reason: why it cannot be used.
            sentence: the reason with the name of the input.
        """
        self.reasons.append(sentence)
        self._tell(name, reason)

    def end(self) -> None:
        """Raises an error that names the inputs that could not be used, if there are any.

        Raises:
            BadInputs: there are some.
        """
        if self.reasons:
            raise BadInputs(self.reasons)
