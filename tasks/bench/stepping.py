"""One case, ready to be run over and over: a forward pass, a training step, a switch, a load."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.timing import kept_for_backward, seconds
from .cases import MIXED, Case
from .contenders import Bare, Contender, Merged, Ours, Work
from .encoders import Inputs, make_inputs, pooled
from .peers import AdapterHub, Peft

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LIBRARIES: dict[str, Callable[[nn.Module, Work], Contender]] = {
    "torch": Bare,
    "mmadapters": Ours,
    "peft": Peft,
    "adapters": AdapterHub,
}
CLASSES = 100
LEARNING_RATE = 1e-6  # so small that hundreds of steps leave the weights about as they are
WARM = 2
# A turn on an accelerator is so many calls in a row that waiting for their end weighs nothing.
TURN_SECONDS = {"cuda": 0.1, "cpu": 0.02}


@dataclass(frozen=True, kw_only=True)
class Place:
    """What all cases of a worker have in common.

    Attributes:
        encoder: on the CPU, in fp32; each case works on a copy.
    """

    encoder: nn.Module
    device: torch.device
    precision: str
    seconds: float
    size: int

    def make(self) -> nn.Module:
        return copy.deepcopy(self.encoder).to(self.device, DTYPES[self.precision])


@dataclass(kw_only=True)
class Runner:
    """`run` is what is timed, `after` what must follow each call, untimed.

    Attributes:
        parameters: how many are trained, without the head; 0 where nothing is.
        kept: bytes that a step's forward pass keeps for its backward pass, without parameters.
        peak: the most bytes that a step allocates on an accelerator, the model's included.
        times: calls in a row that make a turn.
    """

    run: Callable[[], object]
    after: Callable[[], object] | None = None
    parameters: int = 0
    kept: int | None = None
    peak: int | None = None
    times: int = 1
    held: list[Any] = field(default_factory=list)

    def turn(self, device: torch.device) -> float:
        """Seconds of one call."""
        found = seconds(self.run, device, times=self.times)
        if self.after is not None:
            self.after()
        return found

    def settle(self, device: torch.device) -> None:
        """Warms up, and finds how many calls make a turn."""
        once = [self.turn(device) for _ in range(WARM)]
        if self.after is None:
            self.times = min(1000, max(1, math.ceil(TURN_SECONDS[device.type] / once[-1])))


def prepare(case: Case, place: Place) -> Runner:
    """A case that has run a few times already.

    Raises:
        whatever the libraries do where they cannot do this.
    """
    makers: dict[str, Callable[[Case, Place], Runner]] = {
        "forward": _forward,
        "mixed": _forward,
        "step": _step,
        "cached": _step,
        "switch": _switch,
        "load": _load,
    }
    runner = makers[case.kind](case, place)
    runner.settle(place.device)
    return runner


def _contender(case: Case, place: Place, *, adapters: int = 1) -> Contender:
    names = [f"a{index % MIXED}" for index in range(case.batch)] if case.kind == "mixed" else []
    work = Work(
        method=case.method,
        size=place.size,
        start=case.start,
        adapters=MIXED if names else adapters,
        mixed=tuple(names),
    )
    if case.library == "mmadapters" and case.method.endswith(" merged"):
        return Merged(place.make(), work)
    return LIBRARIES[case.library](place.make(), work)


def _inputs(case: Case, place: Place) -> Inputs:
    inputs = make_inputs(place.encoder, case.batch, seconds=place.seconds)
    dtype = DTYPES[place.precision]
    return inputs.mapped(
        lambda tensor: tensor.to(place.device, dtype if tensor.is_floating_point() else None)
    )


def _call(case: Case, contender: Contender, inputs: Inputs) -> Callable[[], Any]:
    if case.mode.startswith("compile"):
        return partial(inputs, torch.compile(contender.model))
    return partial(contender.forward, inputs)


def _forward(case: Case, place: Place) -> Runner:
    contender = _contender(case, place)
    call = _call(case, contender, _inputs(case, place))
    if case.mode.endswith("graph"):
        call = _captured(call)
    # What is merged adds nothing to what runs.
    parameters = 0 if "merged" in case.method else _count(contender.trainable)
    return Runner(run=_without_gradients(call), parameters=parameters, held=[contender])


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _without_gradients(call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return call()

    return run


def _captured(call: Callable[[], object]) -> Callable[[], object]:
    """The CUDA graph of a call, whose inputs stay where they are."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        call()
    return graph.replay


def _step(case: Case, place: Place) -> Runner:
    cuda = place.device.type == "cuda"
    before = torch.cuda.memory_allocated(place.device) if cuda else 0
    contender = _contender(case, place)
    inputs = _inputs(case, place)
    loss = _loss(case, place, contender, inputs)
    trained = contender.trainable
    optimizer = torch.optim.AdamW([*trained, *loss.head.parameters()], LEARNING_RATE, fused=cuda)
    contender.train()

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    with kept_for_backward([*contender.model.parameters(), *loss.head.parameters()]) as kept:
        loss().backward()
    optimizer.zero_grad()
    step()
    runner = Runner(run=step, parameters=_count(trained), kept=kept.bytes)
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(place.device)
        step()
        runner.peak = torch.cuda.max_memory_allocated(place.device) - before
    return runner


@dataclass
class _Loss:
    """Cross-entropy of a linear head on pooled features, whatever gives these."""

    features: Callable[[], Tensor]
    head: nn.Linear
    targets: Tensor

    def __call__(self) -> Tensor:
        return F.cross_entropy(self.head(self.features()).float(), self.targets)


def _loss(case: Case, place: Place, contender: Contender, inputs: Inputs) -> _Loss:
    with torch.no_grad():
        width = pooled(contender.forward(inputs)).shape[-1]
    if case.kind == "cached":
        features = _from_cached_prefix(case, contender, inputs)
    else:
        features = partial(_pooled, _call(case, contender, inputs))
    head = nn.Linear(width, CLASSES, device=place.device, dtype=DTYPES[place.precision])
    targets = torch.arange(case.batch, device=place.device) % CLASSES
    return _Loss(features, head, targets)


def _pooled(call: Callable[..., Any], *arguments: Any) -> Tensor:
    return pooled(call(*arguments))


def _from_cached_prefix(case: Case, contender: Contender, inputs: Inputs) -> Callable[[], Tensor]:
    """Passes that start from the stored states that enter the first adapted block, which are
    where the encoder is already.

    Raises:
        ValueError: a tower cannot start there, or gives something else then.
    """
    from mmadapters.trunk.frozen import FrozenTrunk, placeholder

    def empty(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return placeholder(tensor.shape, dtype=tensor.dtype, device=tensor.device)

    assert isinstance(contender, Ours)
    model = contender.model
    contender.train()
    # Pooled, as an encoder gives more than that, and what is read below the states is not there.
    whole, hollow = partial(_pooled, inputs, model), partial(_pooled, inputs.mapped(empty), model)
    prefix = FrozenTrunk.of(model, whole)
    for tower, why in prefix.skipped.items():
        raise ValueError(f"nothing of tower {tower!r} is kept: {why}")
    tolerance = 1e-5 if next(model.parameters()).dtype == torch.float32 else 2e-2
    prefix.check(whole, resumed=hollow, tolerance=tolerance)
    states = prefix.capture(whole)
    if case.mode == "compile":
        hollow = partial(_pooled, inputs.mapped(empty), torch.compile(model))

    def resumed() -> Tensor:
        with prefix.resume(states):
            return hollow()

    return resumed


def _switch(case: Case, place: Place) -> Runner:
    contender = _contender(case, place, adapters=2)
    turns = count(1)
    return Runner(run=lambda: contender.switch(f"a{next(turns) % 2}"), held=[contender])


def _load(case: Case, place: Place) -> Runner:
    contender = _contender(case, place)
    folder = TemporaryDirectory()
    where = Path(folder.name) / "adapter"
    contender.save(where)
    return Runner(
        run=lambda: contender.load(where), after=contender.unload, held=[contender, folder]
    )
