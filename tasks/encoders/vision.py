"""`ImageTower`: feature maps of any image encoder of timm, transformers or open_clip.

Images are (B, 3, H, W), normalised by `image_preprocessing`; a map is (B, D, h, w) with
h = H / patch and w = W / patch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mmadapters import AdapterModel
from mmadapters.sites.sitemap import Tower

from .block_states import AllStatesRead, BlockStates, StateChange
from .positions import CopyableLock, Grid, GridCache, open_clip_at, timm_at
from .preprocessing import image_preprocessing, normalised, to_tensor

__all__ = ["ImageStates", "ImageTower", "image_preprocessing", "normalised", "to_tensor"]


@dataclass(frozen=True)
class ImageStates:
    """The output of an image tower for a batch of images.

    Attributes:
        maps: (B, D, h, w) of each requested layer, without class, register and prompt tokens.
        cls: (B, D), the class token of the last requested layer; None if the encoder has none.
        pooled: (B, D), the class token if the encoder has one, else the mean of the patches. For
            encoders that norm the mean of the patches (BEiT, EVA), it is this normed mean.
    """

    maps: list[Tensor]
    cls: Tensor | None
    pooled: Tensor


class FrontEnd(Protocol):
    """Runs the image tower of a library on images of any size.

    Attributes:
        patch: side of a patch in pixels.
        size: (H, W) in pixels that it was built for, None if it takes any size.
        has_class_token: whether the tower has a class token.
    """

    patch: int
    size: Grid | None
    has_class_token: bool

    def run(self, pixels: Tensor, grid: Grid) -> None:
        """Runs the blocks on `pixels` (B, 3, H, W); its output is not used.

        Args:
            grid: (h, w) in patches.

        Raises:
            ValueError: the encoder takes images of its own size only.
        """


class ImageTower:
    """The image tower of an encoder with its active adapters.

    It has no parameters of its own, so a `TaskModel` can keep it as a plain attribute.

    Attributes:
        width: D.
        depth: number of blocks.
        patch: side of a patch in pixels.
        size: (H, W) in pixels that the encoder was built for, None if it takes any size.
        has_class_token: whether the encoder has a class token.

    Raises:
        ValueError: the encoder reads no images.
    """

    def __init__(self, encoder: AdapterModel) -> None:
        tower = encoder.sites.towers.get("vision")
        if tower is None:
            raise ValueError(
                f"{encoder.sites.architecture} reads no images: it has the towers "
                f"{', '.join(encoder.sites.towers)}"
            )
        self.encoder = encoder
        self._tower = tower
        self.width = tower.width
        self.depth = len(tower.blocks)
        self._front = _front_end(encoder.backbone, tower.path)
        self.patch = self._front.patch
        self.size = self._front.size
        self.has_class_token = self._front.has_class_token
        self._token_norm, self._pool_norm = _norms(encoder, tower)

    def __call__(
        self,
        pixels: Tensor,
        layers: Sequence[int] = (-1,),
        *,
        norm: bool = True,
        between: Mapping[int, Callable[[Tensor], Tensor]] | None = None,
    ) -> ImageStates:
        """Returns the states after some blocks; blocks above the last of these do not run.

        Args:
            pixels: (B, 3, H, W); H and W are multiples of the patch.
            layers: blocks counted from 0, or from the end by negative numbers.
            norm: whether the encoder's final norm is applied to every layer.
            between: changes of the patches (B, h·w, D) that enter a block, by its number from 0.
                They apply in this call and this thread only.

        Raises:
            ValueError: the encoder does not take this size, or has no such layer.
        """
        grid = self._grid(pixels)
        layers = self._layers(layers)
        changes = {layer: _on_patches(grid, change) for layer, change in (between or {}).items()}
        recorded = BlockStates(self._tower, layers, stop=True, changes=changes)
        with recorded, contextlib.suppress(AllStatesRead):
            self._front.run(pixels, grid)
        assert recorded.entered is not None
        length = recorded.entered.shape[1]
        num_prefix_tokens = _num_prefix_tokens(length, grid)
        # Prompts follow the tokens that entered the first block.
        states = [recorded.states[layer][:, :length] for layer in layers]
        if norm:
            states = [self.normed(tokens) for tokens in states]
        maps = [
            tokens[:, num_prefix_tokens:].transpose(1, 2).unflatten(2, grid) for tokens in states
        ]
        cls = states[-1][:, 0] if self.has_class_token else None
        pooled = cls
        if cls is None or self._pool_norm is not None:
            pooled = states[-1][:, num_prefix_tokens:].mean(dim=1)
        if norm and self._pool_norm is not None:
            pooled = self._pool_norm(pooled)
        assert pooled is not None
        return ImageStates(maps, cls, pooled)

    def _grid(self, pixels: Tensor) -> Grid:
        height, width = pixels.shape[-2:]
        if pixels.dim() != 4 or height % self.patch or width % self.patch or not height * width:
            raise ValueError(
                f"images of shape {tuple(pixels.shape)} do not fit: it must be (B, 3, H, W) with H "
                f"and W multiples of the patch, {self.patch}; pad them"
            )
        return height // self.patch, width // self.patch

    def _layers(self, layers: Sequence[int]) -> list[int]:
        if not layers or any(not -self.depth <= layer < self.depth for layer in layers):
            raise ValueError(
                f"layers {tuple(layers)} are not there: the encoder has {self.depth} blocks, from "
                f"0 to {self.depth - 1} or from -{self.depth} to -1"
            )
        return [layer % self.depth for layer in layers]

    def normed(self, tokens: Tensor) -> Tensor:
        """Applies the encoder's final norm to (B, N, D) if the encoder norms every token."""
        return tokens if self._token_norm is None else self._token_norm(tokens)


def _num_prefix_tokens(length: int, grid: Grid) -> int:
    """Returns the number of class and register tokens, which come before the patches."""
    if length < grid[0] * grid[1]:
        raise ValueError(
            f"{length} tokens came out of {grid[0]}×{grid[1]} patches: the encoder drops patches "
            "in training, which leaves holes in its maps; set its patch dropout to 0"
        )
    return length - grid[0] * grid[1]


def _on_patches(grid: Grid, change: Callable[[Tensor], Tensor]) -> StateChange:
    """Turns a change of patches into one of all tokens."""

    def on_tokens(tokens: Tensor, length: int) -> Tensor:
        start = _num_prefix_tokens(length, grid)
        changed = change(tokens[:, start:length])
        return torch.cat([tokens[:, :start], changed, tokens[:, length:]], dim=1)

    return on_tokens


def _norms(encoder: AdapterModel, tower: Tower) -> tuple[nn.Module | None, nn.Module | None]:
    """Returns the encoder's final norm, first for every token, second for pooled tokens only."""
    norm = None if tower.norm is None else tower.norm.module
    name = next((name for name, part in encoder.backbone.named_modules() if part is norm), "")
    if name.endswith(("fc_norm", "pooler.layernorm")):
        return None, norm
    if getattr(getattr(encoder.backbone, "visual", None), "attn_pool", None) is not None:
        # CoCa norms the output of its attentional pooler, which has another width.
        return None, None
    return norm, None


class _Timm:
    """A vision transformer of timm, alone or as the trunk of an open_clip tower."""

    def __init__(self, model: Any) -> None:
        embed = model.patch_embed
        self.model = model
        self.patch = _square(embed.feat_ratio(as_scalar=False), model)
        self.size = None if embed.img_size is None else (embed.img_size[0], embed.img_size[1])
        self.has_class_token = getattr(model, "cls_token", None) is not None
        self._cache, self._lock = GridCache(), CopyableLock()

    def run(self, pixels: Tensor, grid: Grid) -> None:
        # The lock prevents other threads from using positions of another size.
        if self.size is None or pixels.shape[-2:] == self.size:
            with self._lock:
                self.model.forward_features(pixels)
            return
        if _has_relative_bias(self.model):
            raise ValueError(
                f"this {type(self.model).__name__} has relative position biases, which timm makes "
                f"for one size: it takes {self.size[0]}×{self.size[1]} pixels, not "
                f"{pixels.shape[-2]}×{pixels.shape[-1]}; load it with options "
                f"{{img_size: [{pixels.shape[-2]}, {pixels.shape[-1]}]}}"
            )
        with self._lock, timm_at(self.model, grid, self._cache):
            self.model.forward_features(pixels)


def _has_relative_bias(model: Any) -> bool:
    names = ("rel_pos_bias", "shared_rel_pos")
    attn = model.blocks[0].attn
    return (
        any(getattr(model, name, None) is not None for name in names)
        or getattr(attn, "rel_pos", None) is not None
        or getattr(attn, "relative_position_bias_table", None) is not None
    )


class _OpenClip:
    """open_clip's own vision transformer."""

    has_class_token = True

    def __init__(self, visual: Any) -> None:
        self.visual = visual
        self.patch = _square(visual.patch_size, visual)
        self.size: Grid | None = (visual.image_size[0], visual.image_size[1])
        self._cache, self._lock = GridCache(), CopyableLock()
        if not getattr(visual.transformer, "batch_first", True):
            raise ValueError(
                "the blocks of this open_clip model take tokens before the batch; build it with "
                "open_clip's default batch_first=True"
            )

    def run(self, pixels: Tensor, grid: Grid) -> None:
        if pixels.shape[-2:] == self.size:
            with self._lock:
                self.visual(pixels)
            return
        with self._lock, open_clip_at(self.visual, grid, self._cache):
            self.visual(pixels)


class _Transformers:
    """A vision model of transformers, or the vision tower of one that reads text too."""

    # Models that always resize their position embeddings, or have none.
    ANY_SIZE = ("dinov2", "dinov2_with_registers", "dinov3_vit")

    def __init__(self, model: Any) -> None:
        self.model = model
        config = model.config
        self.patch = _square(_pair(config.patch_size), model)
        self.size: Grid | None = _pair(config.image_size)
        self.has_class_token = not config.model_type.startswith("siglip")
        self._any_size = config.model_type in self.ANY_SIZE

    def run(self, pixels: Tensor, grid: Grid) -> None:
        if self._any_size or pixels.shape[-2:] == self.size:
            self.model(pixel_values=pixels)
        else:
            self.model(pixel_values=pixels, interpolate_pos_encoding=True)


def _front_end(backbone: Any, path: str) -> FrontEnd:
    """Returns the front end of a backbone whose blocks are at `path`."""
    holder, _, last = path.rpartition(".")
    if last == "resblocks":
        return _OpenClip(backbone.visual)
    if last == "blocks":
        return _Timm(backbone.get_submodule(holder))
    inner = getattr(backbone, "vision_model", None)
    return _Transformers(backbone if inner is None else inner)


def _pair(size: Any) -> Grid:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _square(patch: Sequence[int], model: nn.Module) -> int:
    if patch[0] != patch[1]:
        raise ValueError(
            f"the patches of this {type(model).__name__} are {patch[0]}×{patch[1]} pixels; tasks "
            "need square ones"
        )
    return patch[0]
