"""The named points of a frozen encoder: what injectors find and what methods ask for.

A `SiteMap` holds towers (`vision`, `audio`, `text`, `fusion`, `decoder`); a tower holds blocks in
the order in which they run; a block holds sublayers (`attn`, `ffn`, `cross`); a sublayer holds its
leaves: the linear maps `q k v o` (attention) or `up down` (feed-forward) and its `norm`. The
convolutions that make a speech encoder's frames of samples stand before its blocks: `front`; what
a tower of an image-text encoder gives into the shared space stands behind them: `embedding`.
Canonical names join them by dots: `vision.blocks.3.attn.q`, `audio.front.0`, `vision.embedding`.
Methods and injectors never import each other: they share this file and `acting.py`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..suggest import nearest

SublayerKind = Literal["attn", "cross", "ffn"]
LeafKind = Literal["linear", "norm"]
ATTENTION_LEAVES = ("q", "k", "v", "o")
FFN_LEAVES = ("up", "gate", "down")


@dataclass(eq=False)
class Parameter:
    """Where a frozen tensor lives: rows `start` to `stop` of `module`'s parameter `attribute`."""

    module: nn.Module
    attribute: str
    start: int | None = None
    stop: int | None = None

    @property
    def whole(self) -> Tensor:
        tensor = self.module._parameters[self.attribute]
        assert tensor is not None
        return tensor

    @property
    def tensor(self) -> Tensor:
        """The rows of the frozen tensor that belong to this site; a view, never a copy."""
        return self.whole if self.start is None else self.whole[self.start : self.stop]


@dataclass(eq=False)
class Leaf:
    """One linear map or LayerNorm of a sublayer: y = W x + b, or y = w * norm(x) + b.

    `raw` says that the library reads the weight itself instead of calling the module
    (`in_proj_weight`, `nn.MultiheadAttention.out_proj`): a hook would never fire there.
    `index` and `parts` place the leaf in the output of a fused projection: part `index` of `parts`.
    `owner` is the module whose forward reads a raw weight.
    """

    name: str
    kind: LeafKind
    module: nn.Module
    weight_at: Parameter | None
    bias_at: Parameter | None
    in_features: int
    out_features: int
    raw: bool = False
    index: int = 0
    parts: int = 1
    owner: nn.Module | None = None

    @property
    def role(self) -> str:
        return self.name.rsplit(".", 1)[-1]

    @property
    def weight(self) -> Tensor | None:
        """(out_features, in_features) of a linear map, (features,) of a norm, None without one."""
        return None if self.weight_at is None else self.weight_at.tensor

    @property
    def bias(self) -> Tensor | None:
        """(out_features,), None without one."""
        return None if self.bias_at is None else self.bias_at.tensor

    def like(self) -> dict:
        """dtype and device that an adapter of this leaf must have."""
        reference = self.weight if self.weight is not None else self.bias
        return like(reference if reference is not None else next(self.module.parameters(), None))


@dataclass(eq=False)
class Sublayer:
    """Attention, cross-attention or feed-forward part of a block, as a branch beside the residual.

    `output`: the module whose (first) output is the branch, before the residual is added.
    `residual`: the module whose first input is the residual stream x of `x + branch`.
    `input`: the module whose first input is what the sublayer itself reads (normed in pre-norm).
    `attention`: the module that computes attention, for methods that add keys and values.
    """

    name: str
    kind: SublayerKind
    width: int
    output: nn.Module
    residual: nn.Module
    input: nn.Module
    attention: nn.Module | None
    post_norm: bool
    leaves: dict[str, Leaf] = field(default_factory=dict)

    def like(self) -> dict:
        for leaf in self.leaves.values():
            if leaf.weight is not None:
                return leaf.like()
        return like(next(self.output.parameters(), None))


@dataclass(eq=False)
class Block:
    """One transformer block. `index` counts from 0 in the order of running."""

    name: str
    index: int
    module: nn.Module
    sublayers: dict[str, Sublayer]


@dataclass(eq=False)
class FrontLayer:
    """One layer of a convolutional front end; its (first) output is (B, width, T)."""

    name: str
    index: int
    module: nn.Module
    width: int

    def like(self) -> dict:
        return like(next(self.module.parameters(), None))


@dataclass(eq=False)
class Embedding:
    """What a tower gives into the space shared with another one; the (first) output of `module` is
    (B, width), not yet of unit length."""

    name: str
    module: nn.Module
    width: int

    def like(self) -> dict:
        return like(next(self.module.parameters(), None))


class Grid(NamedTuple):
    """How the tokens (B, N, D) of an image lie: `prefix` class and register tokens, then `height` x
    `width` patches row by row, then whatever has been appended."""

    prefix: int
    height: int
    width: int


@dataclass(eq=False)
class Patches:
    """`module`: what gives an image's patches as a map (B, D, H, W), before they become tokens.

    `prefix`: the class and register tokens that are put before them.
    """

    module: nn.Module
    prefix: int


@dataclass(eq=False)
class Stem:
    """One module on the way from an image or a waveform to a tower's first block, number `index`.

    What it gives follows in shape from what it is given: by a `convolution` of its own on (B, C,
    ...) -> (B, D, ...), or, where that is None, as all dimensions but the last are kept.
    """

    index: int
    module: nn.Module
    convolution: nn.Module | None = None


@dataclass(eq=False)
class Tower:
    """A stack of blocks of one width that run one after another.

    `prompts` says whether a token may be appended to the sequence inside the blocks: None if so,
    else the reason why not; `copies` the same of repeating the batch there. `batch_first`: blocks
    take (B, N, D), not (N, B, D). `front`: the convolutions before the blocks, if any are known.
    `runner`: the module whose call runs all blocks and gives the tower's last hidden state first.
    `patches`: where an image becomes tokens, None if none does. `embedding`: where the tower's
    embedding in a shared space comes out of a module; None if there is none, or for the reason that
    `unembedded` gives. `stem`: the costly modules before the blocks, as far as they are known, in
    the order of running.
    """

    name: str
    width: int
    path: str
    blocks: list[Block]
    norm: Leaf | None = None
    prompts: str | None = None
    copies: str | None = None
    batch_first: bool = True
    front: list[FrontLayer] = field(default_factory=list)
    runner: nn.Module | None = None
    patches: Patches | None = None
    embedding: Embedding | None = None
    unembedded: str | None = None
    stem: list[Stem] = field(default_factory=list)

    @property
    def crossed(self) -> bool:
        """Whether some of its blocks look at another tower."""
        return any("cross" in block.sublayers for block in self.blocks)

    def site_names(self) -> list[str]:
        """Every canonical name of the tower, outermost first."""
        found = [self.name, *(layer.name for layer in self.front)]
        for block in self.blocks:
            found.append(block.name)
            for sublayer in block.sublayers.values():
                found.append(sublayer.name)
                found.extend(leaf.name for leaf in sublayer.leaves.values())
        if self.norm is not None:
            found.append(self.norm.name)
        if self.embedding is not None:
            found.append(self.embedding.name)
        return found


@dataclass(eq=False)
class SiteMap:
    """All that is known about where an encoder can be adapted."""

    library: str
    architecture: str
    towers: dict[str, Tower]

    def blocks(self) -> Iterator[Block]:
        for tower in self.towers.values():
            yield from tower.blocks

    def fronts(self) -> Iterator[FrontLayer]:
        for tower in self.towers.values():
            yield from tower.front

    def embeddings(self) -> Iterator[Embedding]:
        for tower in self.towers.values():
            if tower.embedding is not None:
                yield tower.embedding

    def points(self) -> Iterator[FrontLayer | Embedding]:
        """Where a branch is what one module gives, before the blocks or behind them."""
        yield from self.fronts()
        yield from self.embeddings()

    def sublayers(self) -> Iterator[Sublayer]:
        for block in self.blocks():
            yield from block.sublayers.values()

    def leaves(self) -> Iterator[Leaf]:
        for tower in self.towers.values():
            for block in tower.blocks:
                for sublayer in block.sublayers.values():
                    yield from sublayer.leaves.values()
            if tower.norm is not None:
                yield tower.norm

    def names(self) -> list[str]:
        """Every canonical name, outermost first."""
        return [name for tower in self.towers.values() for name in tower.site_names()]

    def select(self, patterns: Iterable[str]) -> Selection:
        """The sites under the glob `patterns`; each must match something.

        Raises:
            ValueError: a pattern matches no site; names the nearest one.
        """
        patterns = tuple(patterns)
        names = self.names()
        for pattern in patterns:
            if not any(_under(name, pattern) for name in names):
                raise ValueError(
                    f"no site of {self.architecture} matches {pattern!r}"
                    f"{nearest(pattern, names)}; its towers are {', '.join(self.towers)}"
                )
        return Selection(patterns)


@dataclass(frozen=True)
class Selection:
    """Glob patterns over canonical names; one also takes all that lies below what it names."""

    patterns: tuple[str, ...]

    def __contains__(self, name: str) -> bool:
        return any(_under(name, pattern) for pattern in self.patterns)


def _under(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, pattern + ".*")


def like(reference: Tensor | None) -> dict:
    """Factory keywords that put a new tensor where `reference` is, in its floating dtype."""
    if reference is None:
        return {"dtype": torch.get_default_dtype(), "device": torch.device("cpu")}
    dtype = reference.dtype if reference.is_floating_point() else torch.get_default_dtype()
    return {"dtype": dtype, "device": reference.device}
