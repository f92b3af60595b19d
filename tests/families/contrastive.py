"""What each process of the test of a loss over two processes runs."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from mmadapters.tasks.retrieval.loss import contrastive_loss, in_chunks

PAIRS, WIDTH = 8, 5
# Across the two halves too: one image in both, one text in both.
IMAGE_IDS = torch.tensor([0, 1, 2, 2, 0, 5, 6, 7])
TEXT_IDS = torch.tensor([0, 1, 2, 3, 4, 1, 6, 7])


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(6, WIDTH), nn.Linear(7, WIDTH)
        self.logit_scale = nn.Parameter(torch.tensor(1.5))
        self.double()

    def forward(
        self, images: Tensor, texts: Tensor, image_ids: Tensor, text_ids: Tensor, size: int | None
    ) -> Tensor:
        return contrastive_loss(
            in_chunks(lambda x: F.normalize(self.image(x), dim=1), images, size),
            in_chunks(lambda x: F.normalize(self.text(x), dim=1), texts, size),
            image_ids,
            text_ids,
            scale=self.logit_scale.exp(),
        )


def inputs() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(PAIRS, 6, generator=generator, dtype=torch.float64)
    texts = torch.randn(PAIRS, 7, generator=generator, dtype=torch.float64)
    return images, texts, IMAGE_IDS, TEXT_IDS


def alone() -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of all pairs, and its gradients by name."""
    model = Towers()
    loss = model(*inputs(), None)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}  # type: ignore[union-attr]


def worker(rank: int, address: str, folder: str) -> None:
    """Half of the pairs, under DDP; writes the mean loss and the gradients."""
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    model = DistributedDataParallel(Towers())
    half = slice(rank * PAIRS // 2, (rank + 1) * PAIRS // 2)
    loss = model(*(tensor[half] for tensor in inputs()), 3)
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    found = {name: p.grad for name, p in model.module.named_parameters()}
    torch.save({"loss": mean / 2, **found}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
