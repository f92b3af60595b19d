"""A plain bottleneck as one GPU kernel, where no gradient is asked for.

    out = rest + s * (U act(D h + b_D) + b_U)

Run as torch operations this is four or five launches, and the up-projection's result travels
through memory twice. At small batches launches are what an adapter costs, at large ones memory.
Compiled models do not come here: the compiler makes kernels of its own.

Shape legend: M tokens, D width of the encoder, R of the bottleneck.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

# By activation: its number in the kernel.
CODES = {"relu": 0, "gelu": 1, "silu": 2, "quick_gelu": 3, "identity": 4}
LARGEST = 128  # bottlenecks above this do not fit a program's registers
_HALF = (torch.bfloat16, torch.float16)
# Weight (R, D) and bias (R,) of D, weight (D, R) and bias (D,) of U.
Maps = tuple[Tensor, Tensor, Tensor, Tensor]


def fits(h: Tensor, rest: Tensor, maps: Maps, activation: str) -> bool:
    """Whether `bottleneck` can take these: contiguous half-precision tokens (..., D) on a GPU and
    maps of the same dtype, none of which wants a gradient."""
    dtype = h.dtype
    if not h.is_cuda or dtype not in _HALF or activation not in CODES or _launch() is None:
        return False
    tensors = (h, *maps) if rest is h else (h, rest, *maps)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    if not all(tensor.dtype == dtype and tensor.is_contiguous() for tensor in tensors):
        return False
    return maps[0].shape[0] <= LARGEST and (rest is h or h.shape == rest.shape)


def bottleneck(h: Tensor, rest: Tensor, maps: Maps, *, activation: str, scale: float) -> Tensor:
    """rest + s * (U act(D h + b_D) + b_U), (..., D), of what `fits`.

    Products are summed in float32, the bottleneck's state is rounded to the dtype of `h`.
    """
    launch = _launch()
    assert launch is not None
    out = torch.empty_like(rest)
    launch((h, rest, *maps, out), activation=CODES[activation], scale=scale)
    return out


@functools.cache
def _launch() -> Callable[..., None] | None:
    """Runs the kernel; None where Triton, which torch brings along on Linux with CUDA, is not."""
    if importlib.util.find_spec("triton") is None:
        return None
    from .fused_kernel import launch

    return launch
