"""Batch norm of one image in each of two processes; writes what came out and the gradients."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from mmadapters.tasks.segmentation.heads.norm import BatchNorm


def inputs() -> torch.Tensor:
    return torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)) + 2


def run(x: torch.Tensor) -> dict[str, torch.Tensor]:
    norm = BatchNorm(3)
    x = x.clone().requires_grad_()
    y = norm(x)
    (y**3).sum().backward()
    assert x.grad is not None
    gradients = {name: p.grad for name, p in norm.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **gradients, **dict(norm.named_buffers())}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = run(inputs()[rank : rank + 1])
    save_file(
        {key: value.contiguous() for key, value in found.items()},
        f"{sys.argv[1]}/{rank}.safetensors",
    )
    dist.destroy_process_group()
