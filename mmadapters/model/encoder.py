"""`AdaptedEncoder`: a frozen encoder that runs, with some of its adapters acting."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..adapters.adapter import Adapters
from ..composition import Composition, Setup, parse
from ..injectors import checkpointing
from ..injectors.cross_attention import attending_to
from ..injectors.installer import is_adapted
from ..injectors.state import ImageTokens
from ..sites.sitemap import SiteMap
from ..sites.spec import Architecture
from .refusal import RefusedMethod
from .store import AdapterStore

if TYPE_CHECKING:
    from typing import Self


# Attributes that belong to the wrapper, also if the encoder has one of the same name.
WRAPPER = ("backbone", "adapters", "fusions", "store", "train_trunk")
# Methods of the encoder that would treat it as if it had no adapters, and what to call instead.
INSTEAD = {
    "push_to_hub": "call save_pretrained and upload the folder: push_to_hub would upload the bare "
    "encoder",
    "set_adapter": "call set_active_adapters",
    "enable_adapters": "call set_active_adapters",
    "disable_adapters": "call set_active_adapters(None)",
    "get_adapter_state_dict": "call save_adapter, or adapter(NAME).tensors()",
}


class AdaptedEncoder(nn.Module):
    """A frozen encoder, how it runs, and which of its adapters act in a forward pass.

    `AdapterModel` adds the verbs that make, train, merge, save and load adapters.

    Attributes:
        backbone: the frozen encoder.
        adapters: a module whose children are the adapters, by name.
        fusions: a module whose children are the AdapterFusions, by name.
        store: the state that all verbs share; `store.runtime` installs the hooks.
        train_trunk: whether `train()` puts the encoder in train mode too.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        sites: Architecture | None = None,
        example_inputs: tuple | Mapping[str, Any] | None = None,
        train_trunk: bool = False,
    ) -> None:
        if not isinstance(backbone, nn.Module):
            raise ValueError(
                f"init takes a torch.nn.Module, not {backbone!r}; load_backbone makes one by name"
            )
        if isinstance(backbone, AdaptedEncoder):
            raise ValueError("the backbone is an AdapterModel already: add adapters to it")
        if is_adapted(backbone):
            raise ValueError("another AdapterModel acts on this backbone: detach it first")
        super().__init__()
        self.backbone = backbone
        self.adapters = Adapters()
        self.fusions = Adapters()
        self.train_trunk = train_trunk
        self.store = AdapterStore(
            self,
            backbone,
            adapters=self.adapters,
            fusions=self.fusions,
            sites=sites,
            example_inputs=example_inputs,
        )
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the encoder with its own arguments and result."""
        runtime = self.store.runtime
        # Hooks look the plan up too, but torch.compile does not guard hooks: this call it guards.
        runtime.plan()
        if runtime.attends_to_images:
            with attending_to(runtime.state, ImageTokens()):
                return self._run(*args, **kwargs)
        return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if (
            self.training
            and self.store.random_drop is not None
            and self.store.runtime.local.plan is None
        ):
            with self.randomly_dropped():
                return self.backbone(*args, **kwargs)
        return self.backbone(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "backbone" or name.startswith("__"):
                raise
            if name in INSTEAD:
                return RefusedMethod(f"{name} is not for an adapted encoder: {INSTEAD[name]}")
            return getattr(super().__getattr__("backbone"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute of the encoder if it has one of that name (a classifier, a config).

        A new module is trainable as it comes.

        Raises:
            ValueError: the value would replace a part of the encoder that adapters may act on.
        """
        backbone = self._encoder_with(name)
        if backbone is None:
            super().__setattr__(name, value)
            return
        self._check_replaceable(backbone, name)
        setattr(backbone, name, value)

    def __delattr__(self, name: str) -> None:
        backbone = self._encoder_with(name)
        if backbone is None:
            super().__delattr__(name)
            return
        self._check_replaceable(backbone, name)
        delattr(backbone, name)

    def _encoder_with(self, name: str) -> nn.Module | None:
        """Returns the encoder if an attribute belongs to it and not to this wrapper, else None."""
        parts = self.__dict__.get("_modules", {})
        backbone = parts.get("backbone")
        if backbone is None or name.startswith("__") or name in WRAPPER or name in self.__dict__:
            return None
        if hasattr(type(self), name) or not hasattr(backbone, name):
            return None
        return backbone

    def _check_replaceable(self, backbone: nn.Module, name: str) -> None:
        part = getattr(backbone, name, None)
        if not isinstance(part, nn.Module):
            return
        blocks = {id(block.module) for block in self.sites.blocks()}
        if not blocks.isdisjoint(map(id, part.modules())):
            raise ValueError(
                f"{name} holds blocks that adapters may act on: replace it in the encoder before "
                "init, or after detach()"
            )

    def _replicate_for_data_parallel(self) -> Self:
        """Refuses nn.DataParallel, whose copies would share the hooks of one encoder."""
        raise RuntimeError(
            "nn.DataParallel cannot run an AdapterModel: start the program with torchrun "
            "--nproc-per-node N (DistributedDataParallel), or show it one GPU by "
            "CUDA_VISIBLE_DEVICES"
        )

    def train(self, mode: bool = True) -> Self:
        """Puts the adapters in train mode, and the encoder too if `train_trunk` is set."""
        super().train(mode)
        if not self.train_trunk:
            self.backbone.train(False)
        return self

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Lets backward compute each block again instead of keeping its inner states.

        This saves memory. It works alike for all libraries, in eval mode too, in which the frozen
        trunk is.

        Args:
            gradient_checkpointing_kwargs: as transformers' Trainer passes it.

        Raises:
            ValueError: `use_reentrant=True` is asked for.
        """
        if (gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError(
                "re-entrant checkpointing gives adapters on a frozen encoder no gradient; leave "
                "use_reentrant out or set it to False"
            )
        checkpointing.enable(self.store.runtime)

    def gradient_checkpointing_disable(self) -> None:
        """Lets backward use the kept inner states of the blocks again."""
        checkpointing.disable(self.store.runtime)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turns gradient checkpointing on or off, under the name of timm and open_clip."""
        if enable:
            self.gradient_checkpointing_enable()
        else:
            self.gradient_checkpointing_disable()

    @property
    def sites(self) -> SiteMap:
        """The `SiteMap` of the encoder."""
        return self.store.sites

    @property
    def active_adapters(self) -> Composition | None:
        """The composition that acts now in this thread, or None.

        It is the one of the innermost `using` block, else that of `set_active_adapters`.
        """
        above = self.store.runtime.local.plan
        if above is None:
            return self.store.composition
        return above.stands_for

    def set_active_adapters(self, setup: Setup, *, drop: int = 0) -> None:
        """Lets adapters act: a name, several names (a `Stack`), a composition, or None for none.

        Args:
            drop: leave out the adapters of the lowest `drop` blocks of each tower (AdapterDrop,
                Rücklé et al. 2021).

        Raises:
            ValueError: an adapter is not here or is merged, or its method cannot take part in the
                composition.
        """
        self.store.activate(parse(setup), drop)

    @contextlib.contextmanager
    def using(self, setup: Setup, *, drop: int = 0) -> Iterator[Self]:
        """Lets `setup` act inside the block, in this thread alone.

        Other threads that run the same model are not affected. After the block the adapters act
        that acted before.
        """
        with self.store.runtime.pinned(self.store.plan(parse(setup), drop)):
            yield self

    @contextlib.contextmanager
    def randomly_dropped(self) -> Iterator[int]:
        """Draws a number of blocks from the `drop` range of `train_adapter` and drops so many.

        It acts inside the block, in this thread alone, and yields the number. `model(x)` does this
        by itself in train mode; other methods (`model.encode_image`) need it around them. Without a
        range nothing changes.
        """
        if self.store.random_drop is None:
            yield self.store.drop
            return
        least, most = self.store.random_drop
        drop = int(torch.randint(least, most + 1, ()))
        with self.using(self.store.composition, drop=drop):
            yield drop

    @property
    def looks_at_images(self) -> bool:
        """Whether an adapter that acts now in this thread lets texts attend to images."""
        plan = self.store.runtime.plan()
        return any("image" in act.reads for acts in plan.branch.values() for act in acts)

    @contextlib.contextmanager
    def looking_at(self, image_tokens: Tensor | None) -> Iterator[Self]:
        """Lets texts attend to these images inside the block, in this thread alone.

        Gated cross-attention needs this where the towers run one after another (`encode_text`,
        `get_text_features`).

        Args:
            image_tokens: (B, N, D), the output of the image tower's last block (see `paired`), one
                image for each text. None lets the texts stand alone, without these adapters.

        Raises:
            ValueError: the tokens have another shape.
        """
        width = next((t.width for t in self.sites.towers.values() if t.name == "vision"), None)
        if image_tokens is not None and (
            not isinstance(image_tokens, Tensor)
            or image_tokens.dim() != 3
            or image_tokens.shape[-1] != width
        ):
            given = tuple(image_tokens.shape) if isinstance(image_tokens, Tensor) else image_tokens
            raise ValueError(
                f"looking_at takes image tokens of shape (images, tokens, {width}), what the image "
                f"tower's last block gives, or None, not {given!r}"
            )
        with attending_to(self.store.runtime.state, ImageTokens(image_tokens, given=True)):
            yield self

    @contextlib.contextmanager
    def paired(self) -> Iterator[ImageTokens]:
        """Lets texts attend to the images that were encoded last inside the block.

        They do so in this thread alone, as in one call of the model. Yields an object whose
        `tokens` (B, N, D) are the image tokens, None until an image is encoded.
        """
        with attending_to(self.store.runtime.state, ImageTokens()) as images:
            yield images

    def detach(self) -> nn.Module:
        """Returns the encoder without any trace of adapters. This model is of no more use then.

        Merged adapters stay merged: reset them first to get the encoder's original bits back.
        """
        self.store.detach()
        return self.backbone
