"""Batch norm over the batches of all processes, on any device."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from ...core.device import processes


class BatchNorm(nn.BatchNorm2d):
    """`nn.BatchNorm2d` with the statistics of all processes together.

    Training with several processes, which see few images each, then equals training with one.
    torch's SyncBatchNorm does this on GPUs only. There are two more differences. A single value per
    channel (the pooled 1×1 map of one image) is no error; it is its own mean. And the first running
    statistics are plain means of all batches so far, while torch's stay near 0 and 1 for about
    twenty batches.
    """

    _past_start = False  # whether the running statistics use the plain momentum

    def forward(self, x: Tensor) -> Tensor:
        """Normalises (B, C, H, W) to the same shape."""
        if not self.training:
            return super().forward(x)
        _, world = processes()
        count = x.numel() // x.shape[1] * world
        momentum = self._next_momentum()
        if world == 1 and count > 1:
            return F.batch_norm(
                x,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                training=True,
                momentum=momentum,
                eps=self.eps,
            )
        values = x.float()
        total = all_reduce if world > 1 else nn.Identity()
        mean = total(values.sum(dim=(0, 2, 3))) / count
        centred = values - mean[:, None, None]
        variance = total(centred.square().sum(dim=(0, 2, 3))) / count
        assert self.running_mean is not None
        assert self.running_var is not None
        self.running_mean.lerp_(mean.detach(), momentum)
        self.running_var.lerp_(variance.detach() * count / max(count - 1, 1), momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    def _next_momentum(self) -> float:
        """Counts a batch and returns its share in the running statistics."""
        assert self.momentum is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        if self._past_start:
            return self.momentum
        batches = int(
            self.num_batches_tracked
        )  # waits for the device, so it runs at the start only
        self._past_start = batches * self.momentum > 1
        return max(self.momentum, 1 / batches)


def conv_norm_relu(inputs: int, outputs: int, *, kernel: int = 1, stride: int = 1) -> nn.Sequential:
    """Makes a convolution that keeps the size at stride 1, batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
        BatchNorm(outputs),
        nn.ReLU(inplace=True),
    )
