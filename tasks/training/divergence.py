"""Stops a training whose loss is not finite any more."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

IN_A_ROW = 3  # losses; a scaler of fp16 skips single steps


class LossWatch:
    """Counts losses in a row that are not finite.

    The count lies on the device of the losses, so that no step waits for it; `check` reads it.
    """

    def __init__(self) -> None:
        self._state: Tensor | None = None  # (2,): bad losses in a row, and the step of the first

    def see(self, loss: Tensor, step: int) -> None:
        """Takes the loss of a step, a scalar."""
        loss = loss.detach()
        if self._state is None or self._state.device != loss.device:
            self._state = torch.zeros(2, dtype=torch.int64, device=loss.device)
        count, first = self._state
        bad = ~torch.isfinite(loss)
        first = torch.where(count > 0, first, torch.full_like(first, step))
        self._state = torch.stack((torch.where(bad, count + 1, torch.zeros_like(count)), first))

    def check(self, *, learning_rate: float, parameters: Iterable[Tensor] = ()) -> None:
        """Raises ValueError if the loss stays without a finite value.

        Args:
            learning_rate: the one of the step, for the message.
            parameters: values that must be finite after a bad loss; they are about to be saved.
        """
        if self._state is None:
            return
        count, first = self._state.tolist()
        lost = count and not all(bool(torch.isfinite(value).all()) for value in parameters)
        if count >= IN_A_ROW or lost:
            raise ValueError(
                f"training has diverged: the loss is not finite from step {first} on, at the "
                f"learning rate {learning_rate:.3g}; lower trainer.learning_rate, set "
                "trainer.max_grad_norm, or train in fp32 or bf16 if this is fp16; the checkpoints "
                "from before that step are kept"
            )
