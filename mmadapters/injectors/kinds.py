"""The table of hook kinds: which hooks a kind puts on which modules, and which kinds a plan needs.

A new kind is a new row of `KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import nn

from ..sites.sitemap import Block, Embedding, FrontLayer, Leaf, SiteMap, Sublayer, Tower
from .block_inputs import CaptureHook, ForgetHook, GridHook, MaskHook
from .cross_attention import BlockHook, ImageHook
from .hooks import BranchHook, EnterHook, ForwardHook, LeafHook
from .plan import Kind, Plan
from .raw_weights import adapt_attention, adapt_leaf
from .state import State
from .streams.copies import CopyHook
from .streams.prompts import PromptedBlock
from .streams.readouts import CollectHook, EntryHook, ReadoutHook, SideHook, StartHook
from .streams.whole_calls import whole_calls


class HookKey(NamedTuple):
    """Identifies the hooks of one kind at one site.

    Attributes:
        kind: a key of `KINDS`.
        site: a canonical name.
        detail: as the kind's row says.
    """

    kind: str
    site: str
    detail: str = ""


class Removable(Protocol):
    """A handle of a hook or of a replaced class."""

    def remove(self) -> None:
        """Takes it off its modules."""


class SiteIndex:
    """The towers, blocks, sublayers, leaves and points of a `SiteMap` by their canonical names."""

    def __init__(self, sites: SiteMap, backbone: nn.Module) -> None:
        self.library, self.backbone = sites.library, backbone
        self.towers = sites.towers
        self.blocks: dict[str, Block] = {block.name: block for block in sites.blocks()}
        self.sublayers: dict[str, Sublayer] = {part.name: part for part in sites.sublayers()}
        self.leaves: dict[str, Leaf] = {leaf.name: leaf for leaf in sites.leaves()}
        self.points: dict[str, FrontLayer | Embedding] = {
            point.name: point for point in sites.points()
        }
        self._towers = {
            name: tower
            for tower in reversed(sites.towers.values())
            for name in (*(block.name for block in tower.blocks), *sublayers_of(tower))
        }
        self._blocks = {
            part.name: block for block in self.blocks.values() for part in block.sublayers.values()
        }
        of_module: dict[int, list[Leaf]] = {}
        for leaf in self.leaves.values():
            of_module.setdefault(id(leaf.module), []).append(leaf)
        self._fused = {
            leaf.name: sorted(parts, key=lambda part: part.index)
            for parts in of_module.values()
            for leaf in parts
        }

    def tower_with_block(self, block: str) -> Tower:
        """Returns the tower to which a block belongs."""
        return self._towers[block]

    def tower_with_sublayer(self, sublayer: str) -> Tower:
        """Returns the tower to which a sublayer belongs."""
        return self._towers[sublayer]

    def block_with_sublayer(self, sublayer: str) -> Block:
        """Returns the block to which a sublayer belongs."""
        return self._blocks[sublayer]

    def fused(self, leaf: str) -> list[Leaf]:
        """Returns the leaves that are parts of the same module, in the order of its output."""
        return self._fused[leaf]


def sublayers_of(tower: Tower) -> tuple[str, ...]:
    """Returns the names of a tower's sublayers."""
    return tuple(part.name for block in tower.blocks for part in block.sublayers.values())


@dataclass(frozen=True)
class Spot:
    """The argument of the functions in `KINDS`: the site of one key, with all that hooks need.

    Attributes:
        state: what the hooks read.
        index: all points of the encoder.
        site: the site of the key.
        detail: the detail of the key.
    """

    state: State
    index: SiteIndex
    site: str
    detail: str

    @property
    def tower(self) -> Tower:
        """The tower that the site names."""
        return self.index.towers[self.site]

    @property
    def block(self) -> Block:
        """The block that the site names."""
        return self.index.blocks[self.site]

    @property
    def block_tower(self) -> Tower:
        """The tower of the block that the site names."""
        return self.index.tower_with_block(self.site)

    @property
    def sublayer(self) -> Sublayer:
        """The sublayer that the site names."""
        return self.index.sublayers[self.site]

    @property
    def leaf(self) -> Leaf:
        """The leaf that the site names."""
        return self.index.leaves[self.site]

    def beside(self, role: str) -> Sublayer | None:
        """Returns sublayer `role` (`attn`, `cross`) of the block to which the site belongs."""
        return self.index.block_with_sublayer(self.site).sublayers.get(role)


@dataclass(frozen=True)
class HookKind:
    """A row of `KINDS`.

    Attributes:
        install: puts the hooks of a spot on its modules, and yields what removes them.
        last: its hooks run after all others of their modules, whichever was there first.
    """

    install: Callable[[Spot], Iterable[Removable]]
    last: bool = False


def _mask(at: Spot) -> Iterator[Removable]:
    # The attention of the block is given the mask. Like all that adapters read, it is read again
    # where the block is checkpointed, unlike the arguments of the block's own call.
    attn = at.beside("attn")
    assert attn is not None
    module = attn.input if attn.attention is None else attn.attention
    yield MaskHook(at.state, at.site).register(module)


def _query(at: Spot) -> Iterator[Removable]:
    attn, cross = at.beside("attn"), at.beside("cross")
    if cross is None:
        return
    # Some calls of a block may leave out its cross-attention: then nothing is captured.
    if attn is not None:
        yield ForgetHook(at.state, (at.site, "query")).register(attn.input)
    yield CaptureHook(at.state, (at.site, "query")).register(cross.residual)


def _attended(at: Spot) -> Iterator[Removable]:
    attn = at.beside("attn")
    if attn is not None:
        yield CaptureHook(at.state, (at.site, "attended")).register(attn.input)


def _grid(at: Spot) -> Iterator[Removable]:
    patches = at.tower.patches
    assert patches is not None
    hook = GridHook(at.state, patches.num_prefix_tokens, sublayers_of(at.tower))
    yield hook.register(patches.module)


def _collected(at: Spot, blocks: Iterable[Block]) -> Iterator[Removable]:
    for block in blocks:
        yield CollectHook(at.state, at.site, block.index).register(block.module)


def _readout(at: Spot) -> Iterator[Removable]:
    runner = at.tower.runner
    assert runner is not None
    yield StartHook(at.state, at.site).register(runner)
    yield from _collected(at, at.tower.blocks)
    yield ReadoutHook(at.state, at.site).register(runner)


def _side(at: Spot) -> Iterator[Removable]:
    blocks = at.block_tower.blocks
    yield EntryHook(at.state, at.site).register(blocks[0].module)
    yield from _collected(at, blocks[:-1])
    yield SideHook(at.state, at.site, blocks[-1].index).register(blocks[-1].module)


def _prompt(at: Spot) -> Iterator[Removable]:
    tower, block = at.block_tower, at.block
    prompted = PromptedBlock(
        block.module,
        at.state,
        site=at.site,
        tower=tower.name,
        index=block.index,
        blocks=tuple(other.name for other in tower.blocks),
    )
    prompted.put()
    yield prompted


def _explicit(at: Spot) -> Iterator[Removable]:
    # A fused encoder layer of torch would read the frozen weight and pass the deltas by. Any hook
    # on the attention keeps it from that.
    assert at.leaf.owner is not None
    yield ForwardHook(at.state).register(at.leaf.owner)


def _attention(at: Spot) -> Iterator[Removable]:
    yield adapt_attention(at.state, at.sublayer)
    if at.sublayer.attention is not None:
        # Any hook keeps nn.TransformerEncoderLayer from going past its attention.
        yield ForwardHook(at.state).register(at.sublayer.attention)


KINDS: dict[str, HookKind] = {
    # Inputs of the branch at a sublayer, besides that sublayer's output.
    "residual": HookKind(
        lambda at: [CaptureHook(at.state, (at.site, "residual")).register(at.sublayer.residual)]
    ),
    "input": HookKind(
        lambda at: [CaptureHook(at.state, (at.site, "input")).register(at.sublayer.input)]
    ),
    "mask": HookKind(_mask),
    "query": HookKind(_query),
    "attended": HookKind(_attended),
    # Inputs of the branches of a whole tower.
    "grid": HookKind(_grid),
    "image": HookKind(
        lambda at: [ImageHook(at.state, at.tower.batch_first).register(at.tower.blocks[-1].module)],
        last=True,
    ),
    # Branches: on the output of a sublayer, of a front layer or embedding, on the input of a block.
    "branch": HookKind(lambda at: [BranchHook(at.state, at.site).register(at.sublayer.output)]),
    "point": HookKind(
        lambda at: [BranchHook(at.state, at.site).register(at.index.points[at.site].module)]
    ),
    "block": HookKind(
        lambda at: [
            BlockHook(at.state, at.site, at.block_tower.batch_first).register(at.block.module)
        ]
    ),
    # Deltas: on the input and the output of a called leaf (all parts of a fused one together), or
    # in the place of a weight that the library reads itself.
    "enter": HookKind(lambda at: [EnterHook(at.state, at.site).register(at.leaf.module)]),
    "leaf": HookKind(
        lambda at: [LeafHook(at.state, at.index.fused(at.site)).register(at.leaf.module)]
    ),
    "raw": HookKind(lambda at: [adapt_leaf(at.state, at.leaf)]),
    # Deltas that equal no single weight, in attention that computes them itself.
    "explicit": HookKind(_explicit),
    # Prefixes.
    "attention": HookKind(_attention),
    # Prompts that enter a block, or come with the tokens from the block before.
    "prompt": HookKind(_prompt),
    # Readouts: on what runs a tower, or on its last block.
    "readout": HookKind(_readout),
    "side": HookKind(_side),
    # Copies of the batch.
    "copy": HookKind(
        lambda at: [
            CopyHook(
                at.state, at.block_tower.name, at.block.index, at.block_tower.crossed
            ).register(at.block.module)
        ]
    ),
    "calls": HookKind(lambda at: whole_calls(at.index.backbone, at.state)),
}


def _for_branch(index: SiteIndex, site: str, module: Any) -> Iterator[HookKey]:
    for read in sorted(getattr(module, "reads", ())):
        if read == "grid":
            yield HookKey("grid", index.tower_with_sublayer(site).name)
        elif read == "image":
            yield HookKey("image", "vision")
        else:
            yield HookKey(read, site)
    if site in index.blocks:
        yield HookKey("block", site)
    else:
        yield HookKey("point" if site in index.points else "branch", site)


def _for_delta(index: SiteIndex, site: str, module: Any) -> Iterator[HookKey]:
    if index.leaves[site].raw:
        yield HookKey("raw", site)
        yield from _for_explicit(index, site, [module])
        return
    if module.scales_input:
        yield HookKey("enter", site)
    yield HookKey("leaf", index.fused(site)[0].name)


def _for_explicit(index: SiteIndex, site: str, deltas: Iterable[Any]) -> Iterator[HookKey]:
    leaf = index.leaves[site]
    computed = leaf.raw and isinstance(leaf.owner, nn.MultiheadAttention)
    if computed and not all(delta.as_weight for delta in deltas):
        yield HookKey("explicit", site)


def _for_prefix(index: SiteIndex, site: str, module: Any) -> Iterator[HookKey]:
    yield HookKey("attention", site)


def _for_prompt(index: SiteIndex, site: str, module: Any) -> Iterator[HookKey]:
    blocks = index.tower_with_block(site).blocks
    first = index.blocks[site].index
    for block in blocks[first : first + 1] if module.replaces else blocks[first:]:
        yield HookKey("prompt", block.name)


def _for_readout(index: SiteIndex, site: str, module: Any) -> Iterator[HookKey]:
    yield HookKey("readout" if site in index.towers else "side", site)


_NEEDED: dict[Kind, Callable[[SiteIndex, str, Any], Iterator[HookKey]]] = {
    "branch": _for_branch,
    "delta": _for_delta,
    "prefix": _for_prefix,
    "prompt": _for_prompt,
    "readout": _for_readout,
}


def needed(index: SiteIndex, kind: Kind, site: str, module: nn.Module) -> Iterator[HookKey]:
    """Yields the keys of all hooks that `module` needs to act as `kind` at `site`."""
    yield from _NEEDED[kind](index, site, module)


def composed(index: SiteIndex, plan: Plan) -> Iterator[HookKey]:
    """Yields the keys of all hooks that a composed plan needs beyond those of its members."""
    if plan.copies > 1:
        for block in index.blocks:
            yield HookKey("copy", block)
        # The inputs of an encoder that the user has described are unknown.
        if index.library != "custom":
            yield HookKey("calls", "")
    for site, deltas in plan.delta.items():
        yield from _for_explicit(index, site, deltas)
