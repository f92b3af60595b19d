"""`FrozenTrunk`: the part of an encoder below its first adapted block, computed once.

Below that block nothing changes from one epoch to the next. `capture` returns the states there as
tensors that can be stored. Inside `resume` a pass starts from them: patch embedding, convolutional
front end and lower blocks are not run.
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
from ..injectors.calls import tensors_in
from ..injectors.plan import Plan
from ..plans.build import block_of
from ..sites.sitemap import Tower
from .record import RecordPass, TowerRecord, reads_layers
from .resume import AllStatesKept, CapturePass, ResumePass, ResumePoint, States, nan_filled

if TYPE_CHECKING:
    from ..model.model import AdapterModel

__all__ = ["FrozenTrunk", "States", "TowerTrunk", "placeholder"]

_RANDOM = (
    "its {module} is in train mode, where dropout and the like draw anew in every pass; keep the "
    "frozen encoder in eval mode (train_trunk=False)"
)


@dataclass(frozen=True)
class TowerTrunk:
    """Says which states of a tower are kept.

    Attributes:
        tower: its name.
        block: k, the first block that runs when the tower is resumed: blocks 0 to k-1 do not run.
            If k is the number of blocks, none runs.
        layers: the blocks whose outputs are kept, ascending; -1 is the input of block 0. The last
            one is k-1; the others are those that something above reads.
    """

    tower: str
    block: int
    layers: tuple[int, ...]


class FrozenTrunk:
    """The frozen lower part of an encoder, above which the passes of a model can start.

    It is valid for the adapters that were active when it was made, for the model's modes and dtype
    and for that kind of pass. In a tower that is resumed, every state that is not kept is NaN.

    Attributes:
        model: the model with the encoder.
        towers: the towers of which states can be kept; may be empty.
        skipped: by tower of which no state is kept, the reason, as the end of a sentence.
    """

    def __init__(
        self, model: AdapterModel, points: Mapping[str, ResumePoint], *, skipped: Mapping[str, str]
    ) -> None:
        self.model = model
        self.towers = tuple(TowerTrunk(p.tower.name, p.block, p.layers) for p in points.values())
        self.skipped = dict(skipped)
        self._points = dict(points)
        # Used again: torch.compile compiles anew for another object.
        self._idle: list[ResumePass] = []

    @classmethod
    def of(
        cls,
        model: AdapterModel,
        run: Callable[[], Any],
        *,
        setups: Iterable[Setup] = (),
    ) -> FrozenTrunk:
        """Finds the states that can be kept while the adapters of this thread are active.

        For `train_adapter(drop=(least, most))` the least number of dropped blocks counts.

        Args:
            run: a pass on one real batch. It is called once, and its result is held meanwhile.
            setups: other compositions that will be active in resumed passes.
        """
        runtime = model.store.runtime
        plans = _plans(model, setups)
        recorded = RecordPass.of(runtime)
        depths = {name: len(tower.blocks) for name, tower in runtime.sites.towers.items()}
        outside = _outside_of_blocks(model)
        grad = any(parameter.requires_grad for _, parameter in outside)
        with (
            runtime.interceptors.passing(recorded, depths, depths),
            torch.set_grad_enabled(grad),
        ):
            result = run()
            recorded.forget()
        points: dict[str, ResumePoint] = {}
        skipped: dict[str, str] = {}
        for name, record in recorded.records.items():
            reason = _reason(model, record)
            block = _first_block(plans, record)
            if reason is None and block < 0:
                reason = "adapters act on its convolutional front end"
            if reason is not None:
                skipped[name] = reason
                continue
            reads = set(recorded.reads(plans[0], name, block))
            if any(reads_layers(plan, record.tower) for plan in plans[1:]):
                # This pass does not show which layers the readouts of other setups read.
                reads.update(range(-1, block))
            layers = (*sorted(layer for layer in reads if layer < block - 1), block - 1)
            dtypes = {layer: record.dtypes[layer] for layer in layers}
            points[name] = ResumePoint(
                tower=record.tower,
                block=block,
                layers=layers,
                dtypes=dtypes,
                outputs=record.outputs,
                stem=record.stem,
            )
        del result
        return cls(model, points, skipped=skipped)

    def capture(self, run: Callable[[], Any]) -> States:
        """Returns the states of `run`'s pass, (B, N, D) by tower and layer.

        There are no gradients, and nothing above the states is computed.

        Raises:
            ValueError: a tower does not run in the pass.
        """
        if not self._points:
            return {}
        capture = CapturePass(self._points)
        depths = {name: len(point.tower.blocks) for name, point in self._points.items()}
        entered = [name for name, point in self._points.items() if -1 in point.layers]
        runtime = self.model.store.runtime
        with (
            runtime.interceptors.passing(capture, depths, entered),
            torch.no_grad(),
            contextlib.suppress(AllStatesKept),
        ):
            run()
        runtime.local.states.clear()
        for name, point in self._points.items():
            if any((name, layer) not in capture.states for layer in point.layers):
                raise ValueError(
                    f"tower {name!r} did not run as far as block {point.block - 1} in this pass, "
                    "unlike in the one that FrozenTrunk.of has seen"
                )
        return capture.states

    @contextlib.contextmanager
    def resume(self, states: Mapping[tuple[str, int], Tensor]) -> Iterator[None]:
        """Inside the block, in this thread alone, passes start from `states` of the same batch.

        Modules that do not run use the shape of their inputs only; see `placeholder`.

        Raises:
            ValueError: a state is missing, or an adapter acts below the block by now; and in the
                pass, if the states have another shape than the batch asks for.
        """
        self._check_states(states)
        self._check_active()
        passing = self._idle.pop() if self._idle else ResumePass(self._points)
        passing.states = states
        try:
            with self._entered(passing):
                yield
        finally:
            passing.states = {}
            self._idle.append(passing)

    def _entered(self, passing: ResumePass) -> contextlib.AbstractContextManager[None]:
        blocks = {name: point.block for name, point in passing.points.items()}
        entered = [name for name, point in passing.points.items() if -1 in point.layers]
        return self.model.store.runtime.interceptors.passing(passing, blocks, entered)

    def _check_states(self, states: Mapping[tuple[str, int], Tensor]) -> None:
        for name, point in self._points.items():
            for layer in point.layers:
                if (name, layer) not in states:
                    raise ValueError(
                        f"there is no state of layer {layer} of tower {name!r}; it needs those of "
                        f"{', '.join(map(str, point.layers))}"
                    )

    def _check_active(self) -> None:
        for plan in _plans(self.model):
            for name, point in self._points.items():
                block = _lowest(plan, point.tower)
                if block < point.block:
                    raise ValueError(
                        f"adapters act at block {block} of tower {name!r} now, and its states were "
                        f"kept to start at block {point.block}: make a FrozenTrunk of what is "
                        "active"
                    )

    def check(
        self,
        run: Callable[[], Any],
        *,
        resumed: Callable[[], Any] | None = None,
        tolerance: float = 1e-5,
    ) -> None:
        """Compares the result of `run` in a plain pass with its result in a resumed pass.

        Call it while the modules around the encoder are in eval mode too: `run` is called several
        times.

        Args:
            resumed: is called instead of `run` in the resumed pass, e.g. on placeholders.
            tolerance: the largest difference, relative to the largest number of each tensor.

        Raises:
            ValueError: a tensor differs; names the tower that causes it.
        """
        with torch.no_grad():
            with _same_randomness(self.model):
                plain = list(tensors_in(run()))
            states = self.capture(run)
            for name, point in self._points.items():
                alone = ResumePass({name: point}, states)
                with _same_randomness(self.model), self._entered(alone):
                    again = list(tensors_in(run()))
                self._compare(plain, again, f"tower {name!r}", tolerance)
            if resumed is not None:
                with _same_randomness(self.model), self.resume(states):
                    again = list(tensors_in(resumed()))
                what = f"what resumes {' and '.join(map(repr, self._points))}"
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
        """Returns the SHA-256 of the weights and buffers on which the kept states depend.

        It covers all frozen tensors of the encoder, merged adapters included, except those of
        blocks that run when resumed.
        """
        above = {
            id(tensor)
            for point in self._points.values()
            for block in point.tower.blocks[point.block :]
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
    """Returns a tensor that replaces images or waveforms of `shape` in a resumed pass.

    It is NaN everywhere (0 if the dtype has no NaN) and takes the memory of one number.
    """
    return nan_filled(shape, dtype=dtype, device=torch.device(device))


def _plans(model: AdapterModel, setups: Iterable[Setup] = ()) -> list[Plan]:
    """Returns the plans of what acts in this thread and of each of `setups`."""
    runtime = model.store.runtime
    plans = [runtime.plan()]
    drop = model.store.drop
    if runtime.local.plan is None and model.store.random_drop is not None:
        drop = model.store.random_drop[0]
        plans = [model.store.plan(model.store.composition, drop)]
    return plans + [model.store.plan(parse(setup), drop) for setup in setups]


def _lowest(plan: Plan, tower: Tower) -> int:
    """Returns the first block of a tower at which an adapter acts.

    That is -1 if one acts before all blocks, and the number of blocks if none acts at a block.
    """
    names, front = set(tower.site_names()), {layer.name for layer in tower.front}
    depth = len(tower.blocks)
    blocks = [
        -1 if site in front else block_of(site)
        for kind, site, _ in plan.entries()
        if kind != "readout" and site in names
    ]
    return int(min([depth, *blocks, plan.starts.get(tower.name, depth)]))


def _first_block(plans: Iterable[Plan], record: TowerRecord) -> int:
    """Returns the first block that must run.

    An adapter acts there, or it is trained, or its input is known from the pass itself only.
    """
    trained = (
        block.index
        for block in record.tower.blocks
        if any(parameter.requires_grad for parameter in block.module.parameters())
    )
    bounds = [_lowest(plan, record.tower) for plan in plans]
    bounds.append(next(trained, len(record.tower.blocks)))
    bounds.append(max(record.order, default=0) + 1)
    if record.bound is not None:
        bounds.append(record.bound)
    return min(bounds)


def _reason(model: AdapterModel, record: TowerRecord) -> str | None:
    """Returns why no state of a tower can be kept, whatever acts, or None if states can be kept."""
    tower = record.tower
    if not record.order:
        return "it did not run in this pass"
    if record.order.count(record.order[0]) > 1:
        return f"it ran {record.order.count(record.order[0])} times in one pass"
    if tower.crossed:
        return "its blocks attend to another tower"
    if record.turns is not None:
        return f"it takes turns with tower {record.turns!r}"
    if record.order != list(range(len(record.order))):
        return "its blocks did not run one after another"
    if record.handed is not None:
        return (
            f"its block {record.handed} hands more than one tensor on to the next one (position "
            "biases, attention scores)"
        )
    for name, parameter in _outside_of_blocks(model):
        stem = any(parameter is other for part in tower.stem for other in part.module.parameters())
        if stem and parameter.requires_grad:
            return f"{name}, before its blocks, is trained"
    if record.trained:
        return "what enters its first block is trained"
    return _randomness(model)


def _randomness(model: AdapterModel) -> str | None:
    """Returns why passes of the encoder are random, or None if they are not.

    Modules outside of blocks count too: those that run the blocks apply LayerDrop and SpecAugment.
    """
    if model.train_trunk:
        return _RANDOM.format(module="encoder")
    for name, module in model.backbone.named_modules():
        if module.training:
            return _RANDOM.format(module=repr(name) if name else "encoder")
    return None


def _outside_of_blocks(model: AdapterModel) -> list[tuple[str, nn.Parameter]]:
    """Returns the encoder's parameters outside of blocks, with their names."""
    inside = {
        id(parameter) for block in model.sites.blocks() for parameter in block.module.parameters()
    }
    return [(n, p) for n, p in model.backbone.named_parameters() if id(p) not in inside]


@contextlib.contextmanager
def _same_randomness(model: AdapterModel) -> Iterator[None]:
    """Restores the random state after the block, so that the next one draws the same numbers."""
    cuda = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=cuda):
        yield


def _distance(plain: Tensor, again: Tensor) -> float:
    """Returns the largest difference, relative to the largest number if that is above 1."""
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
