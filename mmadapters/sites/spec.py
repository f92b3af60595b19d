"""Specs describe an architecture: the paths of its blocks, sublayers and leaves.

Every supported library is a table of these specs, and a user describes an unknown architecture with
the same dataclasses:

    Architecture(
        towers=(
            TowerSpec(
                name="vision",
                blocks="encoder.stages.*",
                sublayers={
                    "attn": SublayerSpec(output="att", residual="ln_a", leaves={"q": "qkv[0/3]"}),
                    "ffn": SublayerSpec(output="mlp", residual="ln_b", leaves={"up": "mlp.0"}),
                },
            ),
        )
    )

A leaf is written as the path of a called `nn.Linear` or LayerNorm (`mlp.fc1`), as one part of a
fused one (`attn.qkv[0/3]`: the first of three equal parts of its output), or as the path of a
parameter that the library reads itself (`attn.in_proj_weight[0/3]`, `attn.out_proj.weight`).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn

from .sitemap import SublayerKind


class Unresolved(LookupError):
    """A path of a spec does not exist on the module; another spelling may."""


@dataclass(frozen=True, kw_only=True)
class LeafSpec:
    """A leaf whose bias is not stored next to its weight.

    Attributes:
        path: the leaf, as described at the head of this file, relative to the block.
        bias: the path of the bias, relative to the block; None if the leaf has no bias.
    """

    path: str
    bias: str | None


@dataclass(frozen=True, kw_only=True)
class SublayerSpec:
    """The modules of one sublayer; all paths are relative to the block.

    Attributes:
        output: the module whose (first) output is the branch, before the residual is added.
        residual: the module whose first input is the residual stream x of `x + branch`.
        input: the module whose first input the sublayer itself reads (normed in pre-norm); by
            default that of `output`.
        attention: the module that computes attention with `scaled_dot_product_attention` or is an
            `nn.MultiheadAttention`, so that prefix tuning can enter it; None if there is none.
        norm: the sublayer's LayerNorm, written like a leaf; None if it has none.
        post_norm: the norm stands behind the residual sum, not before the sublayer.
        kind: "attn", "cross" or "ffn"; by default the key under which the spec stands.
        owner: the module whose forward pass reads raw weights; by default that of `attention`.
        leaves: the linear maps by role: q, k, v, o of attention; up, gate, down of a feed-forward
            part.
    """

    output: str
    residual: str
    input: str | None = None
    attention: str | None = None
    norm: str | None = None
    post_norm: bool = False
    kind: SublayerKind | None = None
    owner: str | None = None
    leaves: Mapping[str, str | LeafSpec] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PatchSpec:
    """The place where an image becomes tokens.

    Attributes:
        path: the module that returns the patches as a map (B, D, H, W), mostly a convolution.
        num_prefix_tokens: how many class and register tokens are put before the patches, from 0.
    """

    path: str
    num_prefix_tokens: int = 1


@dataclass(frozen=True, kw_only=True)
class EmbeddingSpec:
    """The place where a tower's embedding in a shared space comes out.

    Attributes:
        path: the module whose (first) output is the embedding (B, width).
        width: the number of dimensions of the shared space.
    """

    path: str
    width: int


@dataclass(frozen=True, kw_only=True)
class TowerSpec:
    """A stack of blocks; all paths are relative to the model, those in `sublayers` to the block.

    Attributes:
        name: the canonical name: "vision", "audio", "text", "fusion" or "decoder", or one of your
            own.
        blocks: the path of an `nn.ModuleList`, or a glob over paths (`encoder.*.layer`).
        sublayers: the sublayers of every block by key, in the order in which they run.
        norm: the path of the norm behind the last block; None if there is none.
        prompts: None if tokens may be appended to the input of the blocks, else the reason why not,
            as the end of a sentence.
        copies: None if the batch may be repeated at any block, else the reason why not, as the end
            of a sentence.
        batch_first: blocks take (B, N, D), not (N, B, D).
        names: by key of a sublayer, another tower's name for it. BLIP's cross-attentions are in its
            text blocks and are called `fusion.blocks.N.cross`: {"cross": "fusion"}.
        optional: keys of sublayers that a block may lack (cross-attention of some blocks only).
        front: the path of the `nn.ModuleList` of convolutions before the blocks; None for none.
        runner: the path of the module whose call runs all blocks and returns the tower's last
            hidden state first ("" for the model itself); None if there is none.
        patches: the place where an image becomes tokens, for methods that convolve over the grid of
            its patches; None if the tower takes no images.
        embedding: the place where the tower's embedding in a shared space comes out, or the reason
            why no module returns it, as the end of a sentence; None if there is no such space.
        stem: paths of more modules between patches or front and the blocks. They need not run where
            the blocks do not. Each is a convolution, or keeps all dimensions of its input but the
            last.
    """

    name: str
    blocks: str
    sublayers: Mapping[str, SublayerSpec]
    norm: str | None = None
    prompts: str | None = None
    copies: str | None = None
    batch_first: bool = True
    names: Mapping[str, str] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    front: str | None = None
    runner: str | None = None
    patches: PatchSpec | None = None
    embedding: EmbeddingSpec | str | None = None
    stem: tuple[str, ...] = ()


Example = Callable[[nn.Module], tuple[tuple, dict]]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The towers of one class of models.

    Attributes:
        towers: at least one, each with a name of its own.
        example: takes the model and returns the arguments and keyword arguments of the smallest
            call that reaches every block; None if the user passes an example to `init`.
        library: where the class comes from: "timm", "transformers", "open_clip", "torchaudio" or
            "custom".
    """

    towers: tuple[TowerSpec, ...]
    example: Example | None = None
    library: str = "custom"


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """A row of a library's table: some classes, and how they may be laid out.

    Attributes:
        classes: qualified class names, or globs over them (`transformers.models.vit.*.ViT*`).
        architectures: takes a module and yields candidates for it, which are tried in order until
            one resolves: the spellings of different library versions. It may read the module to
            pick or parametrise them, and raises ValueError with one clear sentence for a variant
            that cannot be adapted.
    """

    classes: tuple[str, ...]
    architectures: Callable[[nn.Module], Iterable[Architecture]]

    def matches(self, qualified: str) -> bool:
        """Says whether the row is about the class of this qualified name."""
        return any(fnmatch.fnmatchcase(qualified, pattern) for pattern in self.classes)
