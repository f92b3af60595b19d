"""Data sets of the Hugging Face hub, read whole (through its cache) or as a stream."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..config.schema import DataConfig
from .parts import Parts, Piece

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def hub_parts(config: DataConfig) -> Parts:
    """Every split of a hub data set. What one load prepares is all of its splits."""
    found: Mapping[str, Dataset] = _load(config, streaming=False)
    return {
        str(name): [Piece(lambda dataset=dataset: dataset, None)]  # type: ignore[misc]
        for name, dataset in found.items()
    }


def hub_streams(config: DataConfig) -> dict[str, IterableDataset]:
    """Every split as a stream, its media undecoded."""
    found: Mapping[str, IterableDataset] = _load(config, streaming=True)
    return {str(name): dataset.decode(False) for name, dataset in found.items()}


def _load(config: DataConfig, *, streaming: bool) -> Mapping:
    """
    Raises:
        ValueError: it is not there, not reachable, or cannot be read; in one sentence.
    """
    import datasets
    from datasets.exceptions import DatasetGenerationError

    if not NAME.fullmatch(config.source):
        raise ValueError(
            f"data.source: {config.source!r} is neither a local folder or file nor a hub name"
        )
    try:
        return datasets.load_dataset(
            config.source, config.name, revision=config.revision, streaming=streaming
        )
    except Exception as error:  # of datasets, huggingface_hub, fsspec, httpx, and builders
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else None
        lines = str(cause or error).strip().splitlines() or [type(error).__name__]
        # The list of a data set's configurations stands on lines of its own.
        reason = " ".join(line.strip() for line in lines[:3]).rstrip(".")
        raise ValueError(
            f"data.source: {config.source!r} is not a local folder or file, and as a hub data set "
            f"it cannot be read: {reason}"
        ) from None
