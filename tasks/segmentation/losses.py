"""Losses of segmentation, and their weighted sum.

logits: (B, C, H, W); target: (B, H, W) class ids or the ignore index. Ignored pixels do not count;
if all are ignored, a loss and its gradient are 0.

Shape legend: P pixels that are not ignored, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import LossConfig


def cross_entropy(
    logits: Tensor, target: Tensor, *, ignore: int, weights: Tensor | None = None
) -> Tensor:
    """Returns the mean cross-entropy over pixels, weighted by class weights (C,)."""
    logits_PC, target_P = valid_pixels(logits, target, ignore)
    total = F.cross_entropy(logits_PC, target_P, weight=weights, reduction="sum")
    return total / _weight_of(target_P, weights)


def focal(
    logits: Tensor,
    target: Tensor,
    *,
    ignore: int,
    weights: Tensor | None = None,
    gamma: float = 2.0,
) -> Tensor:
    """Returns the mean over pixels of cross-entropy times (1 − p)^γ.

    p is the probability of the pixel's class.

    Lin et al. 2017, eq. 5. Unlike there, it is the mean over pixels, since there are no anchors,
    and class weights (C,) replace α.
    """
    logits_PC, target_P = valid_pixels(logits, target, ignore)
    log_p = F.log_softmax(logits_PC, dim=1).gather(1, target_P[:, None])[:, 0]
    # expm1 avoids cancellation; the clamp keeps the gradient finite at p = 1 for γ < 1.
    factor = (-torch.expm1(log_p)).clamp_min(torch.finfo(log_p.dtype).tiny) ** gamma
    losses = -factor * log_p
    if weights is not None:
        losses = losses * weights[target_P]
    return losses.sum() / _weight_of(target_P, weights)


def dice(logits: Tensor, target: Tensor, *, ignore: int, smooth: float = 1.0) -> Tensor:
    """Returns the mean over classes of 1 − (2 Σpg + s) / (Σp + Σg + s).

    The sums are over all pixels of the batch.

    Milletari et al. 2016, V-Net, with Σp in place of Σp² as in Drozdzal et al. 2016, and over the
    batch as in nnU-Net. Classes that are not in the batch are left out, as in Lovász-softmax.
    """
    logits_PC, target_P = valid_pixels(logits, target, ignore)
    p_PC = logits_PC.softmax(dim=1)
    truth_PC = F.one_hot(target_P, logits.shape[1]).to(p_PC.dtype)
    both, count = (p_PC * truth_PC).sum(dim=0), truth_PC.sum(dim=0)
    losses = 1 - (2 * both + smooth) / (p_PC.sum(dim=0) + count + smooth)
    return _mean_of_present(losses, count > 0)


def lovasz_softmax(logits: Tensor, target: Tensor, *, ignore: int) -> Tensor:
    """Returns the Lovász extension of 1 − IoU, the mean over the classes in the batch.

    Berman et al. 2018, Algorithm 1 and eq. 11–13; over the whole batch.
    """
    logits_PC, target_P = valid_pixels(logits, target, ignore)
    p_PC = logits_PC.softmax(dim=1)
    truth_PC = F.one_hot(target_P, logits.shape[1]).to(p_PC.dtype)
    errors, order = (truth_PC - p_PC).abs().sort(dim=0, descending=True)
    truth = truth_PC.gather(0, order)
    count = truth_PC.sum(dim=0)
    intersection = count - truth.cumsum(dim=0)
    union = count + (1 - truth).cumsum(dim=0)
    jaccard = 1 - intersection / union
    # The first difference along the order is the cost of each further error.
    slope = torch.diff(jaccard, dim=0, prepend=torch.zeros_like(jaccard[:1]))
    return _mean_of_present((errors * slope.detach()).sum(dim=0), count > 0)


def valid_pixels(logits: Tensor, target: Tensor, ignore: int) -> tuple[Tensor, Tensor]:
    """Returns the logits (P, C) and targets (P,) int64 of the pixels that are not ignored."""
    valid = target != ignore
    return logits.movedim(1, -1)[valid], target[valid].long()


def _weight_of(target_P: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return torch.tensor(max(len(target_P), 1), device=target_P.device)
    total = weights[target_P].sum()
    return torch.where(total > 0, total, torch.ones_like(total))


def _mean_of_present(losses: Tensor, present: Tensor) -> Tensor:
    return (losses * present).sum() / present.sum().clamp_min(1)


class SegmentationLoss(nn.Module):
    """The weighted sum of the losses of a config."""

    weights: Tensor | None

    def __init__(self, config: LossConfig, classes: tuple[str, ...], *, ignore: int) -> None:
        """Checks and stores the class weights.

        Raises:
            ValueError: the config has a weight for an unknown class.
        """
        super().__init__()
        self.config, self.ignore = config, ignore
        if strangers := [name for name in config.class_weights if name not in classes]:
            raise ValueError(
                f"loss.class_weights: {strangers[0]!r} is none of the classes {', '.join(classes)}"
            )
        weights = None
        if config.class_weights:
            weights = torch.tensor([config.class_weights.get(name, 1.0) for name in classes])
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Returns "loss" and its parts by name, float32 scalars."""
        config, logits = self.config, logits.float()
        parts = {}
        with torch.autocast(logits.device.type, enabled=False):
            if config.cross_entropy:
                parts["cross_entropy"] = cross_entropy(
                    logits, target, ignore=self.ignore, weights=self.weights
                )
            if config.dice:
                parts["dice"] = dice(logits, target, ignore=self.ignore)
            if config.lovasz:
                parts["lovasz"] = lovasz_softmax(logits, target, ignore=self.ignore)
            if config.focal:
                parts["focal"] = focal(
                    logits,
                    target,
                    ignore=self.ignore,
                    weights=self.weights,
                    gamma=config.focal_gamma,
                )
        loss = torch.stack([getattr(config, name) * part for name, part in parts.items()]).sum()
        return {"loss": loss, **{name: part.detach() for name, part in parts.items()}}
