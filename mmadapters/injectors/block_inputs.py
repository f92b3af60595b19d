"""What adapters of a feed-forward part read of the sublayers before it in their block."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn
from torch.utils.hooks import RemovableHandle

from ..sites.sitemap import Block
from .calls import first_input

if TYPE_CHECKING:
    from .installer import Runtime

# Reads of a block's other sublayers.
OF_BLOCK = ("query", "attended")


@dataclass(eq=False)
class CaptureHook:
    """Keeps the first input of a module until the branch that reads it is there."""

    runtime: Runtime
    key: tuple[str, str]

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.runtime.plan().branch.get(self.key[0]):
            self.runtime.local.stash[self.key] = first_input(args, kwargs)


@dataclass(eq=False)
class ForgetHook:
    """Lets go, as a block begins, of what a call that broke off has left for one that reads it."""

    runtime: Runtime
    key: tuple[str, str]

    def __call__(self, module: nn.Module, args: tuple) -> None:
        self.runtime.local.stash.pop(self.key, None)


def block_hooks(runtime: Runtime, block: Block, key: tuple[str, str]) -> Iterable[RemovableHandle]:
    """The hooks that keep what `key` (site, read) names: the residual stream that enters the
    block's cross-attention, or what its self-attention reads; none where it has none."""
    capture = CaptureHook(runtime, key)
    attn, cross = block.sublayers.get("attn"), block.sublayers.get("cross")
    if key[1] == "attended":
        if attn is not None:
            yield attn.input.register_forward_pre_hook(capture, with_kwargs=True)
    elif cross is not None:
        # A block may cross in some calls only: in others, nothing is captured.
        if attn is not None:
            yield attn.input.register_forward_pre_hook(ForgetHook(runtime, key))
        yield cross.residual.register_forward_pre_hook(capture, with_kwargs=True)
