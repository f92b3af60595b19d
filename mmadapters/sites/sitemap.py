"""A `SiteMap` holds the named points of a frozen encoder, at which adapters act.

A `SiteMap` holds towers (`vision`, `audio`, `text`, `fusion`, `decoder`); a tower holds blocks in
the order in which they run; a block holds sublayers (`attn`, `ffn`, `cross`); a sublayer holds its
leaves: the linear maps `q k v o` (attention) or `up gate down` (feed-forward) and its `norm`. The
convolutions with which a speech encoder turns samples into frames come before its blocks: `front`;
the output of an image-text encoder's tower in the shared space comes after them: `embedding`.
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
    """The place of a frozen tensor: rows `start` to `stop` (excluded) of a module's parameter.

    Attributes:
        module: holds the parameter.
        attribute: the parameter's name in the module.
        start: the first row; None for the whole parameter.
        stop: the row after the last one; None for the whole parameter.
    """

    module: nn.Module
    attribute: str
    start: int | None = None
    stop: int | None = None

    @property
    def whole(self) -> Tensor:
        """The parameter with all its rows."""
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

    Attributes:
        name: the canonical name.
        kind: "linear" or "norm".
        module: the module that holds the weight.
        weight_at: the place of the weight; None without one.
        bias_at: the place of the bias; None without one.
        in_features: the width of x.
        out_features: the width of y.
        raw: the library reads the weight itself instead of calling the module (`in_proj_weight`,
            `nn.MultiheadAttention.out_proj`): a hook would never fire there.
        index: which part of the output of a fused map the leaf is, from 0.
        parts: how many equal parts that output has; 1 if the map is not fused.
        owner: the module whose forward pass reads a raw weight; None if the leaf is not raw.
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
        """The last part of the name: `q`, `up`, `norm`."""
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
        """Returns the dtype and device of an adapter's new tensors at this leaf."""
        reference = self.weight if self.weight is not None else self.bias
        return like(reference if reference is not None else next(self.module.parameters(), None))


@dataclass(eq=False)
class Sublayer:
    """The attention, cross-attention or feed-forward part of a block: the branch in x + branch.

    Attributes:
        name: the canonical name.
        kind: "attn", "cross" or "ffn".
        width: D of the branch (B, N, D).
        output: the module whose (first) output is the branch, before the residual is added.
        residual: the module whose first input is the residual stream x.
        input: the module whose first input the sublayer itself reads (normed in pre-norm).
        attention: the module that computes attention, for methods that add keys and values; None if
            they cannot.
        post_norm: the norm stands behind the residual sum, not before the sublayer.
        leaves: the linear maps and the norm by role.
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
        """Returns the dtype and device of an adapter's new tensors at this sublayer."""
        for leaf in self.leaves.values():
            if leaf.weight is not None:
                return leaf.like()
        return like(next(self.output.parameters(), None))


@dataclass(eq=False)
class Block:
    """One transformer block.

    Attributes:
        name: the canonical name.
        index: its number in the order of running, from 0.
        module: runs the block.
        sublayers: by key (`attn`, `cross`, `ffn`), in the order of running.
    """

    name: str
    index: int
    module: nn.Module
    sublayers: dict[str, Sublayer]


@dataclass(eq=False)
class FrontLayer:
    """One layer of a convolutional front end.

    Attributes:
        name: the canonical name.
        index: its number in the order of running, from 0.
        module: runs the layer; its (first) output is (B, width, T).
        width: the number of channels of that output.
    """

    name: str
    index: int
    module: nn.Module
    width: int

    def like(self) -> dict:
        """Returns the dtype and device of an adapter's new tensors here."""
        return like(next(self.module.parameters(), None))


@dataclass(eq=False)
class Embedding:
    """The output of a tower in the space that it shares with another one.

    Attributes:
        name: the canonical name.
        module: its (first) output is the embedding (B, width), not yet of unit length.
        width: the number of dimensions of the shared space.
    """

    name: str
    module: nn.Module
    width: int

    def like(self) -> dict:
        """Returns the dtype and device of an adapter's new tensors here."""
        return like(next(self.module.parameters(), None))


class Grid(NamedTuple):
    """The layout of the tokens (B, N, D) of an image.

    Class and register tokens come first, then the patches row by row, then appended tokens.

    Attributes:
        num_prefix_tokens: the number of class and register tokens.
        height: the number of rows of patches.
        width: the number of patches in a row.
    """

    num_prefix_tokens: int
    height: int
    width: int


@dataclass(eq=False)
class Patches:
    """The place where an image becomes tokens.

    Attributes:
        module: its output is the map of patches (B, D, H, W), before they become tokens.
        num_prefix_tokens: the number of class and register tokens that are put before them.
    """

    module: nn.Module
    num_prefix_tokens: int


@dataclass(eq=False)
class Stem:
    """One module on the way from an image or a waveform to a tower's first block.

    The shape of its output follows from that of its input.

    Attributes:
        index: its number in the order of running, from 0.
        module: the module.
        convolution: the part of it that maps (B, C, ...) to (B, D, ...) and so says the shape; None
            if the module keeps all dimensions of its input but the last.
    """

    index: int
    module: nn.Module
    convolution: nn.Module | None = None


@dataclass(eq=False)
class Tower:
    """A stack of blocks of one width that run one after another.

    Attributes:
        name: the canonical name.
        width: D of its states (B, N, D).
        path: the path or glob of its blocks.
        blocks: in the order of running.
        norm: the norm behind the last block; None if there is none.
        prompts: None if tokens may be appended to the input of the blocks, else the reason why not,
            as the end of a sentence.
        copies: None if the batch may be repeated at any block, else the reason why not, as the end
            of a sentence.
        batch_first: blocks take (B, N, D), not (N, B, D).
        front: the convolutions before the blocks, if any are known.
        runner: the module whose call runs all blocks and returns the last hidden state first; None
            if none is known.
        patches: the place where an image becomes tokens; None if there is none.
        embedding: the tower's output in a shared space; None if no module returns it.
        unembedded: the reason why no module returns it, as the end of a sentence; None if there is
            no shared space, or if `embedding` is known.
        stem: the costly modules before the blocks that are known, in the order of running.
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
        """Some of the tower's blocks attend to another tower."""
        return any("cross" in block.sublayers for block in self.blocks)

    def site_names(self) -> list[str]:
        """Returns every canonical name of the tower, outermost first."""
        names = [self.name, *(layer.name for layer in self.front)]
        for block in self.blocks:
            names.append(block.name)
            for sublayer in block.sublayers.values():
                names.append(sublayer.name)
                names.extend(leaf.name for leaf in sublayer.leaves.values())
        if self.norm is not None:
            names.append(self.norm.name)
        if self.embedding is not None:
            names.append(self.embedding.name)
        return names


@dataclass(eq=False)
class SiteMap:
    """The sites of one encoder.

    Attributes:
        library: "timm", "transformers", "open_clip", "torchaudio" or "custom".
        architecture: the name of the encoder's class.
        towers: by canonical name.
    """

    library: str
    architecture: str
    towers: dict[str, Tower]

    def blocks(self) -> Iterator[Block]:
        """Yields the blocks of all towers."""
        for tower in self.towers.values():
            yield from tower.blocks

    def fronts(self) -> Iterator[FrontLayer]:
        """Yields the layers of all convolutional front ends."""
        for tower in self.towers.values():
            yield from tower.front

    def embeddings(self) -> Iterator[Embedding]:
        """Yields the embeddings of all towers that have one."""
        for tower in self.towers.values():
            if tower.embedding is not None:
                yield tower.embedding

    def points(self) -> Iterator[FrontLayer | Embedding]:
        """Yields the sites before and behind the blocks at which a branch is a module's output."""
        yield from self.fronts()
        yield from self.embeddings()

    def sublayers(self) -> Iterator[Sublayer]:
        """Yields the sublayers of all blocks."""
        for block in self.blocks():
            yield from block.sublayers.values()

    def leaves(self) -> Iterator[Leaf]:
        """Yields the leaves of all sublayers, and the norms behind the last blocks."""
        for tower in self.towers.values():
            for block in tower.blocks:
                for sublayer in block.sublayers.values():
                    yield from sublayer.leaves.values()
            if tower.norm is not None:
                yield tower.norm

    def names(self) -> list[str]:
        """Returns every canonical name, outermost first."""
        return [name for tower in self.towers.values() for name in tower.site_names()]

    def select(self, patterns: Iterable[str]) -> SiteSelection:
        """Returns the sites under the glob `patterns`, each of which must match something.

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
        return SiteSelection(patterns)


@dataclass(frozen=True)
class SiteSelection:
    """The sites that match one of several glob patterns, and all sites below them.

    Attributes:
        patterns: globs over canonical names.
    """

    patterns: tuple[str, ...]

    def __contains__(self, name: str) -> bool:
        return any(_under(name, pattern) for pattern in self.patterns)


def _under(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, pattern + ".*")


def like(reference: Tensor | None) -> dict:
    """Returns the dtype and device, as keyword arguments, of a new tensor next to `reference`.

    Without a reference they are the default dtype and the CPU. A dtype that is not floating becomes
    the default one.
    """
    if reference is None:
        return {"dtype": torch.get_default_dtype(), "device": torch.device("cpu")}
    dtype = reference.dtype if reference.is_floating_point() else torch.get_default_dtype()
    return {"dtype": dtype, "device": reference.device}
