"""Passes that keep the states of a tower's lower blocks, and passes that start from kept states.

States that were not kept are NaN, so that an output shows if something reads them nevertheless.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..injectors.calls import first_input, first_output, with_first, with_first_input
from ..injectors.intercept import put_first
from ..injectors.state import Intercepted
from ..sites.sitemap import Stem, Tower

# The output of a tower's block, (B, N, D), by the tower's name and the block's number; -1 is the
# input of the first block.
States = dict[tuple[str, int], Tensor]


@dataclass(eq=False)
class ResumePoint:
    """The block at which a tower can be resumed, and what is known of the modules below it.

    Attributes:
        block: the first block that runs when the tower is resumed.
        layers: the blocks whose outputs are kept, ascending; -1 is the input of block 0.
        dtypes: by layer, the dtype of its states.
        outputs: by block, its output with an empty first tensor.
        stem: by number of a part of the stem, its output with tensors on the meta device.
    """

    tower: Tower
    block: int
    layers: tuple[int, ...]
    dtypes: dict[int, torch.dtype]
    outputs: dict[int, Any]
    stem: dict[int, Any]


class AllStatesKept(BaseException):
    """All states are kept, so that nothing above them needs to run."""


@dataclass(eq=False)
class CapturePass:
    """A `Pass` that keeps the states of towers; blocks above them return their input.

    Attributes:
        points: by tower, where it will be resumed.
        states: those that were kept so far.

    Raises, when it runs:
        AllStatesKept: the last state is there.
    """

    points: Mapping[str, ResumePoint]
    states: States = field(default_factory=dict)

    def stem(self, at: Intercepted, part: Stem, args: tuple, kwargs: dict) -> Any:
        put_first(at.tower)
        return at.run(*args, **kwargs)

    def enter(self, tower: Tower, args: tuple, kwargs: dict) -> None:
        self._keep(tower, -1, first_input(args, kwargs))

    def block(self, at: Intercepted, index: int, args: tuple, kwargs: dict) -> Any:
        point = self.points.get(at.tower.name)
        if point is None:
            return at.run(*args, **kwargs)
        if index >= point.block and index in point.outputs:
            return with_first(point.outputs[index], first_input(args, kwargs))
        output = at.run(*args, **kwargs)
        self._keep(at.tower, index, first_output(output))
        return output

    def _keep(self, tower: Tower, layer: int, state: Tensor) -> None:
        if layer not in self.points[tower.name].layers:
            return
        state = state.detach()
        self.states[tower.name, layer] = state if tower.batch_first else state.transpose(0, 1)
        if all((p.tower.name, p.layers[-1]) in self.states for p in self.points.values()):
            raise AllStatesKept


@dataclass(eq=False)
class ResumePass:
    """A `Pass` in which lower blocks return kept states, or NaN where none was kept.

    Attributes:
        points: by tower, where it is resumed.
        states: those that were kept of the batch.

    Raises, when it runs:
        ValueError: the states are those of another batch.
    """

    points: Mapping[str, ResumePoint]
    states: Mapping[tuple[str, int], Tensor] = field(default_factory=dict)

    def stem(self, at: Intercepted, part: Stem, args: tuple, kwargs: dict) -> Any:
        put_first(at.tower)
        point = self.points.get(at.tower.name)
        if point is None:
            return at.run(*args, **kwargs)
        return stem_output(part, point.stem[part.index], args, kwargs)

    def enter(self, tower: Tower, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        state = self._state(tower, -1, first_input(args, kwargs))
        return with_first_input(args, kwargs, state)

    def block(self, at: Intercepted, index: int, args: tuple, kwargs: dict) -> Any:
        point = self.points.get(at.tower.name)
        # Passes of other threads, or around this one, may intercept more than this one does.
        if point is None or index >= point.block:
            return at.run(*args, **kwargs)
        x = first_input(args, kwargs)
        if index in point.layers:
            state = self._state(at.tower, index, x)
        else:
            state = nan_filled(x.shape, dtype=x.dtype, device=x.device)
        return with_first(point.outputs[index], state)

    def _state(self, tower: Tower, layer: int, x: Tensor) -> Tensor:
        """Returns a kept state in the layout of `x`, (B, N, D) or (N, B, D)."""
        state = self.states[tower.name, layer]
        state = state if tower.batch_first else state.transpose(0, 1)
        if state.shape != x.shape:
            raise ValueError(
                f"the states kept of tower {tower.name!r} have the shape {tuple(state.shape)} and "
                f"this batch gives {tuple(x.shape)}: they are of other examples, or of a batch "
                "that was padded differently"
            )
        return state.to(self.points[tower.name].dtypes[layer])


def nan_filled(shape: Iterable[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns a tensor of `shape` that is NaN everywhere (0 if its dtype has no NaN) and takes the
    memory of one number."""
    value = float("nan") if dtype.is_floating_point else 0
    return torch.full((), value, dtype=dtype, device=device).expand(*shape)


def stem_output(part: Stem, like: Any, args: tuple, kwargs: dict) -> Any:
    """Returns the output that a part of the stem has for these arguments, with NaN for its values.

    Args:
        like: an earlier output of the part, with tensors on the meta device.
    """
    x = first_input(args, kwargs)
    if part.convolution is None:

        def filled(value: Any) -> Any:
            # The library writes to it in place, behind padding: so it needs memory of its own.
            if not isinstance(value, Tensor):
                return value
            shape = (*x.shape[:-1], value.shape[-1])
            return nan_filled(shape, dtype=value.dtype, device=x.device).clone()

        return tree_map(filled, like)
    convolution: Any = part.convolution
    sizes = [_steps(size, convolution, axis) for axis, size in enumerate(x.shape[2:])]
    shape = (x.shape[0], convolution.out_channels, *sizes)
    weight = convolution.weight
    output = nan_filled(shape, dtype=weight.dtype, device=weight.device)
    if isinstance(like, Tensor):
        return output
    # torchaudio's layers count along how long each utterance still is.
    lengths = args[1]
    if lengths is not None:
        lengths = _steps(lengths, convolution, 0).clamp(min=0)
    return output, lengths


def _steps(size: Any, convolution: Any, axis: int) -> Any:
    """Returns how many steps a convolution makes along an axis of `size` (an int, or a tensor)."""
    kernel = convolution.dilation[axis] * (convolution.kernel_size[axis] - 1) + 1
    padding = convolution.padding
    if padding == "same":
        return size
    added = 0 if padding == "valid" else 2 * padding[axis]
    return (size + added - kernel) // convolution.stride[axis] + 1
