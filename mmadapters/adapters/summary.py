"""The table that `AdapterModel.adapter_summary` prints."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AdapterRow:
    """One line of `adapter_summary`."""

    name: str
    # The name of its method, such as "lora".
    method: str
    # The number of sites at which it acts.
    sites: int
    # The number of its parameters, shared ones included.
    parameters: int
    # Its parameters over those of the encoder, in percent.
    share: float
    # Whether it acts now, whether it is trainable, and whether it is merged into the weights.
    active: bool
    trainable: bool
    merged: bool
    # The other adapters that have parameters in common with this one.
    shares: tuple[str, ...] = ()


def summary_table(architecture: str, base: int, rows: list[AdapterRow], *, total: int) -> str:
    """Returns the adapters as aligned text.

    Args:
        architecture: the name of the encoder.
        base: the number of the encoder's parameters.
        total: the number of parameters of all adapters, shared ones counted once.
    """
    head = ("adapter", "method", "sites", "parameters", "% of backbone", "state")
    lines = [head]
    for row in rows:
        states = [what for what in ("active", "trainable", "merged") if getattr(row, what)]
        if row.shares:
            states.append(f"shares with {', '.join(row.shares)}")
        lines.append(
            (
                row.name,
                row.method,
                str(row.sites),
                f"{row.parameters:,}",
                f"{row.share:.2f}",
                ", ".join(states) or "idle",
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    right = (False, False, True, True, True, False)
    text = [f"{architecture}: {base:,} frozen parameters"]
    for line in lines:
        cells = (
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(line, widths, right, strict=True)
        )
        text.append("  ".join(cells).rstrip())
    if any(row.shares for row in rows):
        text.append(f"{total:,} parameters in all adapters, shared ones counted once")
    return "\n".join(text)
