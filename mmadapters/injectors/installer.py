"""What runs while an encoder with adapters runs: at each site, look up what is active and apply it.

A `Plan` says which adapter modules act at which site. The runtime holds the model's plan and, for
each thread, one that may stand above it (`using`). Hooks are installed once per module; where no
adapter acts they hand back exactly what they were given.

Three mechanisms: hooks on sublayers (`BranchHook`), blocks (`PromptHook`) and whole towers
(`ReadoutHook`), hooks on leaves that are really called (`LeafHook`), and, where a library reads a
weight itself or computes attention inside, a subclass in place of the module's class (`raw.py`).
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..low_rank import Factors, plus_low_rank
from ..sites.acting import (
    NO_CONTEXT,
    READS,
    Acting,
    ActsAsPrefix,
    ActsAsPrompt,
    ActsAsReadout,
    ActsOnBranch,
    ActsOnLeaf,
    Context,
)
from ..sites.sitemap import Block, Grid, Leaf, SiteMap, Tower
from . import raw_weights
from .block_inputs import OF_BLOCK, CaptureHook, ForgetHook, block_hooks
from .calls import first_input, first_output, with_first, with_first_input
from .cross_attention import BlockHook, Gaze, ImageHook
from .intercept import Interceptor, Pass

Kind = Literal["branch", "delta", "prefix", "prompt", "readout"]


@dataclass(eq=False)
class Plan:
    """The active modules by canonical site name, in the order in which they act.

    `stands_for`: the composition that it was made of. `copies`: how many times the batch is
    repeated on entering block `starts[tower]` of a tower.
    """

    branch: dict[str, tuple[ActsOnBranch, ...]] = field(default_factory=dict)
    delta: dict[str, tuple[ActsOnLeaf, ...]] = field(default_factory=dict)
    prefix: dict[str, tuple[ActsAsPrefix, ...]] = field(default_factory=dict)
    prompt: dict[str, tuple[ActsAsPrompt, ...]] = field(default_factory=dict)
    readout: dict[str, tuple[ActsAsReadout, ...]] = field(default_factory=dict)
    stands_for: Any = None
    copies: int = 1
    starts: dict[str, int] = field(default_factory=dict)

    def add(self, kind: Kind, site: str, module: Acting) -> None:
        table = getattr(self, kind)
        table[site] = (*table.get(site, ()), module)

    def entries(self) -> Iterable[tuple[Kind, str, nn.Module]]:
        for kind in ("branch", "delta", "prefix", "prompt", "readout"):
            for site, modules in getattr(self, kind).items():
                for module in modules:
                    yield kind, site, module

    def clear(self) -> None:
        """Lets nothing act any more, wherever this plan is in use."""
        tables = (self.branch, self.delta, self.prefix, self.prompt, self.readout, self.starts)
        for table in tables:
            table.clear()
        self.stands_for, self.copies = None, 1

    def mapped(self, change: Callable[[Kind, str, nn.Module], Acting]) -> Plan:
        """A plan in which `change` stands for every module."""
        plan = Plan()
        for kind, site, module in self.entries():
            plan.add(kind, site, change(kind, site, module))
        return plan


NOTHING = Plan()
# The fields of a `Context` that hooks capture before the branch is there.
CAPTURED = tuple(name for name in READS if name != "image")


_GENERATIONS = itertools.count(1)


def _next_generation() -> str:
    """Never the same twice in a process: what is compiled for one model's hooks must not run for
    another's, nor for its own after they have changed."""
    return str(next(_GENERATIONS))


class _ThreadState(threading.local):
    """`plan` stands above the model's own in this thread; `stash` holds tensors on their way from
    one hook to a later one of the same block; `memo` computed weights during one forward; `states`
    what the blocks under a readout have given so far, by index; `gaze` what texts look at now;
    `passing` what stands in for lower blocks."""

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self.stash: dict[tuple[str, str], Any] = {}
        self.memo: dict[int, dict[str, tuple[Tensor, Tensor | None]]] = {}
        self.states: dict[str, dict[int, Tensor]] = {}
        self.gaze: Gaze | None = None
        self.passing: Pass | None = None

    def __reduce__(self) -> tuple:
        return _ThreadState, ()


class Runtime:
    """Installs hooks on the modules of a `SiteMap` and answers them with the active plan."""

    def __init__(self, sites: SiteMap) -> None:
        self.sites = sites
        self.active: Plan = NOTHING
        self.local = _ThreadState()
        # A string: torch.compile guards it by value, so that installing hooks recompiles.
        self.generation = _next_generation()
        self.interceptors: dict[tuple[str, int | str], Interceptor] = {}
        self._copies = False
        self._handles: dict[tuple[str, ...], list[RemovableHandle]] = {}
        self._raw: dict[tuple[str, ...], list[nn.Module]] = {}
        self._sublayers = {sublayer.name: sublayer for sublayer in sites.sublayers()}
        self._leaves = {leaf.name: leaf for leaf in sites.leaves()}
        self._blocks = {block.name: block for block in sites.blocks()}
        self._points = {point.name: point for point in sites.points()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.generation = _next_generation()

    def plan(self) -> Plan:
        """What is active in this thread."""
        # Compared, not just read: only then does torch.compile guard it. It guards no hooks.
        if self.generation == "":
            raise RuntimeError("this model has lost its hooks")
        above = self.local.plan
        return self.active if above is None else above

    @contextlib.contextmanager
    def pinned(self, plan: Plan) -> Iterator[None]:
        """Inside the block, in this thread alone, `plan` is what is active."""
        local = self.local
        above = local.plan
        local.plan = plan
        try:
            yield
        finally:
            local.plan = above

    def grids(self) -> dict[tuple[str, str], Grid]:
        """How the patches of the image in the making lie, by where that will be read."""
        return {key: grid for key, grid in self.local.stash.items() if key[1] == "grid"}

    @contextlib.contextmanager
    def seeing(self, grids: Mapping[tuple[str, str], Grid]) -> Iterator[None]:
        """Inside the block, in this thread, `grids` are what is read; then what was there before,
        less what has been read."""
        stash = self.local.stash
        before = {key: stash[key] for key in grids if key in stash}
        stash.update(grids)
        try:
            yield
        finally:
            for key in grids:
                if stash.pop(key, None) is not None and key in before:
                    stash[key] = before[key]

    @property
    def looks(self) -> bool:
        """Whether some adapter, active or not, looks at images."""
        return ("image", "vision") in self._handles

    def sync(self, plans: Iterable[Plan]) -> None:
        """Installs the hooks that `plans` need and removes all others."""
        wanted: dict[tuple[str, ...], None] = {}
        for plan in plans:
            for kind, site, module in plan.entries():
                wanted.update(dict.fromkeys(self._keys(kind, site, module)))
        self._copies = self._copies and bool(wanted)
        if self._copies:
            wanted.update({("copy", block.name): None for block in self.sites.blocks()})
        # Behind all that changes what the same block gives, whichever was there first.
        last = ("image", "vision")
        for key in [key for key in {**self._handles, **self._raw} if key not in wanted]:
            self._remove(key)
        self._remove(last)
        for key in sorted(wanted, key=lambda key: key == last):
            if key not in self._handles and key not in self._raw:
                self._install(key)
        self.recompile()

    def recompile(self) -> None:
        """Lets what torch.compile has made of the encoder so far run no more."""
        self.generation = _next_generation()

    def allow_copies(self) -> None:
        """Installs what plans with copies need, from now on."""
        if not self._copies:
            self._copies = True
            for block in self.sites.blocks():
                self._install(("copy", block.name))
            self.recompile()

    def clear(self) -> None:
        """Removes every hook and gives every module its own class back."""
        self._copies = False
        self.sync(())
        self.active = NOTHING
        self.local = _ThreadState()

    def _keys(self, kind: Kind, site: str, module: nn.Module) -> Iterable[tuple[str, ...]]:
        if kind == "branch":
            for read in sorted(getattr(module, "reads", ())):
                if read == "grid":
                    yield "grid", self._tower_of(site).name
                elif read == "image":
                    yield "image", "vision"
                else:
                    yield "capture", site, read
            yield "branch", site
        elif kind == "delta":
            leaf = self._leaves[site]
            if leaf.raw:
                yield "raw", site
            else:
                if module.scales_input:
                    yield "enter", site
                yield "leaf", self._together(leaf)[0].name
        elif kind == "prefix":
            yield "attention", site
        elif kind == "readout":
            yield ("readout" if site in self.sites.towers else "side"), site
        else:
            yield "prompt", site
            if not module.replaces:
                tower = self._tower(site)
                yield "unprompt", tower.blocks[-1].name, site

    def _tower(self, block: str) -> Tower:
        return next(
            tower
            for tower in self.sites.towers.values()
            if any(member.name == block for member in tower.blocks)
        )

    def _tower_of(self, sublayer: str) -> Tower:
        return next(t for t in self.sites.towers.values() if sublayer in _sublayers(t))

    def _together(self, leaf: Leaf) -> list[Leaf]:
        """The leaves that are parts of one fused module, in the order of its output."""
        found = [other for other in self._leaves.values() if other.module is leaf.module]
        return sorted(found, key=lambda other: other.index)

    def _install(self, key: tuple[str, ...]) -> None:
        what, site = key[:2]
        if what == "raw":
            self._raw[key] = raw_weights.adapt_leaf(self, self._leaves[site])
        elif what == "attention":
            sublayer = self._sublayers[site]
            self._raw[key] = raw_weights.adapt_attention(self, sublayer)
            if sublayer.attention is not None:
                # Any hook keeps nn.TransformerEncoderLayer from going past its attention.
                handle = sublayer.attention.register_forward_pre_hook(ForwardHook())
                self._handles[key] = [handle]
        else:
            self._handles[key] = list(self._hooks(what, site, key[2:]))

    def _hooks(self, what: str, site: str, rest: tuple[str, ...]) -> Iterable[RemovableHandle]:
        if what == "capture":
            sublayer = self._sublayers[site]
            if rest[0] == "mask":
                hook: Any = MaskHook(self, site)
                yield self._masked(site).register_forward_pre_hook(hook, with_kwargs=True)
                return
            if rest[0] in OF_BLOCK:
                yield from block_hooks(self, self._block_of(site), (site, rest[0]))
                return
            module = sublayer.residual if rest[0] == "residual" else sublayer.input
            capture = CaptureHook(self, (site, rest[0]))
            yield module.register_forward_pre_hook(capture, with_kwargs=True)
        elif what == "grid":
            tower = self.sites.towers[site]
            assert tower.patches is not None
            hook = GridHook(self, tower.patches.prefix, _sublayers(tower))
            yield tower.patches.module.register_forward_hook(hook)
        elif what == "image":
            vision = self.sites.towers[site]
            hook = ImageHook(self, vision.batch_first)
            yield vision.blocks[-1].module.register_forward_hook(hook)
        elif what == "branch" and site in self._blocks:
            hook = BlockHook(self, site, self._tower(site).batch_first)
            yield self._blocks[site].module.register_forward_pre_hook(hook, with_kwargs=True)
        elif what == "branch":
            point = self._points.get(site)
            output = self._sublayers[site].output if point is None else point.module
            yield output.register_forward_hook(BranchHook(self, site))
        elif what == "enter":
            yield self._leaves[site].module.register_forward_pre_hook(EnterHook(self, site))
        elif what == "leaf":
            leaves = self._together(self._leaves[site])
            # First of all: the leaf may end a branch (Whisper's fc2), whose hook sees its output.
            yield leaves[0].module.register_forward_hook(LeafHook(self, leaves), prepend=True)
        elif what == "copy":
            block, tower = self._blocks[site], self._tower(site)
            hook = CopyHook(self, tower.name, block.index, tower.crossed)
            yield block.module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
        elif what == "readout":
            tower = self.sites.towers[site]
            assert tower.runner is not None
            yield tower.runner.register_forward_pre_hook(StartHook(self, site))
            yield from self._collect_hooks(site, tower.blocks)
            yield tower.runner.register_forward_hook(ReadoutHook(self, site))
        elif what == "side":
            blocks = self._tower(site).blocks
            entry = EntryHook(self, site)
            yield blocks[0].module.register_forward_pre_hook(entry, with_kwargs=True)
            yield from self._collect_hooks(site, blocks)
            yield blocks[-1].module.register_forward_hook(ReadoutHook(self, site))
        elif what == "prompt":
            block = self._blocks[site]
            yield block.module.register_forward_pre_hook(PromptHook(self, site), with_kwargs=True)
            hook = UnpromptHook(self, site, True)
            yield block.module.register_forward_hook(hook, prepend=True)
        else:
            # First of all, so that what reads the block's output finds no prompts there.
            hook = UnpromptHook(self, rest[0], False)
            yield self._blocks[site].module.register_forward_hook(hook, prepend=True)

    def _masked(self, site: str) -> nn.Module:
        """The attention of a sublayer's block, which is given the mask: like all that adapters
        read it runs again where the block is checkpointed, as the block's own call does not."""
        attn = self._block_of(site).sublayers["attn"]
        return attn.input if attn.attention is None else attn.attention

    def _block_of(self, sublayer: str) -> Block:
        return next(block for block in self._blocks.values() if sublayer in _names(block))

    def _collect_hooks(self, site: str, blocks: Iterable[Block]) -> Iterable[RemovableHandle]:
        for block in blocks:
            yield block.module.register_forward_hook(CollectHook(self, site, block.index))

    def _remove(self, key: tuple[str, ...]) -> None:
        for handle in self._handles.pop(key, ()):
            handle.remove()
        modules = self._raw.pop(key, ())
        if modules:
            raw_weights.restore(modules, key[1])


def is_adapted(module: nn.Module) -> bool:
    """Whether some runtime has hooks or subclasses on the module."""
    hooks = (
        *(ForwardHook, CaptureHook, ForgetHook, MaskHook, GridHook, BranchHook, EnterHook),
        *(LeafHook, ImageHook, BlockHook, PromptHook, UnpromptHook, CopyHook),
        *(StartHook, EntryHook, CollectHook, ReadoutHook),
    )
    return any(
        raw_weights.KEY in part.__dict__
        or any(isinstance(hook, hooks) for hook in part._forward_hooks.values())
        or any(isinstance(hook, hooks) for hook in part._forward_pre_hooks.values())
        for part in module.modules()
    )


class ForwardHook:
    """Changes nothing, but makes a parent that looks for hooks call the module."""

    def __call__(self, module: nn.Module, args: tuple) -> None:
        return None


@dataclass(eq=False)
class MaskHook:
    """Keeps which tokens are no padding until a sublayer's branch is there."""

    runtime: Runtime
    site: str

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.runtime.plan().branch.get(self.site):
            stash, key = self.runtime.local.stash, (self.site, "mask")
            stash.pop(key, None)
            shown, hidden = kwargs.get("attention_mask"), kwargs.get("key_padding_mask")
            if shown is not None:
                stash[key] = _shown(shown)
            elif hidden is not None:  # of nn.MultiheadAttention
                stash[key] = ~hidden if hidden.dtype == torch.bool else hidden > -1


def _shown(mask: Tensor) -> Tensor:
    """(B, N), True for the tokens that an attention mask shows.

    Of two dimensions it is 1 for them; of four, (B, 1, N, N), True or 0, and far below for others,
    the same for every query.
    """
    if mask.dim() == 2:
        return mask != 0
    mask = mask[:, 0, 0]
    return mask if mask.dtype == torch.bool else mask > -1


@dataclass(eq=False)
class GridHook:
    """Keeps how an image's patches lie until the branches of its tower's sublayers are there."""

    runtime: Runtime
    prefix: int
    sublayers: tuple[str, ...]

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        grid = Grid(self.prefix, output.shape[-2], output.shape[-1])
        branch, stash = self.runtime.plan().branch, self.runtime.local.stash
        for name in self.sublayers:
            if name in branch:
                stash[name, "grid"] = grid


def _sublayers(tower: Tower) -> tuple[str, ...]:
    """The names of a tower's sublayers."""
    return tuple(part.name for block in tower.blocks for part in block.sublayers.values())


@dataclass(eq=False)
class BranchHook:
    """Lets the active `Branch` modules act on a sublayer's output."""

    runtime: Runtime
    site: str

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        active = self.runtime.plan().branch.get(self.site)
        if not active:
            return None
        stash = self.runtime.local.stash
        branch = first_output(output)
        context = NO_CONTEXT
        if stash:
            context = Context(*[stash.pop((self.site, name), None) for name in CAPTURED])
        for adapter in active:
            branch = adapter(branch, context)
        return with_first(output, branch)


@dataclass(eq=False)
class EnterHook:
    """Lets active deltas that scale a linear map's input do so."""

    runtime: Runtime
    site: str

    def __call__(self, module: nn.Module, args: tuple) -> Any:
        active = self.runtime.plan().delta.get(self.site)
        if not active:
            return None
        x = args[0]
        for adapter in active:
            if adapter.scales_input:
                x = adapter.enter(x)
        return (x, *args[1:])


@dataclass(eq=False)
class LeafHook:
    """Lets the active `Delta` modules act on a called linear map or norm, fused or not."""

    runtime: Runtime
    leaves: list[Leaf]

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        delta = self.runtime.plan().delta
        if not any(leaf.name in delta for leaf in self.leaves):
            return None
        x = args[0]
        parts = self.leaves[0].parts
        if parts == 1:
            return _changed(delta, self.leaves[0], output, x)
        factors = self._factors(delta)
        if factors is not None:
            return plus_low_rank(output, x, factors)
        pieces = list(output.chunk(parts, dim=-1))
        for leaf in self.leaves:
            pieces[leaf.index] = _changed(delta, leaf, pieces[leaf.index], x)
        return torch.cat(pieces, dim=-1)

    def _factors(self, delta: Mapping[str, tuple[ActsOnLeaf, ...]]) -> list[list[Factors]] | None:
        """What acts on each part of a fused map; None unless all of it is plain low-rank change."""
        parts: list[list[Factors]] = [[] for _ in range(self.leaves[0].parts)]
        for leaf in self.leaves:
            for adapter in delta.get(leaf.name, ()):
                # What hooks of its own are to see must be called.
                seen = getattr(adapter, "_forward_hooks", None) or getattr(
                    adapter, "_forward_pre_hooks", None
                )
                found = None if seen else adapter.factors()
                if found is None:
                    return None
                parts[leaf.index].append(found)
        return parts


def _changed(
    delta: Mapping[str, tuple[ActsOnLeaf, ...]], leaf: Leaf, y: Tensor, x: Tensor
) -> Tensor:
    for adapter in delta.get(leaf.name, ()):
        y = adapter(y, x, leaf)
    return y


def _names(block: Block) -> set[str]:
    return {sublayer.name for sublayer in block.sublayers.values()}


@dataclass(eq=False)
class CopyHook:
    """Repeats the batch that enters a tower's first adapted block, and what comes with it there and
    further up (masks, the other tower's states).

    `crossed`: the tower looks at another one, whose states may have been repeated already.
    """

    runtime: Runtime
    tower: str
    index: int
    crossed: bool

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        plan = self.runtime.plan()
        start = plan.starts.get(self.tower)
        if start is None or self.index < start:
            return None
        x = first_input(args, kwargs)
        copies, batch = plan.copies, x.shape[0]
        if self.index > start:
            batch //= copies

        def repeated(value: Any, name: str = "") -> Any:
            if isinstance(value, tuple):
                return tuple(map(repeated, value))
            if value is x:
                return x if self.index > start else _repeated(x, copies)
            # Of two dimensions, (B, N), are masks of padding alone.
            least = 2 if name == "attention_mask" else 3
            if not isinstance(value, Tensor) or value.dim() < least or len(value) == 1 != batch:
                return value
            # Masks, states and biases by sample or by sample and head; all else is shared. T5's
            # first block hands biases of four dimensions on, repeated already.
            carried_on = self.index > start and value.dim() == 4
            done = (self.crossed or carried_on) and value.shape[0] == copies * batch
            return value if done or value.shape[0] % batch else _repeated(value, copies)

        # WavLM's first block makes these for all others, which hand them on.
        carried = {"position_bias"} if self.index > start else set()
        kwargs = {k: v if k in carried else repeated(v, k) for k, v in kwargs.items()}
        return tuple(map(repeated, args)), kwargs


def _repeated(x: Tensor, copies: int) -> Tensor:
    return x.repeat(copies, *(1,) * (x.dim() - 1))


@dataclass(eq=False)
class PromptHook:
    """Appends the active prompts to the tokens that enter a block."""

    runtime: Runtime
    site: str

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        active = self.runtime.plan().prompt.get(self.site)
        if not active:
            return None
        x = first_input(args, kwargs)
        length = x.shape[1]
        # Those that leave first stand last, in whatever order they act.
        for adapter in sorted(active, key=lambda adapter: adapter.replaces):
            x = torch.cat([x, adapter(x)], dim=1)
        count = x.shape[1] - length
        kwargs = {name: _seen(value, length, count) for name, value in kwargs.items()}
        args = tuple(_seen(value, length, count) for value in args)
        return with_first_input(args, kwargs, x)


def _seen(value: Any, length: int, count: int) -> Any:
    """An attention mask (B, H, N or 1, N) that also shows `count` more tokens; else `value`."""
    if not isinstance(value, Tensor) or value.dim() != 4 or value.shape[-1] != length:
        return value
    rows = count if value.shape[-2] == length else 0
    return F.pad(value, (0, count, 0, rows), value=value.dtype == torch.bool)


@dataclass(eq=False)
class UnpromptHook:
    """Removes from a block's output the prompts that the site's adapters appended."""

    runtime: Runtime
    site: str
    replaces: bool

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        active = self.runtime.plan().prompt.get(self.site, ())
        count = sum(adapter.count for adapter in active if adapter.replaces is self.replaces)
        if not count:
            return None
        tokens = first_output(output)
        return with_first(output, tokens[:, : tokens.shape[1] - count])


@dataclass(eq=False)
class StartHook:
    """Forgets what a tower's blocks gave in an earlier pass, in which LayerDrop may have left any
    of them out."""

    runtime: Runtime
    site: str

    def __call__(self, module: nn.Module, args: tuple) -> None:
        if self.runtime.plan().readout.get(self.site):
            self.runtime.local.states[self.site] = {}


@dataclass(eq=False)
class EntryHook:
    """The same on entering the first block; and keeps what entered."""

    runtime: Runtime
    site: str

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.runtime.plan().readout.get(self.site):
            self.runtime.local.states[self.site] = {-1: first_input(args, kwargs)}


@dataclass(eq=False)
class CollectHook:
    """Keeps what a block gave until its tower has run."""

    runtime: Runtime
    site: str
    index: int

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        # A library may run the blocks without their tower: then nothing reads them.
        states = self.runtime.local.states.get(self.site)
        if states is not None:
            states[self.index] = first_output(output)


@dataclass(eq=False)
class ReadoutHook:
    """Lets the active `Readout` modules act on what a tower gives last."""

    runtime: Runtime
    site: str

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        states = self.runtime.local.states.pop(self.site, None)
        if not states:
            return None
        last = first_output(output)
        for adapter in self.runtime.plan().readout.get(self.site, ()):
            last = adapter(last, states=states)
        return with_first(output, last)
