"""The self-check when adapters are inserted: no adapter is ever silently inert.

Every new module is perturbed. Then the encoder runs on the smallest input that it takes:

    eval, no gradients    each module must be called, and the output must change
    eval, gradients       a gradient must arrive at each module
    train, gradients      a gradient must arrive at each module

Afterwards parameters, buffers, modes and random state are as they were before.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .calls import first_output, tensors_in
from .installer import Runtime
from .plan import NOTHING, Plan

_TRIES = 12
# The size of a change relative to the output, and the part of it that may come from rounding.
# Rounding in float32 makes about 1e-6, while the exact GELU and its tanh form differ by 1e-4.
_STRONG, _ALIKE = 0.3, 1e-5


class InertAdapterError(RuntimeError):
    """An adapter was put at a site at which it cannot act."""


def check(model: nn.Module, runtime: Runtime, plan: Plan, example: tuple[tuple, dict]) -> None:
    """Checks that all modules of `plan` act on `model`, whose hooks are installed.

    Args:
        example: the arguments and keyword arguments of a call of `model`.

    Raises:
        InertAdapterError: a site at which a module is not called, changes nothing or gets no
            gradient; names the site and the mode.
    """
    entries = list(plan.entries())
    modules = [module for _, _, module in entries]

    def output(with_plan: Plan) -> list[Tensor]:
        runtime.local.plan = with_plan
        args, kwargs = like_parameters(model, example)
        tensors = tensors_in(model(*args, **kwargs))
        return [tensor for tensor in tensors if tensor.is_floating_point()]

    with _untouched(model, runtime, modules) as set_mode:
        set_mode(False)
        with torch.no_grad():
            before = output(NOTHING)
        for module in modules:
            _perturb(module)
        called: set[str] = set()
        spied = plan.mapped(lambda kind, site, module: _Spy(module, called, f"{kind} {site}"))
        with torch.no_grad():
            after = output(spied)
        for kind, site, _ in entries:
            if f"{kind} {site}" not in called:
                raise _inert(site, "eval mode without gradients", "it is never called there")
        if all(map(torch.equal, before, after)) and _equal_in_float32(model, output, plan):
            raise _inert(entries[0][1], "eval mode without gradients", "no output changes")
        for mode in ("eval", "train"):
            set_mode(mode == "train")
            _check_gradients(entries, lambda: output(plan), mode)


def _check_gradients(entries: list, output: Callable[[], list[Tensor]], mode: str) -> None:
    """Raises `InertAdapterError` if no gradient arrives at a module in a dozen passes.

    In a single pass dropout and stochastic depth may hide a site, and all ReLUs of a small module
    may be closed.
    """
    waiting = {id(module): site for _, site, module in entries}
    for _ in range(_TRIES):
        for _, _, module in entries:
            for parameter in module.parameters():
                parameter.requires_grad_(True)
                parameter.grad = None
        tensors = [tensor for tensor in output() if tensor.requires_grad]
        if tensors:
            loss = sum(
                (t.float() * torch.randn_like(t, dtype=torch.float32)).sum() for t in tensors
            )
            assert isinstance(loss, Tensor)
            loss.backward()
        for _, _, module in entries:
            grads = [p.grad for p in module.parameters() if p.grad is not None]
            if any(grad.ne(0).any() for grad in grads):
                waiting.pop(id(module), None)
        if not waiting:
            return
        for _, _, module in entries:
            if id(module) in waiting:
                _perturb(module)
    raise _inert(next(iter(waiting.values())), f"{mode} mode", "no gradient arrives")


def _inert(site: str, mode: str, what: str) -> InertAdapterError:
    return InertAdapterError(
        f"an adapter at {site} would be inert: in {mode} {what}; the library bypasses the module "
        "that this site names, so describe the site differently or leave it out with sites=..."
    )


class _Spy:
    """Replaces a module in a plan and records that it was used."""

    def __init__(self, module: nn.Module, called: set[str], name: str) -> None:
        self.module, self.called, self.name = module, called, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.called.add(self.name)
        return self.module(*args, **kwargs)

    def __getattr__(self, attribute: str) -> Any:
        if attribute in ("effective", "enter", "factors"):
            self.called.add(self.name)
        return getattr(self.module, attribute)


def agrees(
    model: nn.Module,
    runtime: Runtime,
    plan: Plan,
    example: tuple[tuple, dict],
    watched: Iterable[nn.Module],
    folded: Callable[[], contextlib.AbstractContextManager],
) -> bool:
    """Says whether `watched` modules have the same outputs with `plan` active as without it inside
    `folded()`.

    Meanwhile the plan's modules are perturbed, and half precision becomes float32.
    """
    modules = [module for _, _, module in plan.entries()]
    with _untouched(model, runtime, modules) as set_mode, _float32(model):

        def output(with_plan: Plan) -> list[Tensor]:
            runtime.local.plan = with_plan
            args, kwargs = like_parameters(model, example)
            outputs: list[Tensor] = []
            # They run after the runtime's hooks, and so see their changes.
            hooks = [
                module.register_forward_hook(lambda *given: outputs.append(first_output(given[-1])))
                for module in watched
            ]
            try:
                model(*args, **kwargs)
            finally:
                for hook in hooks:
                    hook.remove()
            return [tensor.float() for tensor in outputs]

        set_mode(False)
        for module in modules:
            _perturb(module)
        with torch.no_grad():
            off, on = output(NOTHING), output(plan)
            # The change is made so strong that rounding elsewhere cannot hide another activation.
            weak = _STRONG * _distance(off) / max(_distance(on, off), 1e-30)
            if weak > 1:
                for _, _, module in plan.entries():
                    for parameter in getattr(module, "linears", [nn.Module()])[-1].parameters():
                        parameter.mul_(weak)
                on = output(plan)
            try:
                with folded():
                    merged = output(NOTHING)
            except RuntimeError:  # other parts of the encoder rely on the shapes
                return False
        return _distance(on, merged) <= _ALIKE * _distance(on, off)


def _distance(some: list[Tensor], others: list[Tensor] | None = None) -> float:
    """Returns the Euclidean norm of the difference, or that of `some` if there are no others."""
    differences = some if others is None else map(torch.sub, some, others)
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in differences))


@contextlib.contextmanager
def _float32(model: nn.Module) -> Iterator[bool]:
    """Inside the block tensors of half precision are float32; yields whether there are any."""
    half = [
        (tensor, tensor.data)
        for tensor in (*model.parameters(), *model.buffers())
        if tensor.is_floating_point() and tensor.dtype.itemsize < 4
    ]
    try:
        for tensor, data in half:
            tensor.data = data.float()
        yield bool(half)
    finally:
        for tensor, data in half:
            tensor.data = data


@torch.no_grad()
def _equal_in_float32(model: nn.Module, output: Callable[[Plan], list], plan: Plan) -> bool:
    """Says whether no output changes in float32 either: half precision may round a change away."""
    with _float32(model) as lifted:
        return not lifted or all(map(torch.equal, output(NOTHING), output(plan)))


@torch.no_grad()
def _perturb(module: nn.Module) -> None:
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, device=parameter.device)
        parameter.add_((0.1 * noise).to(parameter.dtype))


@contextlib.contextmanager
def _untouched(
    model: nn.Module, runtime: Runtime, modules: list[nn.Module]
) -> Iterator[Callable[[bool], object]]:
    """Restores parameters of `modules`, buffers, modes and random state after the block.

    Yields a function that sets train or eval mode. Adapters other than `modules` do not run, and a
    model may hold thousands of them, so they are passed over.
    """
    backbone = getattr(model, "backbone", model)
    running = nn.ModuleList([backbone, *modules])
    parameters = list({id(p): p for module in modules for p in module.parameters()}.values())
    kept = [(p, p.detach().clone(), p.requires_grad, p.grad) for p in parameters]
    buffers = [(buffer, buffer.clone()) for buffer in running.buffers()]
    training = [(module, module.training) for module in running.modules()]
    above = runtime.local.plan
    cuda = sorted({p.device.index for p in running.parameters() if p.device.type == "cuda"})

    def set_mode(train: bool) -> None:
        running.train(train)
        backbone.train(train and getattr(model, "train_trunk", True))

    try:
        with torch.random.fork_rng(devices=cuda), torch.enable_grad():
            yield set_mode
    finally:
        runtime.local.plan = above
        runtime.local.stash.clear()
        for module, mode in training:
            module.training = mode
        for buffer, value in buffers:
            buffer.copy_(value)
        for parameter, value, requires_grad, grad in kept:
            parameter.requires_grad_(False).copy_(value)
            parameter.requires_grad_(requires_grad).grad = grad


def like_parameters(model: nn.Module, example: Any) -> Any:
    """Returns the example with its half-precision tensors in float32 if the module that reads them
    is in float32."""
    if isinstance(example, Tensor):
        half = example.is_floating_point() and example.dtype.itemsize < 4
        return example.float() if half and _read_in(model) == torch.float32 else example
    if isinstance(example, dict):
        return {key: like_parameters(model, value) for key, value in example.items()}
    if isinstance(example, tuple):
        return tuple(like_parameters(model, value) for value in example)
    return example


def _read_in(model: nn.Module) -> torch.dtype | None:
    """Returns the dtype of the module that reads floating-point inputs: the first convolution, or
    else the first linear map. The parts of an encoder may have several dtypes."""
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    modules = list(model.modules())
    for kinds in (convolutions, (nn.Linear,)):
        for module in modules:
            if isinstance(module, kinds) and module.weight.is_floating_point():
                return module.weight.dtype
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
