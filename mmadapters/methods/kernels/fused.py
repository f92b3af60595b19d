"""A plain bottleneck as one GPU kernel, where no gradient is asked for.

    out = rest + s * (U act(D h + b_D) + b_U)

As torch operations this takes four or five launches, and the result of the up-projection travels
through memory twice. Launches dominate the cost of an adapter at small batches, memory at large
ones. Compiled models do not use this kernel: the compiler makes its own.

Shape legend: M tokens, D width of the encoder, R of the bottleneck.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .linear import is_plain

# The number of each activation in the kernel.
CODES = {"relu": 0, "gelu": 1, "silu": 2, "quick_gelu": 3, "identity": 4}
LARGEST = 128  # bottlenecks above this do not fit a program's registers
_HALF = (torch.bfloat16, torch.float16)
# Weight (R, D) and bias (R,) of D, weight (D, R) and bias (D,) of U.
Maps = tuple[Tensor, Tensor, Tensor, Tensor]


class BottleneckModule(Protocol):
    """The parts of a bottleneck that `sum_of` looks at."""

    training: bool
    activation: str
    dropout: float
    drop_path: float
    scale: float | nn.Parameter
    _modules: dict[str, nn.Module | None]
    _parameters: dict[str, nn.Parameter | None]


def sum_of(module: BottleneckModule, h: Tensor, rest: Tensor) -> Tensor | None:
    """Returns rest + s * (U act(D h + b_D) + b_U), (..., D), if one kernel can compute it.

    It cannot, and None is returned, on a CPU, while compiling, with gradients, with a norm, a
    learned scale or active dropout, with other projections than linear maps without hooks, or if
    the tensors do not fit.
    """
    if not h.is_cuda or torch.compiler.is_compiling():
        return None
    # Looked up where nn.Module keeps them: its attribute access, which searches, would take as
    # long as the launch.
    parts = module._modules
    down, up = parts["down"], parts["up"]
    if (
        parts.get("norm_before") is not None
        or parts.get("norm_after") is not None
        or "scale" in module._parameters
        or (module.training and (module.dropout or module.drop_path))
        or not is_plain(down)
        or not is_plain(up)
    ):
        return None
    first, second = down._parameters, up._parameters
    maps: Any = (first["weight"], first["bias"], second["weight"], second["bias"])
    if not fits(h, rest, maps, module.activation):
        return None
    scale: Any = module.scale
    return bottleneck(h, rest, maps, activation=module.activation, scale=scale)


def fits(h: Tensor, rest: Tensor, maps: Maps, activation: str) -> bool:
    """Whether `bottleneck` can take these tensors.

    It takes contiguous tokens (..., D) in half precision on a GPU and maps of the same dtype, if
    none of them needs a gradient.
    """
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
    """Returns rest + s * (U act(D h + b_D) + b_U), (..., D), for tensors that `fits` accepts.

    Products are summed in float32. The bottleneck's state is rounded to the dtype of `h`.
    """
    launch = _launch()
    assert launch is not None
    out = torch.empty_like(rest)
    launch((h, rest, *maps, out), activation=CODES[activation], scale=scale)
    return out


@functools.cache
def _launch() -> Callable[..., None] | None:
    """Returns the function that runs the kernel, or None without Triton.

    torch installs Triton on Linux with CUDA.
    """
    if importlib.util.find_spec("triton") is None:
        return None
    from .fused_kernel import launch

    return launch
