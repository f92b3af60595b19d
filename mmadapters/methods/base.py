"""The base classes of methods: a frozen config, and the modules that it builds for its sites.

There are five kinds of module, one for each way of acting on an encoder. A method picks sites and
computes; an injector calls each kind at its sites, as `mmadapters.sites.acting` describes.

    Branch   on the output of a sublayer, before the residual is added
    Delta    on a linear map or a LayerNorm, as activations or as a changed weight
    Prefix   on the keys and values of an attention
    Prompt   on the tokens that enter a block
    Readout  on the last output of a tower, with the outputs of all its blocks
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import ClassVar

from torch import Tensor, nn

from ..low_rank import Factors
from ..sites.acting import ActsOnBranch, Context, Read
from ..sites.sitemap import Leaf, SiteMap


class Branch(nn.Module):
    """Adds `change` to the branch u of `x + u`.

    `reads` names the fields of the `Context` that it needs, if any; `Context` says what they hold.
    Fields that it does not name may be set all the same, for another adapter at this site.

    At a block's own site the branch is the input of the block, and only "image" can be read.
    """

    reads: frozenset[Read] = frozenset()

    def forward(self, branch: Tensor, context: Context) -> Tensor:
        """branch: (B, N, D), the output of the sublayer -> the new branch, of the same shape."""
        return branch + self.change(branch, context)

    def change(self, branch: Tensor, context: Context) -> Tensor:
        """Returns what `forward` adds to the branch, (B, N, D), in the dtype of the branch."""
        raise TypeError(f"{type(self).__name__} does not say what it adds")

    def channels(self) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """Returns D (r, D), b_D (r,), U (D, r) and b_U (D,) if the change without dropout is
        U act(D n + b_D) + b_U for the sublayer's own input n, else None."""
        return None


class CombinedBranch:
    """Several branches at a site that act as one, for example the members of a composition.

    A subclass writes `__call__` or `change`: the other one follows from it. It is no `nn.Module`,
    because the modules that it calls belong to their adapters.
    """

    reads: frozenset[Read] = frozenset()

    def __call__(self, branch: Tensor, context: Context) -> Tensor:
        """branch: (B, N, D) -> the new branch, of the same shape."""
        return branch + self.change(branch, context)

    def change(self, branch: Tensor, context: Context) -> Tensor:
        """Returns what a call adds to the branch, (B, N, D)."""
        return self(branch, context) - branch

    def channels(self) -> None:
        """Returns None: several branches are not merged as one."""
        return None


def reads_of(members: Iterable[ActsOnBranch]) -> frozenset[Read]:
    """Returns the fields of `Context` that some of the members need."""
    return frozenset().union(*(member.reads for member in members))


class Delta(nn.Module):
    """Changes a leaf: `forward` on activations, `effective` on the weight; both mean the same.

    `scales_input`: the change applies to what enters the linear map, through `enter`.
    """

    scales_input: bool = False

    @property
    def as_weight(self) -> bool:
        """Whether `effective` says now all that `forward` does (no active dropout, no gate)."""
        return True

    def enter(self, x: Tensor) -> Tensor:
        """x: (..., in_features) -> what enters the linear map instead, of the same shape."""
        return x

    def factors(self) -> Factors | None:
        """Returns A (r, in), B (out, r) and c if `forward` now is y + c B A x, else None."""
        return None

    def forward(self, y: Tensor, x: Tensor, leaf: Leaf) -> Tensor:
        """y: (..., out_features) of the frozen leaf, x: (..., in_features) that entered it -> the
        new y, of the same shape."""
        return y

    def effective(
        self, weight: Tensor, bias: Tensor | None, leaf: Leaf
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the weight and bias that compute the same without this module, as new tensors.

        `weight` and `bias` are those of the frozen leaf as earlier modules have changed them.
        """
        raise TypeError(f"{type(self).__name__} does not say what weight it amounts to")


class Prefix(nn.Module):
    """Gives keys and values that are put before those of an attention."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """x: (B, N, D), the input of the attention -> keys and values, (P, D) each, and what is
        added to their scores: (B, N), one number for each query, or None."""
        raise TypeError(f"{type(self).__name__} does not say what it prepends")


class Prompt(nn.Module):
    """Gives tokens that are appended to the input of a block.

    `count`: how many. `replaces`: they are removed behind this block (deep prompts); else their
    outputs enter all blocks above it. No output of a block has prompts.
    """

    count: int
    replaces: bool = True

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, D), the input of the block -> (B, P, D)."""
        raise TypeError(f"{type(self).__name__} does not say what it appends")


class Readout(nn.Module):
    """Acts on the last output of a tower and sees the outputs of all its blocks.

    At the tower's own name it acts on the last hidden state, behind the tower's norm if there is
    one. At the name of the last block it acts on the output of that block.
    """

    def forward(self, last: Tensor, *, states: Mapping[int, Tensor]) -> Tensor:
        """last: (B, N, D); states: (B, N, D) by the number of the block -> (B, N, D).

        Blocks that LayerDrop left out are missing in `states`. For a readout at a block, -1 is the
        input of the first block.
        """
        raise TypeError(f"{type(self).__name__} does not say what it computes")


AdapterModule = Branch | Delta | Prefix | Prompt | Readout


@dataclass(frozen=True, kw_only=True)
class MethodConfig(ABC):
    """Base of all configs.

    Class attributes:
        method: the name in files and run configs.
        identity: True if a fresh adapter leaves every output bit for bit as it was.
        mergeable: True if the adapter can be folded into the frozen weights; else the reason.
    """

    # Glob patterns over canonical site names, at least one; the method acts only under these.
    sites: tuple[str, ...] = ("*",)

    method: ClassVar[str]
    identity: ClassVar[bool] = True
    mergeable: ClassVar[bool | str] = True

    def __post_init__(self) -> None:
        if isinstance(self.sites, str):
            raise ValueError(f"sites must be a tuple of patterns, e.g. sites=({self.sites!r},)")
        object.__setattr__(self, "sites", tuple(self.sites))
        for pattern in self.sites:
            if not isinstance(pattern, str):
                raise ValueError(f"sites must be patterns over names of sites, not {pattern!r}")
        if not self.sites:
            raise ValueError("sites is empty: give at least one pattern, e.g. ('*',)")
        for field in fields(self):
            if field.type == "bool" and not isinstance(value := getattr(self, field.name), bool):
                raise ValueError(f"{field.name} must be true or false, not {value!r}")

    @abstractmethod
    def build(self, sites: SiteMap) -> dict[str, AdapterModule]:
        """Returns new modules by canonical site name.

        Raises:
            ValueError: this backbone has no site for the method, or a size does not fit.
        """

    def parts(self) -> Iterable[tuple[str, MethodConfig]]:
        """Yields the single methods under this config, each with a key that is unique in it."""
        return ((self.method, self),)


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Drops whole samples of x (B, ...) and scales up the others: stochastic depth.

    Args:
        rate: the probability that a sample is dropped, from 0 to below 1; only in training.

    Source: Huang et al. 2016.
    """
    if not training or rate == 0.0:
        return x
    keep = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(1.0 - rate)
    return x * keep / (1.0 - rate)
