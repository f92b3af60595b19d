"""An adapter for each sample of one batch, in one vectorised pass.

`Rows` stands at a site for the modules of several adapters and an index that says which sample
belongs to which. Modules of one kind are stacked: their parameters (K, ...) are gathered by sample
to (B, ...) and multiplied batch by batch, so that no Python loop runs over samples. Samples that no
adapter acts on get the neutral parameters (zeros; ones for scales), which leave every bit. What
cannot be stacked acts on its own rows and is put back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..injectors.raw_attention import gate_columns
from ..methods.base import Read, Replacing, drop_path, reads_of, wanted
from ..methods.bitfit import BiasDelta
from ..methods.bottleneck import ACTIVATIONS, Bottleneck
from ..methods.lora import LoRA
from ..methods.scaling import InputScale, OutputScale, ScaleShift
from ..sites.sitemap import Grid, Leaf

Index = Callable[[int], list[int]]


@dataclass(eq=False)
class Rows:
    """Members (each what acts on its samples, in order) and which member each sample has.

    `index(batch)` gives a member for every sample, -1 for none.

    Raises, when it runs:
        ValueError: the batch has another length than the composition.
    """

    site: str
    members: list[list[Any]]
    index: Index
    groups: list[_Group] = field(init=False)
    _rows: dict[tuple[int, torch.device], list[_Placed]] = field(init=False, default_factory=dict)
    _members: dict[tuple[int, torch.device], dict[int, Tensor]] = field(
        init=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        self.groups = _grouped(self.members)

    def placed(self, batch: int, device: torch.device) -> list[_Placed]:
        """Each group with the rows that it acts on and, for these, the place in its stack."""
        key = (batch, device)
        if key not in self._rows:
            owner = self.index(batch)
            found = []
            for group in self.groups:
                own = [row for row, member in enumerate(owner) if member in group.places]
                if not own:
                    continue
                others = any(
                    member >= 0 and self.members[member] and member not in group.places
                    for member in owner
                )
                whole = group.stack is not None and not others
                rows = list(range(batch)) if whole else own
                places = [group.places.get(owner[row], len(group.modules)) for row in rows]
                found.append(
                    _Placed(
                        group,
                        None if whole or len(rows) == batch else _tensor(rows, device),
                        Places(places, device),
                    )
                )
            self._rows[key] = found
        return self._rows[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": {}, "_members": {}}


def _tensor(values: list[int], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)


class Places:
    """For each of some rows its place in a stack, whose end is neutral.

    `in_order`: each row has the next place.
    """

    def __init__(self, places: list[int], device: torch.device) -> None:
        self.in_order = places == list(range(len(places)))
        self.tensor = _tensor(places, device)

    def __len__(self) -> int:
        return len(self.tensor)


@dataclass(eq=False)
class _Placed:
    """`rows`: None for the whole batch."""

    group: _Group
    rows: Tensor | None
    places: Places

    def take(self, x: Tensor | None) -> Tensor | None:
        return x if x is None or self.rows is None else x.index_select(0, self.rows)

    def put(self, x: Tensor, changed: Tensor) -> Tensor:
        return changed if self.rows is None else x.index_copy(0, self.rows, changed.to(x.dtype))


@dataclass(eq=False)
class _Group:
    """Members that one stack serves, or one member that acts by itself (`stack` is None)."""

    places: dict[int, int]
    modules: list[Any]
    stack: _Stack | None


def _grouped(members: list[list[Any]]) -> list[_Group]:
    groups: dict[Any, _Group] = {}
    for index, modules in enumerate(members):
        if not modules:
            continue
        kind = _stack_kind(modules)
        key = ("alone", index) if kind is None else kind
        if key not in groups:
            groups[key] = _Group({}, [], None)
        group = groups[key]
        same = [place for place, known in enumerate(group.modules) if known is modules[0]]
        group.places[index] = same[0] if same and kind is not None else len(group.modules)
        if kind is None:
            group.modules = modules
        elif not same:
            group.modules.append(modules[0])
    for key, group in groups.items():
        if key[0] != "alone":
            group.stack = key[0](group.modules)
    return list(groups.values())


def _stack_kind(modules: list[Any]) -> tuple | None:
    """The stack that can take a member, and what all that share it must agree in."""
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


class _Stack:
    """Parameters of several modules of one kind as one tensor each, the last entry neutral."""

    def __init__(self, modules: list[Any]) -> None:
        self.modules = modules

    def tensors(self) -> dict[str, list[Tensor]]:
        """By name, the tensor of each module."""
        raise TypeError(f"{type(self).__name__} does not say what it stacks")

    def neutral(self, name: str) -> float:
        return 0.0

    def gathered(self, places: Places) -> dict[str, Tensor]:
        """(rows, ...) by name. Made anew each time: kept ones would miss a write to `.data`."""
        return {name: self._gathered(name, own, places) for name, own in self.tensors().items()}

    def _gathered(self, name: str, tensors: list[Tensor], places: Places) -> Tensor:
        shape = [max(sizes) for sizes in zip(*(t.shape for t in tensors), strict=True)]
        filled = [padded(t, shape) for t in tensors]
        if places.in_order and len(places) <= len(filled):
            return torch.stack(filled[: len(places)])
        neutral = tensors[0].new_full(shape, self.neutral(name))
        return torch.stack([*filled, neutral]).index_select(0, places.tensor)


def padded(tensor: Tensor, shape: Sequence[int], value: float = 0.0) -> Tensor:
    """Zeros behind the end of every axis: a wider bottleneck or rank that adds nothing."""
    if list(tensor.shape) == list(shape):
        return tensor
    pads: list[int] = []
    for have, want in zip(reversed(tensor.shape), reversed(shape), strict=True):
        pads += [0, want - have]
    return F.pad(tensor, pads, value=value)


def _by_token(parameter: Tensor, like: Tensor) -> Tensor:
    """(rows, D) with axes of 1 for what lies between, so that it fits `like` (rows, ..., D)."""
    return parameter.reshape(len(parameter), *(1,) * (like.dim() - 2), -1)


def linear_by_row(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (rows, ..., in) by its own weight (rows, out, in) and bias (rows, out)."""
    flat = x.reshape(len(x), -1, x.shape[-1])
    weight = weight.transpose(1, 2)
    if bias is None:
        out = torch.bmm(flat, weight)
    else:
        out = torch.baddbmm(bias[:, None], flat, weight)
    return out.reshape(*x.shape[:-1], -1)


class _Bottlenecks(_Stack):
    modules: list[Bottleneck]

    def tensors(self) -> dict[str, list[Tensor]]:
        downs, ups = zip(*(m.linears for m in self.modules), strict=True)
        found: dict[str, list[Tensor]] = {
            "down": [down.weight for down in downs],
            "down_bias": [down.bias for down in downs],
            "up": [up.weight for up in ups],
            "up_bias": [up.bias for up in ups],
        }
        if any(isinstance(m.scale, Tensor) or m.scale != 1.0 for m in self.modules):
            like = ups[0].bias
            found["scale"] = [
                torch.as_tensor(m.scale, dtype=like.dtype, device=like.device).expand_as(like)
                for m in self.modules
            ]
        for name in ("norm_before", "norm_after"):
            norms = [getattr(m, name) for m in self.modules]
            if norms[0] is not None:
                found[f"{name}.weight"] = [norm.weight for norm in norms]
                found[f"{name}.bias"] = [norm.bias for norm in norms]
        return found

    def __call__(
        self, places: Places, branch: Tensor, *, residual: Tensor | None, input: Tensor | None
    ) -> Tensor:
        one, own = self.modules[0], self.gathered(places)
        h = one.read(branch, residual=residual, input=input)
        h = _normed(h, "norm_before", one.norm_before, own)
        h = ACTIVATIONS[one.activation](linear_by_row(h, own["down"], own["down_bias"]))
        h = linear_by_row(F.dropout(h, one.dropout, one.training), own["up"], own["up_bias"])
        h = _normed(h, "norm_after", one.norm_after, own)
        if "scale" in own:
            h = h * _by_token(own["scale"], h)
        return branch + drop_path(h, one.drop_path, one.training).to(branch.dtype)


def _normed(h: Tensor, name: str, norm: nn.LayerNorm | None, own: dict[str, Tensor]) -> Tensor:
    if norm is None:
        return h
    plain = F.layer_norm(h, norm.normalized_shape, eps=norm.eps)
    return plain * _by_token(own[f"{name}.weight"], h) + _by_token(own[f"{name}.bias"], h)


class _LoRAs(_Stack):
    modules: list[LoRA]

    def tensors(self) -> dict[str, list[Tensor]]:
        scale = self.modules[0].scaling
        return {
            "a": [m.a for m in self.modules],
            "b": [m.b if m.scaling == scale else m.b * (m.scaling / scale) for m in self.modules],
        }

    def __call__(self, places: Places, y: Tensor, x: Tensor, leaf: Leaf) -> Tensor:
        one, own = self.modules[0], self.gathered(places)
        x = F.dropout(x, one.dropout, one.training).to(own["a"].dtype)
        z, b = linear_by_row(x, own["a"]), own["b"]
        if y.dtype != b.dtype or torch.is_autocast_enabled(y.device.type):
            return y + (linear_by_row(z, b) * one.scaling).to(y.dtype)
        rows, states = (part.reshape(len(part), -1, part.shape[-1]) for part in (y, z))
        changed = torch.baddbmm(rows, states, b.transpose(1, 2), alpha=one.scaling)
        return changed.view(y.shape)


class _OutputScales(_Stack):
    modules: list[OutputScale]

    def neutral(self, name: str) -> float:
        return 1.0 if name == "scale" else 0.0

    def tensors(self) -> dict[str, list[Tensor]]:
        return {"scale": [m.scale for m in self.modules]}

    def __call__(self, places: Places, y: Tensor, x: Tensor, leaf: Leaf) -> Tensor:
        return y * _by_token(self.gathered(places)["scale"], y).to(y.dtype)


class _InputScales(_OutputScales):
    modules: list[InputScale]  # type: ignore[assignment]

    def enter(self, places: Places, x: Tensor) -> Tensor:
        return x * _by_token(self.gathered(places)["scale"], x).to(x.dtype)

    def __call__(self, places: Places, y: Tensor, x: Tensor, leaf: Leaf) -> Tensor:
        return y


class _ScaleShifts(_OutputScales):
    modules: list[ScaleShift]  # type: ignore[assignment]

    def tensors(self) -> dict[str, list[Tensor]]:
        return {**super().tensors(), "shift": [m.shift for m in self.modules]}

    def __call__(self, places: Places, y: Tensor, x: Tensor, leaf: Leaf) -> Tensor:
        own = self.gathered(places)
        return y * _by_token(own["scale"], y).to(y.dtype) + _by_token(own["shift"], y).to(y.dtype)


class _Biases(_Stack):
    modules: list[BiasDelta]

    def tensors(self) -> dict[str, list[Tensor]]:
        return {"bias": [m.bias for m in self.modules]}

    def __call__(self, places: Places, y: Tensor, x: Tensor, leaf: Leaf) -> Tensor:
        return y + _by_token(self.gathered(places)["bias"], y).to(y.dtype)


class RoutedBranch(Rows, Replacing):
    """`Branch` modules, each on its samples."""

    @property
    def reads(self) -> frozenset[Read]:
        return reads_of(module for modules in self.members for module in modules)

    def __call__(
        self, branch: Tensor, *, residual: Tensor | None, input: Tensor | None, **more: Any
    ) -> Tensor:
        for placed in self.placed(len(branch), branch.device):
            own = placed.take(branch)
            assert own is not None
            reads = {"residual": placed.take(residual), "input": placed.take(input)}
            if placed.group.stack is not None:
                own = placed.group.stack(placed.places, own, **reads)  # type: ignore[operator]
            else:
                taken = {
                    # One grid is that of all samples.
                    name: value if isinstance(value, Grid) else placed.take(value)
                    for name, value in more.items()
                }
                for module in placed.group.modules:
                    own = module(own, **reads, **wanted(module, taken))
            branch = placed.put(branch, own)
        return branch


class RoutedDelta(Rows):
    """`Delta` modules, each on its samples; no one weight says what they do."""

    as_weight = False

    @property
    def scales_input(self) -> bool:
        return any(module.scales_input for modules in self.members for module in modules)

    def enter(self, x: Tensor) -> Tensor:
        for placed in self.placed(len(x), x.device):
            if not any(module.scales_input for module in placed.group.modules):
                continue
            own = placed.take(x)
            assert own is not None
            if placed.group.stack is not None:
                own = placed.group.stack.enter(placed.places, own)  # type: ignore[attr-defined]
            else:
                for module in placed.group.modules:
                    own = module.enter(own) if module.scales_input else own
            x = placed.put(x, own)
        return x

    def __call__(self, y: Tensor, x: Tensor, leaf: Leaf) -> Tensor:
        for placed in self.placed(len(y), y.device):
            own, read = placed.take(y), placed.take(x)
            assert own is not None
            if placed.group.stack is not None:
                own = placed.group.stack(placed.places, own, read, leaf)  # type: ignore[operator]
            else:
                for module in placed.group.modules:
                    own = module(own, read, leaf)
            y = placed.put(y, own)
        return y


class RoutedReadout(Rows):
    """`Readout` modules, each on its samples."""

    def __call__(self, last: Tensor, *, states: Mapping[int, Tensor]) -> Tensor:
        given = last
        for placed in self.placed(len(last), last.device):
            own = placed.take(given)
            taken = {index: placed.take(state) for index, state in states.items()}
            for module in placed.group.modules:
                own = module(own, states=taken)
            assert own is not None
            last = placed.put(last, own)
        return last


class RoutedPrefix(Rows):
    """`Prefix` modules, each for its samples: shorter prefixes are filled up and hidden."""

    def rows_of(self, batch: int, device: torch.device) -> dict[int, Tensor]:
        """The samples of each member that has prefixes and samples."""
        key = (batch, device)
        if key not in self._members:
            owner = self.index(batch)
            rows = {
                member: [row for row, other in enumerate(owner) if other == member]
                for member, modules in enumerate(self.members)
                if modules
            }
            self._members[key] = {m: _tensor(own, device) for m, own in rows.items() if own}
        return self._members[key]

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, N, D) -> keys and values (B, P, D), and what is added to the scores (B, N, P)."""
        batch, tokens, _ = x.shape
        given = {m: self._of(modules, x) for m, modules in enumerate(self.members) if modules}
        length = max(keys.shape[-2] for keys, _, _ in given.values())
        width = next(iter(given.values()))[0].shape[-1]
        keys, values = x.new_zeros(batch, length, width), x.new_zeros(batch, length, width)
        scores = x.new_full((batch, tokens, length), -torch.inf)
        for member, at in self.rows_of(batch, x.device).items():
            behind = length - given[member][0].shape[-2]
            picked = (
                part.expand(len(at), -1, -1) if len(part) == 1 else part.index_select(0, at)
                for part in given[member]
            )
            key, value, shown = picked
            pad = (0, 0, 0, behind)
            keys = keys.index_copy(0, at, F.pad(key, pad).to(keys.dtype))
            values = values.index_copy(0, at, F.pad(value, pad).to(values.dtype))
            shown = F.pad(shown, (0, behind), value=-torch.inf)
            scores = scores.index_copy(0, at, shown.to(scores.dtype))
        return keys, values, scores

    @staticmethod
    def _of(modules: list[Any], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values (1 or B, P, D) and scores (B, N, P) of one member's prefixes."""
        keys, values, scores = [], [], []
        for key, value, gate in (module(x) for module in modules):
            keys.append(key if key.dim() == 3 else key[None])
            values.append(value if value.dim() == 3 else value[None])
            scores.append(gate_columns(gate, key.shape[-2], x))
        return torch.cat(keys, dim=1), torch.cat(values, dim=1), torch.cat(scores, dim=-1)
