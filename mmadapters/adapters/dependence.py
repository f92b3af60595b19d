"""Finds the tensors of an encoder that the states of a tower depend on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..injectors.calls import tensors_in
from ..sites.sitemap import Tower


def tensors_behind(
    backbone: nn.Module, towers: dict[str, Tower], run: Callable[[], Any]
) -> dict[str, dict[str, Tensor]]:
    """Returns, for each tower, the tensors that the output of its last block depends on, by name.

    The graph that autograd builds in one forward pass tells which parameters they are. Their
    modules' persistent buffers (statistics of a batch norm) belong to them. The pass keeps nothing
    else in memory and leaves the modes and buffers of the encoder as they were.

    Args:
        run: runs the encoder on some input with no adapter.
    """
    outputs: dict[str, list[Tensor]] = {name: [] for name in towers}
    handles = [
        tower.blocks[-1].module.register_forward_hook(
            lambda module, args, output, to=outputs[name]: to.extend(tensors_in(output))
        )
        for name, tower in towers.items()
        if tower.blocks
    ]
    modes = [(module, module.training) for module in backbone.modules()]
    frozen = [
        parameter
        for parameter in backbone.parameters()
        if not (parameter.requires_grad or parameter.is_inference())
        and parameter.is_floating_point()
    ]
    backbone.eval()
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with (
            torch.enable_grad(),
            torch.random.fork_rng(devices=[]),
            torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda kept: kept),
        ):
            run()
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    tensors = _tensors_by_module(backbone)
    return {name: _used(tensors, _leaves(states)) for name, states in outputs.items()}


def _tensors_by_module(backbone: nn.Module) -> list[dict[str, Tensor]]:
    """Returns the floating tensors that each module saves, by their first names."""
    modules: dict[str, dict[str, Tensor]] = {}
    seen: set[int] = set()
    for name, tensor in nn.Module.state_dict(backbone, keep_vars=True).items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and id(tensor) not in seen:
            seen.add(id(tensor))
            modules.setdefault(name.rpartition(".")[0], {})[name] = tensor
    return list(modules.values())


def _used(modules: list[dict[str, Tensor]], parameters: set[int]) -> dict[str, Tensor]:
    """Returns the given parameters, and the buffers of the modules that have any of them."""
    used: dict[str, Tensor] = {}
    for tensors in modules:
        if not parameters.isdisjoint(map(id, tensors.values())):
            used |= {
                name: tensor
                for name, tensor in tensors.items()
                if id(tensor) in parameters or not isinstance(tensor, nn.Parameter)
            }
    return used


def _leaves(outputs: list[Tensor]) -> set[int]:
    """Returns the identities of the leaves of a graph."""
    waiting = [tensor.grad_fn for tensor in outputs if tensor.grad_fn is not None]
    seen, leaves = set(waiting), set()
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                waiting.append(below)
    return leaves
