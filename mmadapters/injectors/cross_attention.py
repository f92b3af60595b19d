"""What the text of a call looks at: the image tokens that its vision tower gave."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..sites.acting import Context
from .calls import first_input, first_output, with_first_input

if TYPE_CHECKING:
    from .installer import Runtime


@dataclass(eq=False)
class Gaze:
    """`tokens`: (B, N, D) of the images, None while there are none. `given`: by hand, so that no
    image tower changes them, and None means that the text stands alone."""

    tokens: Tensor | None = None
    given: bool = False


@contextlib.contextmanager
def gazing(runtime: Runtime, gaze: Gaze) -> Iterator[Gaze]:
    """Inside the block, in this thread, texts look at `gaze`; one that is given by hand around it
    stays."""
    local = runtime.local
    above = local.gaze
    local.gaze = above if above is not None and above.given and not gaze.given else gaze
    try:
        yield local.gaze
    finally:
        local.gaze = above


@dataclass(eq=False)
class ImageHook:
    """Keeps what the last block of the image tower gave until the call ends."""

    runtime: Runtime
    batch_first: bool

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        gaze = self.runtime.local.gaze
        if gaze is not None and not gaze.given:
            tokens = first_output(output)
            gaze.tokens = tokens if self.batch_first else tokens.transpose(0, 1)


@dataclass(eq=False)
class BlockHook:
    """Lets the active `Branch` modules act on what enters a block.

    Raises, when it runs:
        ValueError: one reads an image and there is none, or not one for each text.
    """

    runtime: Runtime
    site: str
    batch_first: bool

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        active = self.runtime.plan().branch.get(self.site)
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
        gaze = self.runtime.local.gaze
        if gaze is not None and gaze.given and gaze.tokens is None:
            return None
        if gaze is None or gaze.tokens is None:
            raise ValueError(
                f"the adapter at {self.site} looks at an image, and none has been encoded in this "
                "call: call the model with images and texts, or the text encoder inside `with "
                "model.looking_at(image_tokens):` (looking_at(None) for texts without an image)"
            )
        if len(gaze.tokens) != batch:
            raise ValueError(
                f"{batch} texts reached {self.site} with {len(gaze.tokens)} images: each text "
                "looks at its own, so give them in pairs"
            )
        return gaze.tokens
