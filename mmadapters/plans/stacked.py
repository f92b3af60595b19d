"""The parameters of several adapters as one tensor each, for an adapter of its own in each sample.

Modules of one kind are stacked: their parameters (K, ...) are gathered by sample to (B, ...) and
multiplied batch by batch, so that no Python loop runs over samples. Samples that no adapter acts on
get the neutral parameters (zeros; ones for scales), which leave every bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..methods.base import drop_path
from ..methods.bitfit import BiasDelta
from ..methods.bottleneck import ACTIVATIONS, Bottleneck
from ..methods.lora import LoRA
from ..methods.scaling import InputScale, OutputScale, ScaleShift
from ..sites.acting import Context
from ..sites.sitemap import Leaf


class StackPlaces:
    """The place in a stack of each row of a batch; the last place of a stack is neutral.

    `in_order`: row i has place i. `tensor`: (rows,), the places.
    """

    def __init__(self, places: list[int], device: torch.device) -> None:
        self.in_order = places == list(range(len(places)))
        self.tensor = torch.tensor(places, device=device)

    def __len__(self) -> int:
        return len(self.tensor)


class ModuleStack:
    """The parameters of several modules of one kind as one tensor each, the last entry neutral.

    A subclass computes `on_branch` or `on_leaf`, where each row has the module at its place.
    """

    def __init__(self, modules: list[Any]) -> None:
        self.modules = modules

    def tensors(self) -> dict[str, list[Tensor]]:
        """Returns, by name, the tensor of each module."""
        raise TypeError(f"{type(self).__name__} does not say what it stacks")

    def neutral(self, name: str) -> float:
        """Returns the value of a parameter that changes nothing."""
        return 0.0

    def gathered(self, places: StackPlaces) -> dict[str, Tensor]:
        """Returns the parameters of each row, (rows, ...) by name.

        They are stacked anew each time: kept ones would miss a write to `.data`.
        """
        return {name: self._gathered(name, each, places) for name, each in self.tensors().items()}

    def _gathered(self, name: str, tensors: list[Tensor], places: StackPlaces) -> Tensor:
        shape = [max(sizes) for sizes in zip(*(t.shape for t in tensors), strict=True)]
        filled = [padded(t, shape) for t in tensors]
        if places.in_order and len(places) <= len(filled):
            return torch.stack(filled[: len(places)])
        neutral = tensors[0].new_full(shape, self.neutral(name))
        return torch.stack([*filled, neutral]).index_select(0, places.tensor)

    def on_branch(self, places: StackPlaces, branch: Tensor, context: Context) -> Tensor:
        """branch: (rows, N, D) -> the new branch, of the same shape."""
        raise TypeError(f"{type(self).__name__} does not act on a branch")

    def on_leaf(self, places: StackPlaces, y: Tensor, x: Tensor, leaf: Leaf) -> Tensor:
        """y: (rows, ..., out), the output of the leaf for x (rows, ..., in) -> the new y."""
        raise TypeError(f"{type(self).__name__} does not act on a leaf")

    def enter(self, places: StackPlaces, x: Tensor) -> Tensor:
        """x: (rows, ..., in) -> what enters the leaf instead, of the same shape."""
        return x


def stack_of(modules: list[Any]) -> tuple | None:
    """Returns the kind of stack that can take a member of a composition, or None.

    Its first entry is the class of the stack. Members with an equal kind fit into one stack.
    """
    if len(modules) != 1:
        return None
    module = modules[0]
    kind = type(module)
    if kind is Bottleneck and type(module.down) is type(module.up) is nn.Linear:
        return (
            _Bottlenecks,
            *(module.reads, module.parallel, module.activation, module.dropout, module.drop_path),
            *(_epsilon(module.norm_before), _epsilon(module.norm_after)),
        )
    if kind is LoRA:
        return (_LoRAs, module.dropout)
    stacks = {
        OutputScale: _OutputScales,
        InputScale: _InputScales,
        ScaleShift: _ScaleShifts,
        BiasDelta: _Biases,
    }
    return (stacks[kind],) if kind in stacks else None


def _epsilon(norm: nn.LayerNorm | None) -> float | None:
    return None if norm is None else norm.eps


def padded(tensor: Tensor, shape: Sequence[int], value: float = 0.0) -> Tensor:
    """Returns the tensor with `value` behind the end of every axis, up to `shape`.

    Zeros make a bottleneck or a rank wider without changing what it adds.
    """
    if list(tensor.shape) == list(shape):
        return tensor
    pads: list[int] = []
    for have, want in zip(reversed(tensor.shape), reversed(shape), strict=True):
        pads += [0, want - have]
    return F.pad(tensor, pads, value=value)


def linear_by_row(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiplies each row with a weight of its own.

    x: (rows, ..., in), weight: (rows, out, in), bias: (rows, out) -> (rows, ..., out).
    """
    flat = x.reshape(len(x), -1, x.shape[-1])
    weight = weight.transpose(1, 2)
    if bias is None:
        out = torch.bmm(flat, weight)
    else:
        out = torch.baddbmm(bias[:, None], flat, weight)
    return out.reshape(*x.shape[:-1], -1)


def _by_token(parameter: Tensor, like: Tensor) -> Tensor:
    """Returns a parameter (rows, D) as (rows, 1, ..., D), so that it fits `like` (rows, ..., D)."""
    return parameter.reshape(len(parameter), *(1,) * (like.dim() - 2), -1)


class _Bottlenecks(ModuleStack):
    modules: list[Bottleneck]

    def tensors(self) -> dict[str, list[Tensor]]:
        downs, ups = zip(*(m.linears for m in self.modules), strict=True)
        tensors: dict[str, list[Tensor]] = {
            "down": [down.weight for down in downs],
            "down_bias": [down.bias for down in downs],
            "up": [up.weight for up in ups],
            "up_bias": [up.bias for up in ups],
        }
        if any(isinstance(m.scale, Tensor) or m.scale != 1.0 for m in self.modules):
            like = ups[0].bias
            tensors["scale"] = [
                torch.as_tensor(m.scale, dtype=like.dtype, device=like.device).expand_as(like)
                for m in self.modules
            ]
        for name in ("norm_before", "norm_after"):
            norms = [getattr(m, name) for m in self.modules]
            if norms[0] is not None:
                tensors[f"{name}.weight"] = [norm.weight for norm in norms]
                tensors[f"{name}.bias"] = [norm.bias for norm in norms]
        return tensors

    def on_branch(self, places: StackPlaces, branch: Tensor, context: Context) -> Tensor:
        one, p = self.modules[0], self.gathered(places)
        h = one.read(branch, context)
        h = _normed(h, "norm_before", one.norm_before, p)
        h = ACTIVATIONS[one.activation](linear_by_row(h, p["down"], p["down_bias"]))
        h = linear_by_row(F.dropout(h, one.dropout, one.training), p["up"], p["up_bias"])
        h = _normed(h, "norm_after", one.norm_after, p)
        if "scale" in p:
            h = h * _by_token(p["scale"], h)
        return branch + drop_path(h, one.drop_path, one.training).to(branch.dtype)


def _normed(h: Tensor, name: str, norm: nn.LayerNorm | None, p: dict[str, Tensor]) -> Tensor:
    if norm is None:
        return h
    plain = F.layer_norm(h, norm.normalized_shape, eps=norm.eps)
    return plain * _by_token(p[f"{name}.weight"], h) + _by_token(p[f"{name}.bias"], h)


class _LoRAs(ModuleStack):
    modules: list[LoRA]

    def tensors(self) -> dict[str, list[Tensor]]:
        scale = self.modules[0].scaling
        return {
            "a": [m.a for m in self.modules],
            "b": [m.b if m.scaling == scale else m.b * (m.scaling / scale) for m in self.modules],
        }

    def on_leaf(self, places: StackPlaces, y: Tensor, x: Tensor, leaf: Leaf) -> Tensor:
        one, p = self.modules[0], self.gathered(places)
        x = F.dropout(x, one.dropout, one.training).to(p["a"].dtype)
        z, b = linear_by_row(x, p["a"]), p["b"]
        if y.dtype != b.dtype or torch.is_autocast_enabled(y.device.type):
            return y + (linear_by_row(z, b) * one.scaling).to(y.dtype)
        rows, states = (part.reshape(len(part), -1, part.shape[-1]) for part in (y, z))
        changed = torch.baddbmm(rows, states, b.transpose(1, 2), alpha=one.scaling)
        return changed.view(y.shape)


class _OutputScales(ModuleStack):
    modules: list[OutputScale]

    def neutral(self, name: str) -> float:
        return 1.0 if name == "scale" else 0.0

    def tensors(self) -> dict[str, list[Tensor]]:
        return {"scale": [m.scale for m in self.modules]}

    def on_leaf(self, places: StackPlaces, y: Tensor, x: Tensor, leaf: Leaf) -> Tensor:
        return y * _by_token(self.gathered(places)["scale"], y).to(y.dtype)


class _InputScales(_OutputScales):
    modules: list[InputScale]  # type: ignore[assignment]

    def enter(self, places: StackPlaces, x: Tensor) -> Tensor:
        return x * _by_token(self.gathered(places)["scale"], x).to(x.dtype)

    def on_leaf(self, places: StackPlaces, y: Tensor, x: Tensor, leaf: Leaf) -> Tensor:
        return y


class _ScaleShifts(_OutputScales):
    modules: list[ScaleShift]  # type: ignore[assignment]

    def tensors(self) -> dict[str, list[Tensor]]:
        return {**super().tensors(), "shift": [m.shift for m in self.modules]}

    def on_leaf(self, places: StackPlaces, y: Tensor, x: Tensor, leaf: Leaf) -> Tensor:
        p = self.gathered(places)
        return y * _by_token(p["scale"], y).to(y.dtype) + _by_token(p["shift"], y).to(y.dtype)


class _Biases(ModuleStack):
    modules: list[BiasDelta]

    def tensors(self) -> dict[str, list[Tensor]]:
        return {"bias": [m.bias for m in self.modules]}

    def on_leaf(self, places: StackPlaces, y: Tensor, x: Tensor, leaf: Leaf) -> Tensor:
        return y + _by_token(self.gathered(places)["bias"], y).to(y.dtype)
