"""The modules that act on an encoder, as injectors see them.

A method builds modules; an injector calls them at the sites of an encoder. Neither imports the
other: both import this file. It says how each kind of module is called, and which attributes an
injector reads. `mmadapters.methods.base` has the base classes of the modules; the members of a
composition are joined in `mmadapters.plans` into objects that are called in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from ..low_rank import Factors
from .sitemap import Grid, Leaf

Read = Literal["residual", "input", "mask", "grid", "query", "attended", "image"]
# The fields of `Context`, in order.
READS: tuple[Read, ...] = get_args(Read)


class Context(NamedTuple):
    """The tensors around a branch that a module may read. None: not captured at this site.

    Attributes:
        residual: (B, N, D), the residual stream x of `x + branch`.
        input: (B, N, D), the input of the sublayer itself, normed in pre-norm blocks.
        mask: (B, N), True where a token is no padding; None where no token is padding.
        grid: how the patches of an image lie among the tokens.
        query: (B, N, D), the residual stream that entered the block's cross-attention; None where
            the block did not cross in this call.
        attended: (B, N, D), the input of the block's self-attention.
        image: (B, M, E), the tokens of the image tower in the same call; only at a block's own
            site, where there are no residual and input.
    """

    residual: Tensor | None = None
    input: Tensor | None = None
    mask: Tensor | None = None
    grid: Grid | None = None
    query: Tensor | None = None
    attended: Tensor | None = None
    image: Tensor | None = None


NO_CONTEXT = Context()


class ActsOnBranch(Protocol):
    """Acts on the branch u of `x + u`, or on the input of a block."""

    @property
    def reads(self) -> frozenset[Read]:
        """The fields of `Context` that it needs; these are captured for it."""

    def __call__(self, branch: Tensor, context: Context) -> Tensor:
        """Returns the new branch, of the same shape, (B, N, D)."""

    def change(self, branch: Tensor, context: Context) -> Tensor:
        """Returns what a call adds to the branch, (B, N, D)."""

    def channels(self) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """Returns D (r, D), b_D (r,), U (D, r) and b_U (D,) if a call without dropout adds
        U act(D n + b_D) + b_U for the sublayer's own input n, else None."""


class ActsOnLeaf(Protocol):
    """Changes a linear map or a LayerNorm."""

    @property
    def scales_input(self) -> bool:
        """Whether it changes what enters the linear map, through `enter`."""

    @property
    def as_weight(self) -> bool:
        """Whether `effective` says now all that a call does (no active dropout, no gate)."""

    def enter(self, x: Tensor) -> Tensor:
        """Returns what enters the linear map instead of x, (..., in_features)."""

    def factors(self) -> Factors | None:
        """Returns A (r, in), B (out, r) and c if a call now is y + c B A x, else None."""

    def __call__(self, y: Tensor, x: Tensor, leaf: Leaf) -> Tensor:
        """Returns the new output for y (..., out_features) of the frozen leaf, which read x."""

    def effective(
        self, weight: Tensor, bias: Tensor | None, leaf: Leaf
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the weight and bias that compute the same without this module."""


class ActsAsPrefix(Protocol):
    """Gives keys and values that are put before those of an attention."""

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """x: (B, N, D), the input of the attention -> keys and values, (P, D) or (B, P, D), and
        what is added to their scores: (B, N) for all keys alike, (B, N, P), or None."""


class ActsAsPrompt(Protocol):
    """Gives tokens that are appended to the input of a block.

    Attributes:
        count: the number of tokens.
        replaces: the tokens are removed behind this block; else they go on to the tower's last one.
    """

    count: int
    replaces: bool

    def __call__(self, x: Tensor) -> Tensor:
        """x: (B, N, D), the input of the block -> (B, P, D)."""


class ActsAsReadout(Protocol):
    """Acts on the last output of a tower and sees the outputs of its blocks."""

    def __call__(self, last: Tensor, *, states: Mapping[int, Tensor]) -> Tensor:
        """last: (B, N, D); states: (B, N, D) by number of the block, -1 for the input of the first
        block -> (B, N, D)."""


Acting = ActsOnBranch | ActsOnLeaf | ActsAsPrefix | ActsAsPrompt | ActsAsReadout

# The advice where a block runs again without the encoder around it.
CHECKPOINTING = (
    "the library's own gradient checkpointing runs blocks again without the encoder around them; "
    "switch it off, and call set_grad_checkpointing() of the AdapterModel"
)


def runs_again() -> bool:
    """Says whether this code runs inside a backward pass, in which a library's own gradient
    checkpointing runs blocks again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
