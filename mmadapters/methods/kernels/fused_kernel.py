"""The Triton kernel of `fused`; imported only if Triton is installed.

A program takes BLOCK_M tokens through both projections. It sums D h over stretches of the width,
keeps the bottleneck's state in registers, and writes each stretch of the result.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["M"])
def _kernel(
    h_ptr,
    rest_ptr,
    down_ptr,
    down_bias_ptr,
    up_ptr,
    up_bias_ptr,
    out_ptr,
    M,
    scale,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    dtype = h_ptr.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inner = tl.arange(0, BLOCK_R)
    stretch = tl.arange(0, BLOCK_D)
    in_rows = rows[:, None] < M
    in_r = inner < R
    at = rows[:, None].to(tl.int64) * D
    state = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + stretch
        # A constant if the stretches fill the width: then no lane is masked.
        in_d = (d < D) | (D % BLOCK_D == 0)
        x = tl.load(h_ptr + at + d[None, :], mask=in_rows & in_d[None, :], other=0.0)
        w_at = down_ptr + inner[None, :] * D + d[:, None]
        w = tl.load(w_at, mask=in_r[None, :] & in_d[:, None], other=0.0)
        state = tl.dot(x, w, state)
    state += tl.load(down_bias_ptr + inner, mask=in_r, other=0.0).to(tl.float32)[None, :]
    # Rounded as the projection alone would round it.
    z = state.to(dtype).to(tl.float32)
    if ACTIVATION == 0:
        z = tl.maximum(z, 0.0)
    elif ACTIVATION == 1:
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == 2:
        z = z * tl.sigmoid(z)
    elif ACTIVATION == 3:
        z = z * tl.sigmoid(1.702 * z)
    z = z.to(dtype)
    for start in range(0, D, BLOCK_D):
        d = start + stretch
        in_d = (d < D) | (D % BLOCK_D == 0)
        mask = in_rows & in_d[None, :]
        rest = tl.load(rest_ptr + at + d[None, :], mask=mask, other=0.0).to(tl.float32)
        w_at = up_ptr + d[None, :] * R + inner[:, None]
        w = tl.load(w_at, mask=in_r[:, None] & in_d[None, :], other=0.0)
        change = tl.dot(z, w)
        change += tl.load(up_bias_ptr + d, mask=in_d, other=0.0).to(tl.float32)[None, :]
        tl.store(out_ptr + at + d[None, :], (rest + scale * change).to(dtype), mask=mask)


# Compiled kernels by device, dtype, sizes and activation, so that a launch need not look at its
# arguments again: that takes longer than the kernel of a small batch.
_COMPILED: dict[tuple, Any] = {}


def launch(tensors: tuple[Tensor, ...], *, activation: int, scale: float) -> None:
    """Runs the kernel on h, rest, D, b_D, U, b_U and out.

    Args:
        tensors: the seven tensors, with the shapes that `fused` gives.
        activation: its number in `fused.CODES`.
        scale: s of the formula.
    """
    h = tensors[0]
    rank, width = tensors[2].shape
    tokens = h.numel() // width
    block_m, most, warps, stages = _blocks(tokens)
    device = h.device.index
    key = (device, h.dtype, width, rank, block_m, activation)
    grid = (-(-tokens // block_m), 1, 1)
    constants = (width, rank, block_m, _stretch(width, most), _power_of_two(rank), activation)
    known = _COMPILED.get(key)
    if known is not None and _aligned(tensors) and device == torch.cuda.current_device():
        known[grid](*tensors, tokens, scale, *constants)
        return
    with torch.cuda.device_of(h):
        compiled = _kernel[grid](
            *tensors, tokens, scale, *constants, num_warps=warps, num_stages=stages
        )
    if _aligned(tensors) and hasattr(compiled, "__getitem__"):
        _COMPILED[key] = compiled


def _blocks(tokens: int) -> tuple[int, int, int, int]:
    """Returns tokens and channels at once, warps and stages: measured on an H100 at width 768."""
    if tokens >= 32768:
        return 64, 128, 8, 3
    return (32, 256, 4, 3) if tokens >= 2048 else (16, 256, 4, 4)


@functools.cache
def _stretch(width: int, most: int) -> int:
    """Returns the channels at once: a power of two that divides the width, if one does."""
    while most > 32 and width % most:
        most //= 2
    return most


def _aligned(tensors: tuple[Tensor, ...]) -> bool:
    """Whether all tensors begin at a multiple of 16 bytes, as the compiled kernels assume."""
    return not any(tensor.data_ptr() % 16 for tensor in tensors)


@functools.cache
def _power_of_two(rank: int) -> int:
    """Returns the columns of a state of `rank`: products take powers of two from 16 on."""
    return max(16, triton.next_power_of_2(rank))
