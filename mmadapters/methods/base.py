"""What a method is: a frozen config that builds small modules for the sites it wants.

There are five kinds of module, one for each way of acting on an encoder. An injector knows how to
run each kind at a site; a method only picks sites and computes.

    Branch   on the output of a sublayer, before the residual is added
    Delta    on a linear map or a LayerNorm, as activations or as a changed weight
    Prefix   on the keys and values of an attention
    Prompt   on the tokens that enter a block
    Readout  on what a tower gives last, from what all its blocks gave
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from ..sites.sitemap import Leaf, SiteMap
from ..suggest import nearest

Read = Literal["residual", "input", "mask", "grid", "query", "attended", "image"]


def wanted(module: Any, more: Mapping[str, Any]) -> dict[str, Any]:
    """Of what was captured beside residual and input, what a module, or what stands for several,
    reads."""
    return {name: value for name, value in more.items() if name in module.reads}


class Branch(nn.Module):
    """Acts on the branch u of `x + u`. `reads` says which other tensors it wants, if any.

    A module that reads "mask" takes it as one more keyword: (B, N), True where a token is no
    padding; None where none is. So it is with "grid": how an image's patches lie among the tokens;
    None where no image has been embedded. Beside a feed-forward part, "query" is the residual
    stream (B, N, D) that entered the block's cross-attention, None where the block did not cross in
    this call, and "attended" what the block's self-attention read.

    At a block's own site the branch is what enters the block, and there are no residual and input;
    "image" (B, N, D) is there what the image tower gave in the same call.
    """

    reads: frozenset[Read] = frozenset()

    def forward(self, branch: Tensor, *, residual: Tensor | None, input: Tensor | None) -> Tensor:
        """All of shape (B, N, D): the branch, the residual stream x, the sublayer's own input."""
        raise TypeError(f"{type(self).__name__} does not say what it computes")

    def change(self, branch: Tensor, *, residual: Tensor | None, input: Tensor | None) -> Tensor:
        """What `forward` adds to the branch."""
        return self(branch, residual=residual, input=input) - branch

    def channels(self) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """D (r, D), b_D (r,), U (D, r) and b_U (D,) where, with nothing drawn, U act(D n + b_D) +
        b_U of the sublayer's own input n is what is added; else None."""
        return None


class Delta(nn.Module):
    """Changes a leaf: `forward` on activations, `effective` on the weight; both mean the same.

    `scales_input`: the change applies to what enters the linear map, through `enter`.
    """

    scales_input: bool = False

    @property
    def as_weight(self) -> bool:
        """Whether `effective` says all that `forward` does now (no active dropout, no gate)."""
        return True

    def enter(self, x: Tensor) -> Tensor:
        return x

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        """A (r, in), B (out, r) and c where `forward` is y + c B A x now; else None."""
        return None

    def forward(self, y: Tensor, x: Tensor, leaf: Leaf) -> Tensor:
        """y: (..., out_features) of the frozen leaf, x: (..., in_features) that entered it."""
        return y

    def effective(
        self, weight: Tensor, bias: Tensor | None, leaf: Leaf
    ) -> tuple[Tensor, Tensor | None]:
        """The weight and bias that compute the same without this module; new tensors.

        `weight` and `bias` are those of the frozen leaf as earlier modules have changed them.
        """
        raise TypeError(f"{type(self).__name__} does not say what weight it amounts to")


class Prefix(nn.Module):
    """Gives keys and values to be put before those of an attention."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """x: (B, N, D), the attention's input -> keys and values, (P, D) each, and what is added
        to their scores, (B, N) by query or None."""
        raise TypeError(f"{type(self).__name__} does not say what it prepends")


class Prompt(nn.Module):
    """Gives tokens to be appended to a block's input.

    `count`: how many; `replaces`: they are removed after this block (deep prompts), else only
    after the tower's last one.
    """

    count: int
    replaces: bool = True

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, D), the block's input -> (B, P, D)."""
        raise TypeError(f"{type(self).__name__} does not say what it appends")


class Readout(nn.Module):
    """Acts on what a tower gives last, and sees what each of its blocks gave.

    At the name of the tower that is its last hidden state, behind its norm where it has one; at
    the name of its last block, what that block gives.
    """

    def forward(self, last: Tensor, *, states: Mapping[int, Tensor]) -> Tensor:
        """last: (B, N, D); states: (B, N, D) by block, without those that LayerDrop left out; -1
        is what entered the first block, for readouts at a block -> (B, N, D)."""
        raise TypeError(f"{type(self).__name__} does not say what it computes")


AdapterModule = Branch | Delta | Prefix | Prompt | Readout


@dataclass(frozen=True, kw_only=True)
class MethodConfig(ABC):
    """Base of all configs. `sites`: glob patterns over canonical names that bound where it acts.

    Class attributes:
        method: the name that files and run configs use.
        identity: a fresh adapter leaves every output bit for bit as it was.
        mergeable: the adapter can be folded into the frozen weights; else the reason why not.
    """

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

    @abstractmethod
    def build(self, sites: SiteMap) -> dict[str, AdapterModule]:
        """New modules by canonical site name.

        Raises:
            ValueError: this backbone has no site for the method, or a size does not fit.
        """

    def parts(self) -> Iterable[tuple[str, MethodConfig]]:
        """The single methods under this config, each with a key that is unique among them."""
        return ((self.method, self),)


class Changing:
    """Stands for several branches at a site and says what they add: a call adds it."""

    def __call__(
        self, branch: Tensor, *, residual: Tensor | None, input: Tensor | None, **more: Any
    ) -> Tensor:
        return branch + self.change(branch, residual=residual, input=input, **more)

    def change(
        self, branch: Tensor, *, residual: Tensor | None, input: Tensor | None, **more: Any
    ) -> Tensor:
        raise TypeError(f"{type(self).__name__} does not say what it adds")


class Replacing:
    """Stands for several branches at a site and says what they make of it: `change` is the rest."""

    def __call__(
        self, branch: Tensor, *, residual: Tensor | None, input: Tensor | None, **more: Any
    ) -> Tensor:
        raise TypeError(f"{type(self).__name__} does not say what it computes")

    def change(
        self, branch: Tensor, *, residual: Tensor | None, input: Tensor | None, **more: Any
    ) -> Tensor:
        """What a call adds to the branch."""
        return self(branch, residual=residual, input=input, **more) - branch


def reads_of(members: Iterable[Any]) -> frozenset[Read]:
    """What several modules read together."""
    return frozenset().union(*(member.reads for member in members))


def check_choice(what: str, value: object, choices: Iterable[str | None]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    choices = list(choices)
    if value not in choices:
        hint = nearest(value, filter(None, choices)) if isinstance(value, str) else ""
        raise ValueError(
            f"{what} must be one of {', '.join(map(repr, choices))}, not {value!r}{hint}"
        )


def check_count(what: str, value: int) -> None:
    """Raises ValueError unless `value` is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{what} must be a whole number of at least 1, not {value!r}")


def check_number(what: str, value: float) -> None:
    """Raises ValueError unless `value` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{what} must be a finite number, not {value!r}")


def check_rate(what: str, value: float) -> None:
    """Raises ValueError unless `value` is a probability below 1."""
    if not isinstance(value, (int, float)) or not 0.0 <= value < 1.0:
        raise ValueError(f"{what} must be at least 0 and below 1, not {value!r}")


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Stochastic depth (Huang et al. 2016): drops x (B, ...) per sample and rescales the rest."""
    if not training or rate == 0.0:
        return x
    keep = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(1.0 - rate)
    return x * keep / (1.0 - rate)
