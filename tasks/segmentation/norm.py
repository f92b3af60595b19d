"""Batch norm over the batches of all processes, on any device."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from ..evaluation import processes


class BatchNorm(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose statistics are those of all processes together.

    So that training with several processes, which see few images each, is that with one. torch's
    own SyncBatchNorm does it on GPUs alone. And unlike torch's, one value per channel (the pooled
    1×1 map of a single image) is no error: it is its own mean.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        _, world = processes()
        count = x.numel() // x.shape[1] * world
        if not self.training or (world == 1 and count > 1):
            return super().forward(x)
        values = x.float()
        total = all_reduce if world > 1 else nn.Identity()
        mean = total(values.sum(dim=(0, 2, 3))) / count
        centred = values - mean[:, None, None]
        variance = total(centred.square().sum(dim=(0, 2, 3))) / count
        self._update(mean.detach(), variance.detach() * count / max(count - 1, 1))
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    def _update(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)


def conv_norm_relu(inputs: int, outputs: int, *, kernel: int = 1, stride: int = 1) -> nn.Sequential:
    """Convolution that keeps the size (at stride 1), batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
        BatchNorm(outputs),
        nn.ReLU(inplace=True),
    )
