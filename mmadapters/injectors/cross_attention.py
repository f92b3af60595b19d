"""Cross-attention from texts to images: it reads the image tokens that the vision tower gave."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..sites.acting import CHECKPOINTING, Context, runs_again
from .calls import first_input, first_output, with_first_input
from .state import Hook, ImageTokens, State


@contextlib.contextmanager
def attending_to(state: State, images: ImageTokens) -> Iterator[ImageTokens]:
    """Inside the block, in this thread, texts attend to `images`.

    If the block stands inside another one whose images the user has given, and `images` are not
    given by the user, then texts still attend to those of the outer block.
    """
    local = state.local
    above = local.image_tokens
    local.image_tokens = above if above is not None and above.given and not images.given else images
    try:
        yield local.image_tokens
    finally:
        local.image_tokens = above


@dataclass(eq=False)
class ImageHook(Hook):
    """Keeps the output of the image tower's last block until the call ends."""

    batch_first: bool

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        images = self.state.local.image_tokens
        if images is not None and not images.given:
            tokens = first_output(output)
            images.tokens = tokens if self.batch_first else tokens.transpose(0, 1)


@dataclass(eq=False)
class BlockHook(Hook):
    """Lets the active `Branch` modules act on the input of a block.

    Raises, when it runs:
        ValueError: a module attends to an image, and there is no image or not one for each text.
    """

    before = with_kwargs = True

    site: str
    batch_first: bool

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        active = self.state.plan().branch.get(self.site)
        if not active:
            return None
        x = first_input(args, kwargs)
        x = x if self.batch_first else x.transpose(0, 1)
        image = self._image(len(x))
        if image is None:
            return None
        context = Context(image=image)
        for adapter in active:
            x = adapter(x, context)
        x = x if self.batch_first else x.transpose(0, 1)
        return with_first_input(args, kwargs, x)

    def _image(self, batch: int) -> Tensor | None:
        """Returns the image tokens (B, N, D) of `batch` texts, or None if they have no images."""
        images = self.state.local.image_tokens
        if images is not None and images.given and images.tokens is None:
            return None
        if images is None and runs_again():
            raise ValueError(
                f"the adapter at {self.site} does not know the images in the backward pass: "
                f"{CHECKPOINTING}"
            )
        if images is None or images.tokens is None:
            raise ValueError(
                f"the adapter at {self.site} attends to an image, and none has been encoded in "
                "this call: call the model with images and texts, or the text encoder inside `with "
                "model.looking_at(image_tokens):` (looking_at(None) for texts without an image)"
            )
        if len(images.tokens) != batch:
            raise ValueError(
                f"{batch} texts reached {self.site} with {len(images.tokens)} images: each text "
                "attends to its own image, so give them in pairs"
            )
        return images.tokens
