"""Refuses adapters that would have no effect on the outputs that a task reads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from mmadapters import AdapterModel
from mmadapters.adapters.adapter import Adapter


def refuse_other_towers(encoder: AdapterModel, used: Iterable[str], what: str) -> None:
    """Raises a ValueError for an adapter in a tower that `what` does not use.

    Args:
        used: names of the towers that `what` uses.
        what: names the task in the message.
    """
    for adapter in _adapters(encoder):
        towers = {site.partition(".")[0] for site, _ in adapter.entries()}
        if others := sorted(towers - set(used)):
            raise ValueError(
                f"the adapter sits in {', '.join(others)} of {type(encoder.backbone).__name__}, "
                f"which {what} does not use: set adapter.sites to {json.dumps(sorted(used))}"
            )


def refuse_unpaired(encoder: AdapterModel, what: str) -> None:
    """Raises a ValueError for an adapter that reads images in the text tower.

    `what` encodes texts without images.
    """
    for adapter in _adapters(encoder):
        if "image" in adapter.reads:
            raise ValueError(
                f"adapter.method {adapter.config.method} reads the image in the text tower, but "
                f"{what} encodes texts without one: take mma or uniadapter, which couple the two "
                "towers, or a method for each (double_seq_bn, lora)"
            )


def _adapters(encoder: AdapterModel) -> Iterator[Adapter]:
    """Yields the active adapters, or all adapters if none is active."""
    acting = encoder.active_adapters
    for name in encoder.adapter_names if acting is None else acting.names():
        yield encoder.adapter(name)


def refuse_embedding_adapters(encoder: AdapterModel, what: str) -> None:
    """Raises a ValueError for an active adapter after the blocks, which `what` does not read."""
    acting = encoder.active_adapters
    after = {embedding.name for embedding in encoder.sites.embeddings()}
    for name in () if acting is None else acting.names():
        adapter = encoder.adapter(name)
        if sites := sorted({site for site, _ in adapter.entries()} & after):
            raise ValueError(
                f"{what} reads the tokens of the encoder's blocks, so a "
                f"{adapter.config.method} at {', '.join(sites)} would do nothing: compare "
                "embeddings (classification with head.kind zero_shot or tip_adapter, retrieval), "
                "or adapt the blocks"
            )
