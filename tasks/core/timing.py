"""The time and memory that one call takes, on a CPU or an accelerator."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def wait(device: torch.device) -> None:
    """Until the device has done all that it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], object], device: torch.device, *, times: int = 1) -> float:
    """Seconds of one call, of `times` in a row that the device finishes."""
    wait(device)
    started = time.perf_counter()
    for _ in range(times):
        run()
    wait(device)
    return (time.perf_counter() - started) / times


@dataclass
class Kept:
    """What a forward pass keeps for the backward pass, parameters left out."""

    bytes: int = 0


@contextmanager
def kept_for_backward(parameters: Iterable[nn.Parameter]) -> Iterator[Kept]:
    """Counts what is kept inside the block, each storage once; the count is there behind it."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    sizes: dict[int, int] = {}
    found = Kept()

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield found
    found.bytes = sum(sizes.values())
