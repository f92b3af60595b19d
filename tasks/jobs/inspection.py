"""Lists the sites of an encoder with their shapes, and the cost of each method at them.

Each method is built with its defaults and thrown away. Nothing is inserted, so the self-check of
`add_adapter`, which runs the encoder, is not part of this.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save
from torch import nn

import mmadapters
from mmadapters.adapters.adapter import Adapter
from mmadapters.adapters.merging import merged_tensors
from mmadapters.methods import METHODS, AdapterModule, MethodConfig
from mmadapters.sites.sitemap import Embedding, FrontLayer, Leaf, SiteMap, Sublayer, Tower

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class SiteRow:
    """A canonical site.

    Attributes:
        name: its name.
        kind: attn, ffn or cross for a sublayer; linear or norm for a leaf; conv for a layer of a
            convolutional front end; embedding for the output of a tower in the shared space.
        inputs: the width of the input (…, inputs), or its channels for conv.
        outputs: the width of the output (…, outputs), or its channels for conv.
        parameters: the weight and bias of a leaf or layer, or all leaves of a sublayer.
    """

    name: str
    kind: str
    inputs: int
    outputs: int
    parameters: int


@dataclass(frozen=True)
class InspectedTower:
    """A tower of the encoder, which is a stack of blocks.

    Attributes:
        name: its name.
        depth: the number of blocks.
        width: the width of the hidden states.
        parameters: those of the blocks and the final norm, without patch and position embeddings.
        prompts: why no tokens can be appended to its input; None if they can.
        sites: its sites.
    """

    name: str
    depth: int
    width: int
    parameters: int
    prompts: str | None
    sites: list[SiteRow]


@dataclass(frozen=True)
class MethodRow:
    """A method with its default options, at all sites that it adapts.

    Attributes:
        method: its name.
        problem: why it cannot be used with this encoder; all further fields are then unset.
        sites: the number of its sites.
        parameters: the number of its parameters.
        share: its parameters over those of the encoder.
        fp32_bytes: the size of its tensors in a safetensors file in fp32.
        fp16_bytes: the same in fp16.
        identity: whether a fresh adapter leaves all outputs unchanged.
        mergeable: True if it can be merged into the weights, otherwise why not.
    """

    method: str
    problem: str | None = None
    sites: int = 0
    parameters: int = 0
    share: float = 0.0
    fp32_bytes: int = 0
    fp16_bytes: int = 0
    identity: bool = True
    mergeable: bool | str = False


@dataclass(frozen=True)
class Inspection:
    """An inspected encoder.

    Attributes:
        backbone: its name, as `load_backbone` takes it.
        library: the library that it comes from.
        architecture: its architecture.
        parameters: the parameters of the whole encoder.
        towers: its towers.
        methods: the methods.
    """

    backbone: str
    library: str
    architecture: str
    parameters: int
    towers: list[InspectedTower]
    methods: list[MethodRow]

    def as_dict(self) -> dict[str, Any]:
        """Returns all fields, JSON-ready."""
        return asdict(self)


def inspect(
    backbone_name: str,
    *,
    pretrained: bool | str = False,
    weights: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
) -> Inspection:
    """Inspects an encoder: its sites and the cost of every method.

    Args:
        backbone_name: as `load_backbone` takes it.
        pretrained: as `load_backbone` takes it; shapes need no pretrained weights.
        weights: as `load_backbone` takes it.
        options: further arguments of `load_backbone`.

    Raises:
        ValueError: the encoder is unknown, or its sites are not known.
        RuntimeError: see `load_backbone`.
    """
    backbone = mmadapters.load_backbone(
        backbone_name, pretrained=pretrained, weights=weights, **(options or {})
    )
    sites = mmadapters.init(backbone).sites
    total = _count(backbone.parameters())
    return Inspection(
        backbone=backbone_name,
        library=sites.library,
        architecture=sites.architecture,
        parameters=total,
        towers=[_tower_row(tower) for tower in sites.towers.values()],
        methods=[_method_row(name, config, sites, total) for name, config in METHODS.items()],
    )


def _count(parameters: Iterable[torch.Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _tower_row(tower: Tower) -> InspectedTower:
    parts = [block.module for block in tower.blocks]
    parameters = _count(nn.ModuleList(parts).parameters())
    sites = [_front_row(layer) for layer in tower.front]
    for block in tower.blocks:
        for sublayer in block.sublayers.values():
            sites.append(_sublayer_row(sublayer))
            sites += map(_leaf_row, sublayer.leaves.values())
    if tower.norm is not None:
        sites.append(_leaf_row(tower.norm))
        parameters += sites[-1].parameters
    if tower.embedding is not None:
        sites.append(_embedding_row(tower.embedding))
    return InspectedTower(tower.name, len(parts), tower.width, parameters, tower.prompts, sites)


def _front_row(layer: FrontLayer) -> SiteRow:
    conv = next(part for part in layer.module.modules() if isinstance(part, nn.Conv1d))
    parameters = _count(layer.module.parameters())
    return SiteRow(layer.name, "conv", conv.in_channels, layer.width, parameters)


def _embedding_row(embedding: Embedding) -> SiteRow:
    return SiteRow(embedding.name, "embedding", embedding.width, embedding.width, 0)


def _sublayer_row(sublayer: Sublayer) -> SiteRow:
    parameters = sum(_leaf_row(leaf).parameters for leaf in sublayer.leaves.values())
    return SiteRow(sublayer.name, sublayer.kind, sublayer.width, sublayer.width, parameters)


def _leaf_row(leaf: Leaf) -> SiteRow:
    tensors = [tensor for tensor in (leaf.weight, leaf.bias) if tensor is not None]
    return SiteRow(leaf.name, leaf.kind, leaf.in_features, leaf.out_features, _count(tensors))


def _method_row(
    name: str, config_class: type[MethodConfig], sites: SiteMap, total: int
) -> MethodRow:
    try:
        config = config_class()
        parts = _parts(config, sites)
    except ValueError as error:
        return MethodRow(name, problem=str(error))
    adapter = Adapter(config, parts)
    parameters = _count(adapter.parameters())
    tensors = {key: tensor.detach() for key, tensor in adapter.tensors().items()}
    return MethodRow(
        name,
        sites=len({site for site, _ in adapter.entries()}),
        parameters=parameters,
        share=parameters / total,
        fp32_bytes=len(save({key: t.float().contiguous() for key, t in tensors.items()})),
        fp16_bytes=len(save({key: t.half().contiguous() for key, t in tensors.items()})),
        identity=config.identity,
        mergeable=_mergeable(config, parts, sites),
    )


def _parts(config: MethodConfig, sites: SiteMap) -> dict[str, AdapterModule]:
    return {
        f"{site}#{key}": module
        for key, part in config.parts()
        for site, module in part.build(sites).items()
    }


def _mergeable(
    config: MethodConfig, parts: Mapping[str, AdapterModule], sites: SiteMap
) -> bool | str:
    """Returns True if the method can be merged at every one of its sites, otherwise why not."""
    if config.mergeable is not True:
        return config.mergeable
    for key, module in parts.items():
        try:
            # One site at a time, as all at once would copy the weights of the whole encoder.
            merged_tensors("it", Adapter(config, {key: module}), sites)
        except ValueError as error:
            return str(error).removeprefix("adapter 'it' cannot be merged: ")
    return True


def print_inspection(inspection: Inspection, console: Console) -> None:
    """Prints tables of the sites of each tower and of the methods."""
    from rich.table import Table

    words = (
        f"{inspection.backbone}: {inspection.architecture} of {inspection.library}, "
        f"{inspection.parameters:,} parameters"
    )
    console.print(words, style="bold", markup=False, highlight=False)
    for tower in inspection.towers:
        table = Table("site", "kind", "in → out", "parameters", title_justify="left")
        table.title = (
            f"{tower.name}: {tower.depth} blocks of width {tower.width}, "
            f"{tower.parameters:,} parameters"
        )
        table.columns[0].no_wrap = True
        table.columns[2].justify = table.columns[3].justify = "right"
        for row in _collapsed(tower.sites):
            leaf = row.kind in ("linear", "norm")
            cells = (row.name, row.kind, f"{row.inputs} → {row.outputs}", f"{row.parameters:,}")
            table.add_row(*cells, style="" if leaf else "bold")
        console.print(table)
    console.print(_method_table(inspection.methods, notes := Notes()))
    for number, note in enumerate(notes.texts, start=1):
        console.print(f"({number}) {note}", style="dim", markup=False, highlight=False)


class Notes:
    """Numbered sentences below a table; equal sentences have one number."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def number(self, text: str) -> int:
        """Returns the number of a sentence, which is added if it is new."""
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text) + 1


def _method_table(rows: Iterable[MethodRow], notes: Notes) -> Any:
    from rich.table import Table

    table = Table(
        *("method", "sites", "parameters", "share", "file", "merges"),
        title="Methods with their defaults; files in fp32, in fp16 half as large",
        title_justify="left",
        padding=(0, 0, 0, 1),  # with this padding the longest names and numbers just fit 80 columns
    )
    for number, column in enumerate(table.columns):
        column.no_wrap = True
        column.justify = "right" if 0 < number < 5 else "left"
    for row in rows:
        if row.problem is not None:
            table.add_row(row.method, f"none ({notes.number(row.problem)})", style="dim")
            continue
        merges = "yes" if row.mergeable is True else f"no ({notes.number(str(row.mergeable))})"
        table.add_row(
            *(row.method, f"{row.sites}", f"{row.parameters:,}", f"{100 * row.share:.2f} %"),
            *(_size(row.fp32_bytes), merges),
        )
    return table


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def _collapsed(sites: Iterable[SiteRow]) -> list[SiteRow]:
    """Joins sites that differ only in the number of their block or layer into one row.

    The name of the row holds the numbers in brackets.
    """
    alike: dict[tuple, list[int]] = {}
    for site in sites:
        match = re.search(r"(?<=\.blocks\.)\d+(?=\.)|(?<=\.front\.)\d+$", site.name)
        pattern = site.name
        if match is not None:
            pattern = f"{site.name[: match.start()]}{{}}{site.name[match.end() :]}"
        key = (pattern, site.kind, site.inputs, site.outputs, site.parameters)
        alike.setdefault(key, []).extend([] if match is None else [int(match[0])])
    return [
        SiteRow(pattern.replace("{}", _ranges(numbers)), *rest)
        for (pattern, *rest), numbers in alike.items()
    ]


def _ranges(numbers: list[int]) -> str:
    """Returns numbers as text with ranges: `[0-3, 5]` for 0, 1, 2, 3, 5; `4` for 4 alone."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    some = [f"{first}" if first == last else f"{first}-{last}" for first, last in runs]
    return ", ".join(some) if len(numbers) == 1 else f"[{', '.join(some)}]"
