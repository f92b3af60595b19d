"""The self-check at injection: no adapter is ever silently inert.

Every new module is perturbed. Then, on the smallest input that the encoder takes,

    eval, no gradients    each module is called, and the output changes
    eval, gradients       a gradient arrives at each module
    train, gradients      the same

Afterwards parameters, buffers, modes and random state are as they were.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .injectors import NOTHING, Plan, Runtime
from .injectors.calls import tensors_in

_TRIES = 12


class InertAdapterError(RuntimeError):
    """An adapter was put where it cannot act."""


def check(model: nn.Module, runtime: Runtime, plan: Plan, example: tuple[tuple, dict]) -> None:
    """Runs the check for all modules of `plan` on `model`, whose hooks are installed.

    Raises:
        InertAdapterError: a site at which a module is not called, changes nothing or gets no
            gradient; names the site and the mode.
    """
    entries = list(plan.entries())
    modules = [module for _, _, module in entries]

    def output(with_plan: Plan) -> list[Tensor]:
        runtime.local.plan = with_plan
        args, kwargs = _like_parameters(model, example)
        found = tensors_in(model(*args, **kwargs))
        return [tensor for tensor in found if tensor.is_floating_point()]

    with _untouched(model, runtime, modules):
        model.eval()
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
            model.train(mode == "train")
            _check_gradients(entries, lambda: output(plan), mode)


def _check_gradients(entries: list, output: Callable[[], list[Tensor]], mode: str) -> None:
    """Dropout and stochastic depth may hide a site from one pass, and all of a small module's ReLUs
    be closed to one example, never in a dozen."""
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
    """Stands for a module in a plan and notes that it was used."""

    def __init__(self, module: nn.Module, called: set[str], name: str) -> None:
        self.module, self.called, self.name = module, called, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.called.add(self.name)
        return self.module(*args, **kwargs)

    def __getattr__(self, attribute: str) -> Any:
        if attribute in ("effective", "enter", "factors"):
            self.called.add(self.name)
        return getattr(self.module, attribute)


@torch.no_grad()
def _equal_in_float32(model: nn.Module, output: Callable[[Plan], list], plan: Plan) -> bool:
    """Whether nothing changes in float32 either: half precision rounds a small change away."""
    half = [
        (tensor, tensor.data)
        for tensor in (*model.parameters(), *model.buffers())
        if tensor.is_floating_point() and tensor.dtype.itemsize < 4
    ]
    if not half:
        return True
    try:
        for tensor, data in half:
            tensor.data = data.float()
        return all(map(torch.equal, output(NOTHING), output(plan)))
    finally:
        for tensor, data in half:
            tensor.data = data


@torch.no_grad()
def _perturb(module: nn.Module) -> None:
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, device=parameter.device)
        parameter.add_((0.1 * noise).to(parameter.dtype))


@contextlib.contextmanager
def _untouched(model: nn.Module, runtime: Runtime, modules: list[nn.Module]) -> Iterator[None]:
    parameters = list({id(p): p for module in modules for p in module.parameters()}.values())
    kept = [(p, p.detach().clone(), p.requires_grad, p.grad) for p in parameters]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    training = [(module, module.training) for module in model.modules()]
    above = runtime.local.plan
    cuda = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=cuda), torch.enable_grad():
            yield
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


def _like_parameters(model: nn.Module, example: Any) -> Any:
    """The example with its half-precision tensors in float32 while the model's are."""
    if isinstance(example, Tensor):
        own = next((p.dtype for p in model.parameters() if p.is_floating_point()), example.dtype)
        lifted = own == torch.float32 and example.is_floating_point() and example.dtype.itemsize < 4
        return example.float() if lifted else example
    if isinstance(example, dict):
        return {key: _like_parameters(model, value) for key, value in example.items()}
    if isinstance(example, tuple):
        return tuple(_like_parameters(model, value) for value in example)
    return example
