"""The command `mmadapters bench`: defaults of each device, progress and output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..reports.console import bar, plain
from .cases import Settings

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "cpu": {
        "encoders": ("vit-s16", "wav2vec2-base"),
        "precision": "fp32",
        "batches": (1, 8),
        "train_batch": 4,
    },
    "cuda": {
        "encoders": ("vit-s16", "vit-b16", "vit-l16", "wav2vec2-base", "clip-b32"),
        "precision": "bf16",
        "batches": (1, 32, 256),
        "train_batch": 64,
    },
}


def listed(text: str | None) -> list[str]:
    """Splits "a,b" into its parts."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def settings(
    *,
    encoders: Sequence[str],
    device: str | None,
    precision: str | None,
    batches: str | None,
    train_batch: int | None,
    starts: Sequence[str],
    peers: Sequence[str],
    **rest: Any,
) -> Settings:
    """Makes settings of the options; missing ones take the default of the device.

    Args:
        batches: numbers, as "1,32".
        rest: further fields of `Settings`.

    Raises:
        ValueError: an option has a wrong value.
    """
    device = device or _default_device()
    default = DEFAULTS.get(device.partition(":")[0], DEFAULTS["cpu"])
    return Settings(
        encoders=tuple(dict.fromkeys(encoders)) or default["encoders"],
        device=device,
        precision=precision or default["precision"],
        batches=default["batches"] if batches is None else _numbers(batches),
        train_batch=default["train_batch"] if train_batch is None else train_batch,
        starts=tuple(dict.fromkeys(starts)),
        peers=tuple(peers),
        **rest,
    )


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(part) for part in listed(text)))
    except ValueError:
        raise ValueError(f"--batches is a list of numbers like 1,32,256, not {text!r}") from None


def run(asked: Settings, out: Path, *, quiet: bool) -> bool:
    """Measures, writes and prints; returns whether all measured figures hold.

    Args:
        out: folder of the report.
        quiet: print no progress.

    Raises:
        ValueError, RuntimeError: see `run.measure`.
    """
    from .checks import checks
    from .report import show, write_report
    from .run import measure

    errors = Console(stderr=True)
    told = ""
    with bar("measuring", 1) as progress:

        def tell(what: str, done: int, of: int) -> None:
            nonlocal told
            progress(done, of)
            encoder = what.partition(":")[0]
            if not quiet and encoder != told:
                told = encoder
                errors.print(f"{plain(encoder)}: {done} of {of} turns done", highlight=False)

        bench = measure(asked, tell=tell)
        progress(1, 1)
    write_report(bench, out)
    show(bench, Console())
    Console().print(f"Report: {out}", soft_wrap=True)
    return all(check.holds is not False for check in checks(bench))
