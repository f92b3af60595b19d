"""Runs the kernel of `mmadapters.methods.kernels.fused` in Triton's interpreter, on the CPU.

Prints for each case its relative error against the formula in float64; started by test_fused.py.
"""

from __future__ import annotations

import torch

from mmadapters.methods.bottleneck import ACTIVATIONS
from mmadapters.methods.kernels import fused, fused_kernel

# Tokens, width, bottleneck: widths that stretches fill and do not fill, and several programs.
SIZES = ((10, 72, 10), (33, 256, 48), (2, 96, 16))


def main() -> None:
    torch.manual_seed(0)
    for activation, code in fused.CODES.items():
        for tokens, width, size in SIZES:
            h, other = torch.randn(tokens, width).half(), torch.randn(tokens, width).half()
            shapes = ((size, width), (size,), (width, size), (width,))
            maps = tuple((0.2 * torch.randn(shape)).half() for shape in shapes)
            down, down_bias, up, up_bias = (t.double() for t in maps)
            for rest in (h, other):
                out = torch.empty_like(h)
                fused_kernel.launch((h, rest, *maps, out), activation=code, scale=0.5)
                state = ACTIVATIONS[activation](h.double() @ down.T + down_bias)
                wanted = rest.double() + 0.5 * (state @ up.T + up_bias)
                error = (out.double() - wanted).norm() / wanted.norm()
                print(
                    activation, tokens, width, size, "same" if rest is h else "apart", error.item()
                )


if __name__ == "__main__":
    main()
