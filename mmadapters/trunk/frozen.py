"""`FrozenTrunk`: the part of an encoder below its first adapted block, computed once.

Below that block nothing changes from one epoch to the next. `capture` computes what passes through
there, as tensors that can be stored, and inside `resume` a pass starts from them: patch embedding,
convolutional front end and lower blocks are not run.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..composition import Setup, parse
from ..injectors import intercept
from ..injectors.calls import tensors_in
from ..injectors.installer import Plan
from ..injectors.intercept import Capturing, Enough, Kept, Resuming, States
from ..plans.build import block_of
from ..sites.sitemap import Tower
from .record import Recording, Seen, reads_layers

if TYPE_CHECKING:
    from ..model.model import AdapterModel

__all__ = ["FrozenTrunk", "States", "TowerTrunk", "placeholder"]

_DRAWS = (
    "its {module} is in train mode, where dropout and the like draw anew in every pass; keep the "
    "frozen encoder in eval mode (train_trunk=False)"
)


@dataclass(frozen=True)
class TowerTrunk:
    """What of a tower is kept.

    block: k; blocks 0 to k-1 do not run when resumed. len(blocks): none does.
    layers: the blocks whose outputs are kept, ascending; -1 is what enters block 0. The last one is
        k-1, the others are those that something above reads.
    """

    tower: str
    block: int
    layers: tuple[int, ...]


class FrozenTrunk:
    """How the passes of a model can start above what is frozen.

    It holds for what acted when it was made, for the model's modes and dtype and for that kind of
    pass. Of a tower that is resumed, what is not kept is NaN wherever something reads it.

    Attributes:
        towers: what can be kept; may be empty.
        skipped: by tower, a sentence's end that says why nothing of it is kept.
    """

    def __init__(
        self, model: AdapterModel, kept: Mapping[str, Kept], skipped: Mapping[str, str]
    ) -> None:
        self.model = model
        self.towers = tuple(TowerTrunk(k.tower.name, k.block, k.layers) for k in kept.values())
        self.skipped = dict(skipped)
        self._kept = dict(kept)
        # Used again: torch.compile compiles anew for another object.
        self._idle: list[Resuming] = []

    @classmethod
    def of(
        cls,
        model: AdapterModel,
        run: Callable[[], Any],
        *,
        setups: Iterable[Setup] = (),
    ) -> FrozenTrunk:
        """What can be kept for what is active now, in this thread.

        Of `train_adapter(drop=(least, most))` the least is taken.

        Args:
            run: a pass on one real batch; called once, its result is looked at while this runs.
            setups: what else will act in passes that are resumed.
        """
        runtime = model.store.runtime
        plans = _plans(model, setups)
        recording = Recording.of(runtime)
        depths = {name: len(tower.blocks) for name, tower in runtime.sites.towers.items()}
        outside = _outside_of_blocks(model)
        grad = any(parameter.requires_grad for _, parameter in outside)
        with (
            intercept.passing(runtime, recording, depths, depths),
            torch.set_grad_enabled(grad),
        ):
            result = run()
            recording.forget()
        kept: dict[str, Kept] = {}
        skipped: dict[str, str] = {}
        for name, seen in recording.seen.items():
            reason = _reason(model, seen)
            block = _first_block(plans, seen)
            if reason is None and block < 0:
                reason = "adapters act on its convolutional front end"
            if reason is not None:
                skipped[name] = reason
                continue
            reads = set(recording.reads(plans[0], name, block))
            if any(reads_layers(plan, seen.tower) for plan in plans[1:]):
                # Which layers the readouts of other setups read is not seen in this pass.
                reads.update(range(-1, block))
            layers = (*sorted(layer for layer in reads if layer < block - 1), block - 1)
            dtypes = {layer: seen.dtypes[layer] for layer in layers}
            kept[name] = Kept(seen.tower, block, layers, dtypes, seen.forms, seen.stem)
        del result
        return cls(model, kept, skipped)

    def capture(self, run: Callable[[], Any]) -> States:
        """The states of `run`'s pass, (B, N, D) by tower and layer; no gradients, and nothing above
        them is computed.

        Raises:
            ValueError: a tower does not run in it.
        """
        if not self._kept:
            return {}
        capturing = Capturing(self._kept)
        depths = {name: len(kept.tower.blocks) for name, kept in self._kept.items()}
        entered = [name for name, kept in self._kept.items() if -1 in kept.layers]
        local = self.model.store.runtime.local
        with (
            intercept.passing(self.model.store.runtime, capturing, depths, entered),
            torch.no_grad(),
            contextlib.suppress(Enough),
        ):
            run()
        local.states.clear()
        for name, kept in self._kept.items():
            if any((name, layer) not in capturing.states for layer in kept.layers):
                raise ValueError(
                    f"tower {name!r} did not run as far as block {kept.block - 1} in this pass, "
                    "unlike in the one that FrozenTrunk.of has seen"
                )
        return capturing.states

    @contextlib.contextmanager
    def resume(self, states: Mapping[tuple[str, int], Tensor]) -> Iterator[None]:
        """Inside the block, in this thread alone, passes start from `states`, of the same batch.

        Inputs of the modules that do not run are looked at for their shape only; see `placeholder`.

        Raises:
            ValueError: a state is missing, or something acts below the block by now; and in the
                pass, if the states have another shape than the batch asks for.
        """
        self._check_states(states)
        self._check_active()
        passing = self._idle.pop() if self._idle else Resuming(self._kept)
        passing.states = states
        try:
            with self._entered(passing):
                yield
        finally:
            passing.states = {}
            self._idle.append(passing)

    def _entered(self, passing: Resuming) -> contextlib.AbstractContextManager[None]:
        blocks = {name: kept.block for name, kept in passing.kept.items()}
        entered = [name for name, kept in passing.kept.items() if -1 in kept.layers]
        return intercept.passing(self.model.store.runtime, passing, blocks, entered)

    def _check_states(self, states: Mapping[tuple[str, int], Tensor]) -> None:
        for name, kept in self._kept.items():
            for layer in kept.layers:
                if (name, layer) not in states:
                    raise ValueError(
                        f"there is no state of layer {layer} of tower {name!r}; it needs those of "
                        f"{', '.join(map(str, kept.layers))}"
                    )

    def _check_active(self) -> None:
        for plan in _plans(self.model):
            for name, kept in self._kept.items():
                block = _lowest(plan, kept.tower)
                if block < kept.block:
                    raise ValueError(
                        f"adapters act at block {block} of tower {name!r} now, and its states were "
                        f"kept to start at block {kept.block}: make a FrozenTrunk of what is "
                        "active"
                    )

    def check(
        self,
        run: Callable[[], Any],
        *,
        resumed: Callable[[], Any] | None = None,
        tolerance: float = 1e-5,
    ) -> None:
        """Compares what `run` gives plainly with what it gives resumed.

        Call it with what runs around the encoder in eval mode too: `run` is called several times.

        Args:
            resumed: what runs in the place of `run` when resumed, e.g. on placeholders.
            tolerance: the largest difference, relative to the largest number of each tensor.

        Raises:
            ValueError: a tensor differs; names the tower that is at fault.
        """
        with torch.no_grad():
            with _same_draws(self.model):
                plain = list(tensors_in(run()))
            states = self.capture(run)
            for name, kept in self._kept.items():
                with _same_draws(self.model), self._entered(Resuming({name: kept}, states)):
                    again = list(tensors_in(run()))
                self._compare(plain, again, f"tower {name!r}", tolerance)
            if resumed is not None:
                with _same_draws(self.model), self.resume(states):
                    again = list(tensors_in(resumed()))
                what = f"what resumes {' and '.join(map(repr, self._kept))}"
                self._compare(plain, again, what, tolerance)

    def _compare(
        self, plain: list[Tensor], again: list[Tensor], what: str, tolerance: float
    ) -> None:
        problem = None
        if [tensor.shape for tensor in plain] != [tensor.shape for tensor in again]:
            problem = "its outputs have other shapes"
        elif not plain:
            problem = "there is no tensor in what the pass gives"
        else:
            furthest = max(map(_distance, plain, again))
            if not furthest <= tolerance:
                problem = f"its outputs differ by {furthest:.1e} of their largest number"
        if problem is not None:
            raise ValueError(
                f"{what} is not the same when resumed from kept states: {problem}; something reads "
                "inputs or blocks that do not run"
            )

    def fingerprint(self) -> str:
        """SHA-256 of the weights and buffers that the kept states depend on, merged adapters
        included: of all that is frozen in the encoder but the blocks that run when resumed."""
        above = {
            id(tensor)
            for kept in self._kept.values()
            for block in kept.tower.blocks[kept.block :]
            for tensor in (*block.module.parameters(), *block.module.buffers())
        }
        digest = hashlib.sha256()
        backbone = self.model.backbone
        for name, tensor in (*backbone.named_parameters(), *backbone.named_buffers()):
            if id(tensor) not in above and not tensor.requires_grad:
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
                digest.update(values.numpy().data)
        return digest.hexdigest()


def placeholder(
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """What stands for images or waveforms of `shape` in a resumed pass: NaN (0 of whole numbers)
    everywhere, in the memory of one number."""
    return intercept.void(shape, dtype=dtype, device=torch.device(device))


def _plans(model: AdapterModel, setups: Iterable[Setup] = ()) -> list[Plan]:
    """What may act in a pass of this thread, and with `setups`."""
    runtime = model.store.runtime
    plans = [runtime.plan()]
    drop = model.store.drop
    if runtime.local.plan is None and model.store.random_drop is not None:
        drop = model.store.random_drop[0]
        plans = [model.store.plan(model.store.composition, drop)]
    return plans + [model.store.plan(parse(setup), drop) for setup in setups]


def _lowest(plan: Plan, tower: Tower) -> int:
    """The first block of a tower at which something acts; -1 if it acts before all blocks, their
    number if at none of them."""
    names, front = set(tower.site_names()), {layer.name for layer in tower.front}
    depth = len(tower.blocks)
    found = [
        -1 if site in front else block_of(site)
        for kind, site, _ in plan.entries()
        if kind != "readout" and site in names
    ]
    return int(min([depth, *found, plan.starts.get(tower.name, depth)]))


def _first_block(plans: Iterable[Plan], seen: Seen) -> int:
    """The first block that must run: something acts there, it is trained, or nothing but the pass
    itself says what enters it."""
    trained = (
        block.index
        for block in seen.tower.blocks
        if any(parameter.requires_grad for parameter in block.module.parameters())
    )
    bounds = [_lowest(plan, seen.tower) for plan in plans]
    bounds.append(next(trained, len(seen.tower.blocks)))
    bounds.append(max(seen.order, default=0) + 1)
    if seen.bound is not None:
        bounds.append(seen.bound)
    return min(bounds)


def _reason(model: AdapterModel, seen: Seen) -> str | None:
    """Why nothing of a tower can be kept, whatever acts; None if it can be."""
    tower = seen.tower
    if not seen.order:
        return "it did not run in this pass"
    if seen.order.count(seen.order[0]) > 1:
        return f"it ran {seen.order.count(seen.order[0])} times in one pass"
    if tower.crossed:
        return "its blocks look at another tower"
    if seen.turns is not None:
        return f"it takes turns with tower {seen.turns!r}"
    if seen.order != list(range(len(seen.order))):
        return "its blocks did not run one after another"
    if seen.handed is not None:
        return (
            f"its block {seen.handed} hands more than one tensor on to the next one (position "
            "biases, attention scores)"
        )
    for name, parameter in _outside_of_blocks(model):
        stem = any(parameter is own for part in tower.stem for own in part.module.parameters())
        if stem and parameter.requires_grad:
            return f"{name}, before its blocks, is trained"
    if seen.trained:
        return "what enters its first block is trained"
    return _drawing(model)


def _drawing(model: AdapterModel) -> str | None:
    """Modules outside of blocks count too: LayerDrop and SpecAugment are of what runs them."""
    if model.train_trunk:
        return _DRAWS.format(module="encoder")
    for name, module in model.backbone.named_modules():
        if module.training:
            return _DRAWS.format(module=repr(name) if name else "encoder")
    return None


def _outside_of_blocks(model: AdapterModel) -> list[tuple[str, nn.Parameter]]:
    inside = {
        id(parameter) for block in model.sites.blocks() for parameter in block.module.parameters()
    }
    return [(n, p) for n, p in model.backbone.named_parameters() if id(p) not in inside]


@contextlib.contextmanager
def _same_draws(model: AdapterModel) -> Iterator[None]:
    """Inside the block random numbers are drawn from where they stand now, and then again."""
    cuda = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=cuda):
        yield


def _distance(plain: Tensor, again: Tensor) -> float:
    """The largest difference, relative to the largest number where that is above 1."""
    if not plain.numel():
        return 0.0
    if not plain.is_floating_point():
        return 0.0 if torch.equal(plain, again) else float("inf")
    finite = plain.isfinite()
    if not torch.equal(finite, again.isfinite()):
        return float("inf")
    difference = (plain - again)[finite].abs()
    if not difference.numel():
        return 0.0
    scale = plain[finite].abs().max().clamp(min=1)
    return float(difference.max() / scale)
