"""Data sets of the Hugging Face hub, read as a whole (through its cache) or as a stream."""

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
    """Returns every split of a hub data set; loading one prepares all of them."""
    splits: Mapping[str, Dataset] = _load(config, streaming=False)
    return {
        str(name): [Piece(lambda dataset=dataset: dataset, None)]  # type: ignore[misc]
        for name, dataset in splits.items()
    }


def hub_streams(config: DataConfig) -> dict[str, IterableDataset]:
    """Returns every split as a stream with undecoded media."""
    splits: Mapping[str, IterableDataset] = _load(config, streaming=True)
    return {str(name): dataset.decode(False) for name, dataset in splits.items()}


def _load(config: DataConfig, *, streaming: bool) -> Mapping:
    """Loads a hub data set.

    Raises:
        ValueError: the data set does not exist, is not reachable or cannot be read.
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
    except Exception as error:  # each library below raises its own
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else None
        lines = str(cause or error).strip().splitlines() or [type(error).__name__]
        # A list of the data set's configurations follows on separate lines.
        reason = " ".join(line.strip() for line in lines[:3]).rstrip(".")
        raise ValueError(
            f"data.source: {config.source!r} is not a local folder or file, and as a hub data set "
            f"it cannot be read: {reason}"
        ) from None
