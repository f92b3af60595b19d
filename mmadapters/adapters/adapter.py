"""`Adapter` and `Fusion`: all modules inserted under one name, and how files name their tensors."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..composition import BASE, Fuse
from ..injectors.plan import Kind, Plan
from ..methods import AdapterModule, Branch, Delta, FusionConfig, MethodConfig, Prefix, Readout

if TYPE_CHECKING:
    from typing import Self

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_+@ -]*")
_KINDS: tuple[tuple[type, Kind], ...] = (
    (Branch, "branch"),
    (Delta, "delta"),
    (Prefix, "prefix"),
    (Readout, "readout"),
)


class Adapter(nn.Module):
    """All modules that are inserted under one name.

    Their names in this module are `<site>#<method>` with `/` for `.`.

    Attributes:
        config: the config that it was made from.
    """

    def __init__(self, config: MethodConfig, parts: dict[str, AdapterModule]) -> None:
        super().__init__()
        self.config = config
        for key, module in parts.items():
            self.add_module(key.replace(".", "/"), module)

    def entries(self) -> Iterator[tuple[str, AdapterModule]]:
        """Yields (site, module) in the order in which the modules act."""
        for key, module in self._modules.items():
            assert module is not None
            yield key.split("#")[0].replace("/", "."), module  # type: ignore[misc]

    @property
    def reads(self) -> set[str]:
        """The names of the inputs that its branches read besides the states that they change."""
        modules = self._modules.values()
        return {read for module in modules for read in getattr(module, "reads", ())}

    def plan(self) -> Plan:
        """Makes a plan in which this adapter acts alone."""
        plan = Plan()
        for site, module in self.entries():
            plan.add(kind_of(module), site, module)
        return plan

    def tensors(self) -> dict[str, Tensor]:
        """Returns parameters and buffers by the names that files use: `<site>#<method>/<tensor>`.

        A tensor that occurs several times is given under its first name alone.
        """
        named: dict[str, Tensor] = {}
        seen: set[int] = set()
        for key, module in self._modules.items():
            assert module is not None
            for name, tensor in module.state_dict(keep_vars=True).items():
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    named[f"{key.replace('/', '.')}/{name}"] = tensor
        return named

    def check_fit(self, tensors: Mapping[str, Tensor], source: str | os.PathLike) -> None:
        """Compares the names, shapes and types of values with the adapter's.

        Args:
            tensors: the values by the names of `tensors()`.
            source: says in errors where they come from.

        Raises:
            ValueError: a tensor is missing, has no place, has another shape or holds no
                floating-point numbers.
        """
        targets = self.tensors()
        absent, surplus = sorted(targets.keys() - tensors), sorted(tensors.keys() - targets)
        if absent or surplus:
            raise ValueError(
                f"{source} does not fit this encoder: {len(absent)} tensors are missing and "
                f"{len(surplus)} have no place, first {(absent or surplus)[0]!r}"
            )
        for key, tensor in sorted(tensors.items()):
            if tensor.shape != targets[key].shape:
                raise ValueError(
                    f"{source}: {key} has shape {tuple(tensor.shape)}, this encoder needs "
                    f"{tuple(targets[key].shape)}"
                )
            if not tensor.is_floating_point():
                dtype = str(tensor.dtype).removeprefix("torch.")
                raise ValueError(f"{source}: {key} holds {dtype}, not floating-point numbers")

    def load(self, tensors: Mapping[str, Tensor], source: str | os.PathLike) -> None:
        """Copies values into the adapter. All are checked before any is copied; see `check_fit`."""
        self.check_fit(tensors, source)
        targets = self.tensors()
        with torch.no_grad():
            for key, tensor in tensors.items():
                targets[key].copy_(tensor)


class Adapters(nn.Module):
    """Holds the adapters or the fusions of a model by name.

    Models hold thousands of adapters of which few are in use, so `train` and `requires_grad_` pass
    over those that are as they are to be. torch's own methods take about eight times as long.
    """

    def _adapters(self) -> list[nn.Module]:
        return [adapter for adapter in self._modules.values() if adapter is not None]

    def train(self, mode: bool = True) -> Self:
        """Sets the mode of all adapters."""
        self.training = mode
        for adapter in self._adapters():
            for part in parts(adapter):
                if part.training is not mode:
                    adapter.train(mode)
                    break
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Makes all adapters trainable, or freezes them."""
        for adapter in self._adapters():
            if _other_grad(adapter, requires_grad):
                adapter.requires_grad_(requires_grad)
        return self


def _other_grad(adapter: nn.Module, requires_grad: bool) -> bool:
    """Returns whether a parameter of the adapter is trainable and should not be, or the reverse."""
    for part in parts(adapter):
        for parameter in part._parameters.values():
            if parameter is not None and parameter.requires_grad is not requires_grad:
                return True
    return False


def parts(module: nn.Module) -> list[nn.Module]:
    """Returns a module and all modules inside it, shared ones as often as they occur.

    `nn.Module.modules` does the same without repetitions and takes several times as long.
    """
    reached = [module]
    for part in reached:
        if part._modules:
            reached += [inner for inner in part._modules.values() if inner is not None]
    return reached


class Fusion(Adapter):
    """All attention modules of one AdapterFusion.

    Attributes:
        members: the adapters that it fuses.
    """

    def __init__(
        self, members: Fuse, config: FusionConfig, parts: dict[str, AdapterModule]
    ) -> None:
        super().__init__(config, parts)
        self.members = members


def check_name(name: object) -> None:
    """Raises ValueError unless `name` can name an adapter."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} cannot name an adapter: use letters, digits, '_', '-', '+', '@' and "
            "spaces, no path separators or dots"
        )
    if name == BASE:
        raise ValueError(
            f"{BASE!r} means the encoder without adapters: choose another name for this one"
        )


def kind_of(module: nn.Module) -> Kind:
    """Returns the table of a `Plan` in which a module of an adapter stands."""
    return next((kind for cls, kind in _KINDS if isinstance(module, cls)), "prompt")
