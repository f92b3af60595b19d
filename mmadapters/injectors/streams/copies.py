"""Copies of the batch, one for each member of `Parallel`.

In a plain call they are made at the first adapted block, so that the blocks below run once. If more
than the last state is read, or a second input has a row for each sample, all inputs are repeated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..calls import first_input
from ..state import Hook


@dataclass(eq=False)
class CopyHook(Hook):
    """Repeats the batch that enters the first adapted block of `tower`, and the arguments that come
    with it there and further up (masks, the states of another tower).

    Attributes:
        index: the number of the hooked block.
        crossed: the tower attends to another one, whose states may have been repeated already.
    """

    before = with_kwargs = first = True

    tower: str
    index: int
    crossed: bool

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        plan, rows = self.state.plan(), self.state.local.rows
        x = first_input(args, kwargs)
        if rows and x.shape[0] % rows:
            raise ValueError(
                f"Parallel has {rows} rows in this call and {x.shape[0]} of them reached block "
                f"{self.index} of tower {self.tower!r}: the library leaves out rows that are done "
                "(long recordings, fallbacks), so run the adapters one after another"
            )
        start = plan.starts.get(self.tower)
        if start is None or self.index < start:
            return None
        copies, batch = plan.copies, x.shape[0]
        if self.index > start:
            batch //= copies

        def repeated(value: Any, name: str = "") -> Any:
            if isinstance(value, tuple):
                return tuple(map(repeated, value))
            if value is x:
                return x if self.index > start else _repeated(x, copies)
            # A tensor with two dimensions, (B, N), is repeated only if it is a padding mask.
            least = 2 if name == "attention_mask" else 3
            if not isinstance(value, Tensor) or value.dim() < least or len(value) == 1 != batch:
                return value
            # Masks, states and biases by sample or by sample and head are repeated; all else is
            # shared. T5's first block hands on biases of four dimensions, repeated already.
            carried_on = self.index > start and value.dim() == 4
            done = (self.crossed or carried_on) and value.shape[0] == copies * batch
            return value if done or value.shape[0] % batch else _repeated(value, copies)

        # WavLM's first block makes these for all others, which hand them on.
        carried = {"position_bias"} if self.index > start else set()
        kwargs = {k: v if k in carried else repeated(v, k) for k, v in kwargs.items()}
        return tuple(map(repeated, args)), kwargs


def _repeated(x: Tensor, copies: int) -> Tensor:
    return x.repeat(copies, *(1,) * (x.dim() - 1))
