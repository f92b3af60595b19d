"""`AdaptedEncoder`: a frozen encoder that runs, with some of its adapters acting."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

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
from .signature import showing
from .store import AdapterStore
from .training_state import TrainingState

if TYPE_CHECKING:
    from typing import Self


# Attributes that belong to the wrapper, also if the encoder has one of the same name.
WRAPPER = ("backbone", "adapters", "fusions", "store", "train_trunk", "training_state", "assigned")
# Methods of the encoder that would treat it as if it had no adapters, and what to call instead.
INSTEAD = {
    "push_to_hub": "call save_pretrained and upload the folder: push_to_hub would upload the bare "
    "encoder",
    "set_adapter": "call set_active_adapters",
    "enable_adapters": "call set_active_adapters",
    "disable_adapters": "call set_active_adapters(None)",
    "get_adapter_state_dict": "call save_adapter, or adapter(NAME).tensors()",
    "enable_peft_hotswap": "load both adapters and call set_active_adapters, which costs nothing",
    "prune_heads": "prune the encoder before init, as adapters would be of another shape",
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
        training_state: leaves the frozen encoder out of `state_dict` in training.
        assigned: names of the encoder's parts that were assigned through this model.
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
        self.training_state = TrainingState(self)
        self.assigned: set[str] = set()
        if type(self).forward is AdaptedEncoder.forward:
            shown: type = showing(cast(Any, type(self)), cast(Any, type(backbone)))
            self.__class__ = shown
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
            value = getattr(super().__getattr__("backbone"), name)
            if name in INSTEAD:
                return RefusedMethod(f"{name} is not for an adapted encoder: {INSTEAD[name]}")
            return value

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
        self.assigned.discard(name)
        if isinstance(value, nn.Module):
            value.train(self.training)
            self.assigned.add(name)
        self.training_state.forget_replaced()

    def __delattr__(self, name: str) -> None:
        backbone = self._encoder_with(name)
        if backbone is None:
            super().__delattr__(name)
            return
        self._check_replaceable(backbone, name)
        delattr(backbone, name)
        self.assigned.discard(name)
        self.training_state.forget_replaced()

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
        """Puts all but the encoder in train mode; the encoder too if `train_trunk` is set.

        Modules that were assigned through this model are no part of the frozen encoder.
        """
        super().train(mode)
        self.training_state.note_trained()
        if not self.train_trunk:
            self.backbone.train(False)
            for name in self.assigned:
                part = getattr(self.backbone, name, None)
                if isinstance(part, nn.Module):  # else it was taken out of the encoder itself
                    part.train(mode)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Returns all tensors, or in training those that it may change; see `training_state`.

        A model is in training if parameters of it are trainable. `load_state_dict` takes both kinds
        and checks that the frozen encoder, which the second one lacks, is the same.
        """
        state = super().state_dict(*args, **kwargs)
        trained = any(parameter.requires_grad for parameter in self.parameters())
        if trained and not self.store.detached:
            prefix = args[1] if len(args) > 1 else kwargs.get("prefix", "")
            self.training_state.shorten(
                state,
                prefix,
                buffers=self.train_trunk,
                # A merged adapter is in the weights of the encoder, which are others then.
                encoder=bool(self.store.merged),
            )
        return state

    def trained_of_encoder(self) -> dict[str, Tensor]:
        """Returns the tensors of the encoder that are trainable, new or were loaded, by name.

        With `train_trunk` all its buffers are among them, as they may have changed.
        """
        return self.training_state.of_encoder(buffers=self.train_trunk)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        self.training_state.complete(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Turns gradient checkpointing on, under the name of transformers since version 5.

        Raises:
            ValueError: see `gradient_checkpointing_enable`.
        """
        self.gradient_checkpointing_enable(
            activation_checkpointing_kwargs, every_n_layers=every_n_layers, offload=offload
        )

    def activation_checkpointing_disable(self) -> None:
        """Turns gradient checkpointing off, under the name of transformers since version 5."""
        self.gradient_checkpointing_disable()

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Lets backward compute each block again instead of keeping its inner states.

        This saves memory. It works alike for all libraries, in eval mode too, in which the frozen
        trunk is.

        Args:
            gradient_checkpointing_kwargs: as transformers' Trainer passes it.
            every_n_layers: 1; transformers passes it.
            offload: False; transformers passes it.

        Raises:
            ValueError: `use_reentrant=True` is asked for, or some blocks alone are to be computed
                again, or their states are to lie in the memory of the host.
        """
        if every_n_layers != 1 or offload:
            raise ValueError(
                "all blocks of an adapted encoder are checkpointed, on their device: leave "
                "every_n_layers and offload out"
            )
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
        self.training_state.clear()
        return self.backbone
