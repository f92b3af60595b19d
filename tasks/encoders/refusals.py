"""Adapters that would do nothing where a task reads its encoder: refused, in a sentence."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from mmadapters import AdapterModel
from mmadapters.adapters.adapter import Adapter


def refuse_other_towers(encoder: AdapterModel, used: Iterable[str], what: str) -> None:
    """Raises a ValueError for an adapter in a tower that is not among those of `what`."""
    for adapter in _adapters(encoder):
        towers = {site.partition(".")[0] for site, _ in adapter.entries()}
        if others := sorted(towers - set(used)):
            raise ValueError(
                f"the adapter sits in {', '.join(others)} of {type(encoder.backbone).__name__}, "
                f"where {what} never passes: set adapter.sites to {json.dumps(sorted(used))}"
            )


def refuse_unpaired(encoder: AdapterModel, what: str) -> None:
    """Raises a ValueError for an adapter that lets a text look at an image, where `what` encodes
    each by itself."""
    for adapter in _adapters(encoder):
        if "image" in adapter.reads:
            raise ValueError(
                f"adapter.method {adapter.config.method} lets a text look at an image, and {what} "
                "encodes texts without one: take mma or uniadapter, which couple the two towers, "
                "or a method for each (double_seq_bn, lora)"
            )


def _adapters(encoder: AdapterModel) -> Iterator[Adapter]:
    """Those that act, or all where none does."""
    acting = encoder.active_adapters
    for name in encoder.adapter_names if acting is None else acting.names():
        yield encoder.adapter(name)


def refuse_embedding_adapters(encoder: AdapterModel, what: str) -> None:
    """Raises a ValueError for an active adapter behind all blocks, where `what` reads no more."""
    acting = encoder.active_adapters
    behind = {embedding.name for embedding in encoder.sites.embeddings()}
    for name in () if acting is None else acting.names():
        adapter = encoder.adapter(name)
        if found := sorted({site for site, _ in adapter.entries()} & behind):
            raise ValueError(
                f"{what} reads the tokens of the encoder's blocks, so that a "
                f"{adapter.config.method} at {', '.join(found)} would do nothing: compare "
                "embeddings (classification with head.kind zero_shot or tip_adapter, retrieval), "
                "or adapt the blocks"
            )
