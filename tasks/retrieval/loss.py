"""Contrastive losses over the pairs of all processes, and large batches in little memory.

Shape legend: B pairs of this process, W processes, G = W·B pairs in all, E width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..core.device import processes


def contrastive_loss(
    images: Tensor,
    texts: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    *,
    scale: Tensor,
    bias: Tensor | None = None,
    same_image: str = "positive",
) -> Tensor:
    """Returns this process's share of the loss over all pairs.

    The mean of the shares is the whole loss. DDP takes the mean of the processes' gradients, and
    `gather` gives each process the sum of all processes' derivatives with respect to its
    embeddings. Together this is the gradient of the whole loss.

    Args:
        images: (B, E) unit vectors. Every process has the same B.
        texts: (B, E) unit vectors; pair i is image i and text i.
        image_ids: (B,) int64; pairs with equal ids have the same image and are no negatives.
        text_ids: (B,) int64; pairs with equal ids have the same text and are no negatives.
        scale: the inverse temperature.
        bias: of the sigmoid loss (Zhai et al. 2023, eq. 1); None for InfoNCE.
        same_image: the role of other pairs that match: "positive", or "masked" (left out).
    """
    every_image, every_text = gather(images), gather(texts)
    matching = matches(image_ids, text_ids)  # (B, G)
    rank, _ = processes()
    itself = torch.zeros_like(matching)
    itself[:, rank * len(itself) : (rank + 1) * len(itself)].fill_diagonal_(True)
    positive = matching if same_image == "positive" else itself
    ignored = matching & ~positive
    if bias is not None:
        logits = scale * images @ every_text.T + bias
        return sigmoid_loss(logits, positive, ignored)
    image_loss = info_nce(scale * images @ every_text.T, positive, ignored)
    text_loss = info_nce(scale * texts @ every_image.T, positive, ignored)
    return (image_loss + text_loss) / 2


def info_nce(logits: Tensor, positive: Tensor, ignored: Tensor) -> Tensor:
    """Returns the mean over rows of the cross-entropy with equally likely positives.

    Args:
        logits: (B, G).
        positive: (B, G) bool.
        ignored: (B, G) bool, for columns that take no part in the row's softmax.
    """
    logs = logits.masked_fill(ignored, -torch.inf).log_softmax(dim=1)
    # No product with the targets, because 0 · −inf of an ignored column would be NaN.
    wanted = logs.masked_fill(~positive, 0).sum(dim=1) / positive.sum(dim=1)
    return -wanted.mean()


def sigmoid_loss(logits: Tensor, positive: Tensor, ignored: Tensor) -> Tensor:
    """Returns the mean over rows of the summed binary losses of their pairs.

    Args:
        logits: (B, G).
        positive: (B, G) bool.
        ignored: (B, G) bool, for pairs that are left out.
    """
    signed = torch.where(positive, logits, -logits)
    return -F.logsigmoid(signed).masked_fill(ignored, 0).sum(dim=1).mean()


def matches(image_ids: Tensor, text_ids: Tensor) -> Tensor:
    """Returns (B, G) bool: whether a pair of this process shares image or text with any pair."""
    every = gather(torch.stack([image_ids, text_ids], dim=1))
    return (image_ids[:, None] == every[:, 0]) | (text_ids[:, None] == every[:, 1])


def hard_negatives(logits: Tensor, matching: Tensor) -> tuple[Tensor, Tensor]:
    """Draws for each row a column that does not match, by the softmax of the logits.

    BLIP and ALBEF draw them in this way (Li et al. 2021, §3.2).

    Args:
        logits: (B, B).
        matching: (B, B) bool.

    Returns:
        (B,) columns, and (B,) bool, whether a column of the row does not match. If all match, the
        row's column is meaningless.
    """
    weights = logits.detach().float().masked_fill(matching, -torch.inf)
    there = ~matching.all(dim=1)
    weights = torch.where(there[:, None], weights, 0).softmax(dim=1)
    # A column whose share rounds to 0 may still be drawn, as in BLIP.
    weights = (weights + 1e-4).masked_fill(matching & there[:, None], 0)
    return torch.multinomial(weights, 1).squeeze(1), there


def in_chunks(encode: Callable[[Tensor], Any], inputs: Tensor, size: int | None) -> Any:
    """Returns `encode(inputs)` in the memory of `size` inputs: gradient caching (Gao et al. 2021).

    Each chunk is encoded without a graph, and again in the backward pass with the same random
    numbers (checkpoints). The losses, which need the embeddings of all chunks, are computed once
    and are exact, and so is the temperature's gradient.

    Args:
        encode: inputs -> a tensor or a tuple of tensors.
        inputs: of the whole batch, along the first dimension.
        size: of a chunk; None for no chunks.
    """
    if size is None or len(inputs) <= size or not torch.is_grad_enabled():
        return encode(inputs)
    parts = [checkpoint(encode, part, use_reentrant=False) for part in inputs.split(size)]
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


def gather(tensor: Tensor) -> Tensor:
    """Returns the tensors (B, …) of all processes as (G, …), by rank, with gradients."""
    _, world = processes()
    return tensor if world == 1 else _Gather.apply(tensor)


class _Gather(torch.autograd.Function):
    """Gathers tensors. Backward gives each process the sum of all gradients of its tensor."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        rank, world = processes()
        ctx.rank, ctx.count = rank, len(tensor)
        parts = [torch.empty_like(tensor) for _ in range(world)]
        torch.distributed.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(gradient)
        return gradient[ctx.rank * ctx.count : (ctx.rank + 1) * ctx.count]
