"""Time and memory of one call, on a CPU or an accelerator."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def wait(device: torch.device) -> None:
    """Waits until the device has finished all of its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], object], device: torch.device, *, times: int = 1) -> float:
    """Returns the mean seconds of a call, over `times` calls that the device finishes."""
    wait(device)
    started = time.perf_counter()
    for _ in range(times):
        run()
    wait(device)
    return (time.perf_counter() - started) / times


@dataclass
class BackwardMemory:
    """The bytes that a forward pass keeps for the backward pass, without parameters."""

    bytes: int = 0


@contextmanager
def kept_for_backward(parameters: Iterable[nn.Parameter]) -> Iterator[BackwardMemory]:
    """Counts the bytes that the block keeps for the backward pass, each storage once.

    The count is complete when the block has ended.
    """
    of_parameters = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    sizes: dict[int, int] = {}
    memory = BackwardMemory()

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in of_parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield memory
    memory.bytes = sum(sizes.values())
