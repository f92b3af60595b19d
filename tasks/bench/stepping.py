"""Prepares one case to run many times: a forward pass, a training step, a switch or a load."""

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
from .contenders import Bare, Contender, MergedContender, Ours, Work
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
LEARNING_RATE = 1e-6  # small, so that hundreds of steps hardly change the weights
WARM = 2  # number of calls before timing
# A turn has enough calls in a row that waiting for the accelerator at its end does not matter.
TURN_SECONDS = {"cuda": 0.1, "cpu": 0.02}


@dataclass(frozen=True, kw_only=True)
class WorkerSetup:
    """The encoder and the settings that all cases of a worker share.

    Attributes:
        encoder: on the CPU, in fp32; each case works on a copy.
        device: where the cases run.
        precision: a key of `DTYPES`, of weights and inputs.
        seconds: length of a waveform.
        size: bottleneck size.
    """

    encoder: nn.Module
    device: torch.device
    precision: str
    seconds: float
    size: int

    def make(self) -> nn.Module:
        """Returns a copy of the encoder on the device, in the precision."""
        return copy.deepcopy(self.encoder).to(self.device, DTYPES[self.precision])


@dataclass(kw_only=True)
class Runner:
    """A prepared case.

    Attributes:
        run: the timed call.
        after: an untimed call that must follow each turn, or None.
        parameters: number of trained parameters without the head; 0 if none is trained.
        kept: bytes that a step's forward pass keeps for its backward pass, without parameters.
        peak: most bytes that a step allocates on an accelerator, with the model's weights.
        times: number of calls in a turn.
        held: objects that must live as long as the runner.
    """

    run: Callable[[], object]
    after: Callable[[], object] | None = None
    parameters: int = 0
    kept: int | None = None
    peak: int | None = None
    times: int = 1
    held: list[Any] = field(default_factory=list)

    def turn(self, device: torch.device) -> float:
        """Runs a turn and returns the seconds of one call."""
        duration = seconds(self.run, device, times=self.times)
        if self.after is not None:
            self.after()
        return duration

    def calibrate(self, device: torch.device) -> None:
        """Warms up and sets the number of calls in a turn."""
        once = [self.turn(device) for _ in range(WARM)]
        if self.after is None:
            self.times = min(1000, max(1, math.ceil(TURN_SECONDS[device.type] / once[-1])))


def prepare(case: Case, setup: WorkerSetup) -> Runner:
    """Prepares a case and runs it a few times.

    Raises:
        Exception: any error of a library that cannot run the case.
    """
    makers: dict[str, Callable[[Case, WorkerSetup], Runner]] = {
        "forward": _forward,
        "mixed": _forward,
        "step": _step,
        "cached": _step,
        "switch": _switch,
        "load": _load,
    }
    runner = makers[case.kind](case, setup)
    runner.calibrate(setup.device)
    return runner


def _contender(case: Case, setup: WorkerSetup, *, adapters: int = 1) -> Contender:
    names = [f"a{index % MIXED}" for index in range(case.batch)] if case.kind == "mixed" else []
    work = Work(
        method=case.method,
        size=setup.size,
        start=case.start,
        adapters=MIXED if names else adapters,
        mixed=tuple(names),
    )
    if case.library == "mmadapters" and case.method.endswith(" merged"):
        return MergedContender(setup.make(), work)
    return LIBRARIES[case.library](setup.make(), work)


def _inputs(case: Case, setup: WorkerSetup) -> Inputs:
    inputs = make_inputs(setup.encoder, case.batch, seconds=setup.seconds)
    dtype = DTYPES[setup.precision]
    return inputs.mapped(
        lambda tensor: tensor.to(setup.device, dtype if tensor.is_floating_point() else None)
    )


def _call(case: Case, contender: Contender, inputs: Inputs) -> Callable[[], Any]:
    if case.mode.startswith("compile"):
        return partial(inputs, torch.compile(contender.model))
    return partial(contender.forward, inputs)


def _forward(case: Case, setup: WorkerSetup) -> Runner:
    contender = _contender(case, setup)
    call = _call(case, contender, _inputs(case, setup))
    if case.mode.endswith("graph"):
        call = _captured(call)
    # A merged adapter adds no parameters to the forward pass.
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
    """Captures a call as a CUDA graph; its inputs must stay at the same addresses."""
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


def _step(case: Case, setup: WorkerSetup) -> Runner:
    cuda = setup.device.type == "cuda"
    before = torch.cuda.memory_allocated(setup.device) if cuda else 0
    contender = _contender(case, setup)
    inputs = _inputs(case, setup)
    loss = _loss(case, setup, contender, inputs)
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
        torch.cuda.reset_peak_memory_stats(setup.device)
        step()
        runner.peak = torch.cuda.max_memory_allocated(setup.device) - before
    return runner


@dataclass
class _Loss:
    """Computes the cross-entropy of a linear head on pooled features.

    Attributes:
        features: computes the features (B, D).
        targets: (B,) int64.
    """

    features: Callable[[], Tensor]
    head: nn.Linear
    targets: Tensor

    def __call__(self) -> Tensor:
        return F.cross_entropy(self.head(self.features()).float(), self.targets)


def _loss(case: Case, setup: WorkerSetup, contender: Contender, inputs: Inputs) -> _Loss:
    with torch.no_grad():
        width = pooled(contender.forward(inputs)).shape[-1]
    if case.kind == "cached":
        features = _from_cached_trunk(case, contender, inputs)
    else:
        features = partial(_pooled, _call(case, contender, inputs))
    head = nn.Linear(width, CLASSES, device=setup.device, dtype=DTYPES[setup.precision])
    targets = torch.arange(case.batch, device=setup.device) % CLASSES
    return _Loss(features, head, targets)


def _pooled(call: Callable[..., Any], *arguments: Any) -> Tensor:
    return pooled(call(*arguments))


def _from_cached_trunk(case: Case, contender: Contender, inputs: Inputs) -> Callable[[], Tensor]:
    """Returns a forward pass that starts from stored states, which enter the first adapted block.

    The states are stored on the encoder's device.

    Raises:
        ValueError: a tower cannot start there, or its output then differs.
    """
    from mmadapters.trunk.frozen import FrozenTrunk, placeholder

    def empty(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return placeholder(tensor.shape, dtype=tensor.dtype, device=tensor.device)

    assert isinstance(contender, Ours)
    model = contender.model
    contender.train()
    # Compare pooled outputs, since other outputs may depend on states that are not stored.
    whole, above = partial(_pooled, inputs, model), partial(_pooled, inputs.mapped(empty), model)
    trunk = FrozenTrunk.of(model, whole)
    for tower, why in trunk.skipped.items():
        raise ValueError(f"tower {tower!r} has no frozen trunk to store: {why}")
    tolerance = 1e-5 if next(model.parameters()).dtype == torch.float32 else 2e-2
    trunk.check(whole, resumed=above, tolerance=tolerance)
    states = trunk.capture(whole)
    if case.mode == "compile":
        above = partial(_pooled, inputs.mapped(empty), torch.compile(model))

    def resumed() -> Tensor:
        with trunk.resume(states):
            return above()

    return resumed


def _switch(case: Case, setup: WorkerSetup) -> Runner:
    contender = _contender(case, setup, adapters=2)
    turns = count(1)
    return Runner(run=lambda: contender.switch(f"a{next(turns) % 2}"), held=[contender])


def _load(case: Case, setup: WorkerSetup) -> Runner:
    contender = _contender(case, setup)
    folder = TemporaryDirectory()
    where = Path(folder.name) / "adapter"
    contender.save(where)
    return Runner(
        run=lambda: contender.load(where), after=contender.unload, held=[contender, folder]
    )
