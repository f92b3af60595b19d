"""Contrastive losses over all pairs of all processes, and large batches in little memory.

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
    """This process's share of the loss over all pairs: the mean over processes is the whole loss.

    DDP takes the mean of the processes' gradients, and `gather` hands each process the sum of all
    their derivatives by its own embeddings; together that is the gradient of the whole loss.

    Args:
        images, texts: (B, E) unit vectors; pair i is image i and text i. Every process has B.
        image_ids, text_ids: (B,) int64; pairs of one image, or of one text, are no negatives.
        scale: the inverse temperature.
        bias: given for the sigmoid loss (Zhai et al. 2023, eq. 1), None for InfoNCE.
        same_image: whether other matching pairs are "positive", or "masked" (left out).
    """
    every_image, every_text = gather(images), gather(texts)
    matching = matches(image_ids, text_ids)  # (B, G)
    rank, _ = processes()
    own = torch.zeros_like(matching)
    own[:, rank * len(own) : (rank + 1) * len(own)].fill_diagonal_(True)
    positive = matching if same_image == "positive" else own
    ignored = matching & ~positive
    if bias is not None:
        logits = scale * images @ every_text.T + bias
        return sigmoid_loss(logits, positive, ignored)
    image_loss = info_nce(scale * images @ every_text.T, positive, ignored)
    text_loss = info_nce(scale * texts @ every_image.T, positive, ignored)
    return (image_loss + text_loss) / 2


def info_nce(logits: Tensor, positive: Tensor, ignored: Tensor) -> Tensor:
    """Cross-entropy of each row of (B, G) logits with its positives, equally likely; the mean.

    positive, ignored: (B, G) bool; what is ignored takes no part in the row's softmax.
    """
    logs = logits.masked_fill(ignored, -torch.inf).log_softmax(dim=1)
    # Not a product with the targets: 0 · −inf of what is ignored would be NaN.
    wanted = logs.masked_fill(~positive, 0).sum(dim=1) / positive.sum(dim=1)
    return -wanted.mean()


def sigmoid_loss(logits: Tensor, positive: Tensor, ignored: Tensor) -> Tensor:
    """Every pair of (B, G) logits a decision of its own; the sum over pairs, by row; the mean."""
    signed = torch.where(positive, logits, -logits)
    return -F.logsigmoid(signed).masked_fill(ignored, 0).sum(dim=1).mean()


def matches(image_ids: Tensor, text_ids: Tensor) -> Tensor:
    """(B, G) bool: whether pairs of this process and pairs of all share their image or text."""
    every = gather(torch.stack([image_ids, text_ids], dim=1))
    return (image_ids[:, None] == every[:, 0]) | (text_ids[:, None] == every[:, 1])


def hard_negatives(logits: Tensor, matching: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of (B, B) a column that does not match, drawn by the softmax of the logits.

    As BLIP and ALBEF draw them (Li et al. 2021, §3.2). Returns (B,) columns, and (B,) bool whether
    the row has any that does not match; where it has none its column means nothing.
    """
    weights = logits.detach().float().masked_fill(matching, -torch.inf)
    there = ~matching.all(dim=1)
    weights = torch.where(there[:, None], weights, 0).softmax(dim=1)
    # A column that cannot be told from 0 beside the others may still be drawn, as in BLIP.
    weights = (weights + 1e-4).masked_fill(matching & there[:, None], 0)
    return torch.multinomial(weights, 1).squeeze(1), there


def in_chunks(encode: Callable[[Tensor], Any], inputs: Tensor, size: int | None) -> Any:
    """`encode(inputs)`, a tensor or a tuple of them, in the memory of `size` inputs at a time.

    Each chunk is encoded without a graph and encoded anew when backward comes to it, with the
    random numbers that it drew the first time: gradient caching (Gao et al. 2021) by checkpoints.
    What is computed from the embeddings of all chunks, the temperature's gradient included, is
    computed once and is exact.
    """
    if size is None or len(inputs) <= size or not torch.is_grad_enabled():
        return encode(inputs)
    parts = [checkpoint(encode, part, use_reentrant=False) for part in inputs.split(size)]
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


def gather(tensor: Tensor) -> Tensor:
    """(B, …) of every process -> (G, …), in the order of their ranks, with gradients."""
    _, world = processes()
    return tensor if world == 1 else _Gather.apply(tensor)


class _Gather(torch.autograd.Function):
    """Backward: each process receives the sum of all processes' gradients by its own tensor."""

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
