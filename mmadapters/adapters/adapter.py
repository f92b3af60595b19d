"""`Adapter`: all the modules inserted under one name, and the names of their tensors in files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ..injectors.plan import Kind, Plan
from ..methods import AdapterModule, Branch, Delta, MethodConfig, Prefix, Readout

_KINDS: tuple[tuple[type, Kind], ...] = (
    (Branch, "branch"),
    (Delta, "delta"),
    (Prefix, "prefix"),
    (Readout, "readout"),
)


class Adapter(nn.Module):
    """All modules inserted under one name. Keys are `<site>#<method>` with `/` for `.`."""

    def __init__(self, config: MethodConfig, parts: dict[str, AdapterModule]) -> None:
        super().__init__()
        self.config = config
        for key, module in parts.items():
            self.add_module(key.replace(".", "/"), module)

    def entries(self) -> Iterator[tuple[str, AdapterModule]]:
        """(site, module) in the order in which they act."""
        for key, module in self._modules.items():
            assert module is not None
            yield key.split("#")[0].replace("/", "."), module  # type: ignore[misc]

    @property
    def reads(self) -> set[str]:
        """What its branches read beside what they change."""
        modules = self._modules.values()
        return {read for module in modules for read in getattr(module, "reads", ())}

    def plan(self) -> Plan:
        plan = Plan()
        for site, module in self.entries():
            plan.add(kind_of(module), site, module)
        return plan

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers under the names that files use, shared ones under their first."""
        found: dict[str, Tensor] = {}
        seen: set[int] = set()
        for key, module in self._modules.items():
            assert module is not None
            for name, tensor in module.state_dict(keep_vars=True).items():
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    found[f"{key.replace('/', '.')}/{name}"] = tensor
        return found

    def load(self, tensors: Mapping[str, Tensor], source: str | os.PathLike) -> None:
        """Copies values in, by the names of `tensors()`; all are checked before any is copied.

        Raises:
            ValueError: a tensor is missing, left over, of another shape or not floating; names
                `source`.
        """
        own = self.tensors()
        absent, surplus = sorted(own.keys() - tensors), sorted(tensors.keys() - own)
        if absent or surplus:
            raise ValueError(
                f"{source} does not fit this encoder: {len(absent)} tensors are missing and "
                f"{len(surplus)} have no place, first {(absent or surplus)[0]!r}"
            )
        for key, tensor in sorted(tensors.items()):
            if tensor.shape != own[key].shape:
                raise ValueError(
                    f"{source}: {key} has shape {tuple(tensor.shape)}, this encoder needs "
                    f"{tuple(own[key].shape)}"
                )
            if not tensor.is_floating_point():
                dtype = str(tensor.dtype).removeprefix("torch.")
                raise ValueError(f"{source}: {key} holds {dtype}, not floating-point numbers")
        with torch.no_grad():
            for key, tensor in tensors.items():
                own[key].copy_(tensor)


def kind_of(module: nn.Module) -> Kind:
    return next((kind for cls, kind in _KINDS if isinstance(module, cls)), "prompt")
