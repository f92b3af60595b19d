"""A frozen image encoder with a segmentation head.

Shape legend: B images, C classes.
"""

from __future__ import annotations

from torch import Tensor

from mmadapters import AdapterModel

from ..core.model import TaskModel
from ..encoders.refusals import refuse_embedding_adapters, refuse_other_towers
from ..encoders.vision import ImageTower
from .config import SegmentationConfig
from .heads.build import head_layers, make_head
from .heads.vit_adapter import NeckedHead
from .inference import resize_logits
from .losses import SegmentationLoss
from .transforms import pad_to_patch


class SegmentationModel(TaskModel):
    """An encoder and a head; `logits` classifies pixels, `forward` returns the loss.

    Attributes:
        tower: the image tower of the encoder.
        layers: the blocks that the head reads.
        norm: whether the encoder's final norm is applied to their states.

    Raises:
        ValueError: the encoder reads no images, the head does not fit it, or an adapter has no
            effect on the head's input.
    """

    def __init__(
        self, encoder: AdapterModel, config: SegmentationConfig, classes: tuple[str, ...]
    ) -> None:
        tower = ImageTower(encoder)
        refuse_other_towers(encoder, ["vision"], "segmentation")
        refuse_embedding_adapters(encoder, "segmentation")
        layers = head_layers(config.head, tower.depth)
        _refuse_unused(encoder, layers)
        head = make_head(
            config.head,
            width=tower.width,
            patch=tower.patch,
            layers=len(layers),
            classes=len(classes),
        )
        super().__init__(encoder, head)
        self.tower, self.layers, self.norm = tower, layers, config.head.norm
        self.loss = SegmentationLoss(config.loss, classes, ignore=config.data.ignore_index)

    def logits(self, pixels: Tensor) -> Tensor:
        """Returns logits (B, C, H, W) of pixels (B, 3, H, W) of any size.

        Pixels are padded at the right and the bottom to whole patches; the logits are cut again.
        """
        height, width = pixels.shape[-2:]
        padded = pad_to_patch(pixels, self.tower.patch)
        if isinstance(self.head, NeckedHead):
            logits = self.head(self.tower, padded, self.layers, norm=self.norm)
        else:
            maps = self.tower(padded, self.layers, norm=self.norm).maps
            logits = self.head(maps, padded)
        return resize_logits(logits, padded.shape[-2:])[..., :height, :width]

    def forward(self, pixels: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Returns the loss and its parts.

        Args:
            pixels: (B, 3, H, W).
            mask: (B, H, W) class ids or the ignore index.
        """
        return self.loss(self.logits(pixels), mask)


def _refuse_unused(encoder: AdapterModel, layers: tuple[int, ...]) -> None:
    """Raises a ValueError for an adapter above the last block that the head reads."""
    last = max(layers)
    acting = encoder.active_adapters
    for name in encoder.adapter_names if acting is None else acting.names():
        for site, _ in encoder.adapter(name).entries():
            place = site.split(".")[1:]
            if place[:1] == ["blocks"] and int(place[1]) > last:
                raise ValueError(
                    f"the adapter sits in block {place[1]}, above the last that the head reads: "
                    f'set adapter.sites to ["vision.blocks.[0-{last}]"] or head.layers otherwise'
                )
