"""`AdapterModel`: a frozen encoder, its adapters, and which of them act."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import methods
from ..adapters import storage
from ..adapters.adapter import Adapter
from ..adapters.arithmetic import combined
from ..adapters.merging import Changes, Merged, merged_tensors, while_merged, widened_leaves
from ..adapters.summary import AdapterRow, summary_table
from ..composition import BASE, Composition, Fuse, Setup, Stack, parse
from ..injectors import checkpointing
from ..injectors.cross_attention import attending_to
from ..injectors.installer import Runtime, is_adapted
from ..injectors.plan import NOTHING, Plan
from ..injectors.selfcheck import agrees, check
from ..injectors.state import ImageTokens
from ..methods import AdapterModule, FusionConfig, MethodConfig
from ..methods.init import skip_init
from ..plans.build import plan_of
from ..plans.cache import Plans
from ..sites.sitemap import SiteMap
from ..sites.spec import Architecture
from ..sites.tables import describe
from ..suggest import nearest
from . import bundles
from . import fusion as fusions
from . import sharing as groups
from .sharing import Sharing

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_+@ -]*")


def init(
    backbone: nn.Module,
    *,
    sites: Architecture | None = None,
    example_inputs: tuple | Mapping[str, Any] | None = None,
    train_trunk: bool = False,
) -> AdapterModel:
    """Freezes `backbone`, puts it in eval mode and wraps it; its outputs are what they were.

    Args:
        sites: where the blocks are, for an encoder that mmadapters does not know.
        example_inputs: a small input (args as a tuple, or keywords as a dict) for the self-check;
            known encoders make their own.
        train_trunk: let `model.train()` put the encoder in train mode too (its dropout, LayerDrop,
            SpecAugment). By default the frozen trunk stays in eval mode.

    Raises:
        ValueError: the encoder is unknown and no `sites` are given, or they do not fit.
    """
    return AdapterModel(
        backbone, sites=sites, example_inputs=example_inputs, train_trunk=train_trunk
    )


class AdapterModel(nn.Module):
    """A frozen encoder that adapters act on. Calls, attributes and methods go to the encoder.

    Adapters live here, not inside the encoder: its `state_dict` keeps its keys and values.
    `model(x)` has the encoder's own signature and return type; other methods (`model.generate`,
    `model.encode_image`, `model.forward_features`) are the encoder's, with adapters acting.

    A note on bits: with gradients enabled `nn.MultiheadAttention` takes another path for trainable
    weights than for frozen ones, whose results differ in the last bits. A fresh adapter is
    bit-equal to the encoder under `torch.no_grad()` and before `train_adapter` makes it trainable.
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
        if isinstance(backbone, AdapterModel):
            raise ValueError("the backbone is an AdapterModel already: add adapters to it")
        if is_adapted(backbone):
            raise ValueError("another AdapterModel acts on this backbone: detach it first")
        site_map, _ = describe(backbone, sites)
        super().__init__()
        self.backbone = backbone
        self.adapters = nn.Module()
        self.fusions = nn.Module()
        self.train_trunk = train_trunk
        self._runtime = Runtime(site_map)
        self._architecture = sites
        self._example_inputs = example_inputs
        self._composition: Composition | None = None
        self._drop = 0
        self._random_drop: tuple[int, int] | None = None
        self._plans = Plans()
        self._verified: set[tuple] = set()
        self._merged: list[Merged] = []
        self._identity: dict[str, Any] | None = None
        self._detached = False
        self._required_grad = {n: p.requires_grad for n, p in backbone.named_parameters()}
        backbone.requires_grad_(False)
        # transformers' speech encoders ask for gradients of their front end in train mode.
        self._front_ends = [m for m in backbone.modules() if m.__dict__.get("_requires_grad")]
        for module in self._front_ends:
            module.__dict__["_requires_grad"] = False
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # Looked up here too, where perhaps no hook does: torch.compile then guards which there are.
        self._runtime.plan()
        if self._runtime.attends_to_images:
            with attending_to(self._runtime.state, ImageTokens()):
                return self._run(*args, **kwargs)
        return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if self.training and self._random_drop is not None and self._runtime.local.plan is None:
            with self.randomly_dropped():
                return self.backbone(*args, **kwargs)
        return self.backbone(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "backbone" or name.startswith("__"):
                raise
            return getattr(super().__getattr__("backbone"), name)

    def train(self, mode: bool = True) -> AdapterModel:
        """Adapters to train mode; the encoder only where `train_trunk` was asked for."""
        super().train(mode)
        if not self.train_trunk:
            self.backbone.train(False)
        return self

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Backward computes each block anew instead of keeping its inner states: less memory.

        For every library alike, in eval mode too, in which the frozen trunk is. The argument is for
        transformers' Trainer.

        Raises:
            ValueError: `use_reentrant=True` is asked for.
        """
        if (gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError(
                "re-entrant checkpointing gives adapters on a frozen encoder no gradient; leave "
                "use_reentrant out or set it to False"
            )
        checkpointing.enable(self._runtime)

    def gradient_checkpointing_disable(self) -> None:
        """Backward keeps the blocks' inner states again."""
        checkpointing.disable(self._runtime)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """The two above under the name that timm and open_clip have for them."""
        if enable:
            self.gradient_checkpointing_enable()
        else:
            self.gradient_checkpointing_disable()

    @property
    def sites(self) -> SiteMap:
        """The `SiteMap` of the encoder."""
        return self._runtime.sites

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """The adapters held, in the order in which they were added."""
        return tuple(self.adapters._modules)

    @property
    def active_adapters(self) -> Composition | None:
        """What acts now, in this thread's `using` or by `set_active_adapters`; None for nothing."""
        above = self._runtime.local.plan
        if above is None:
            return self._composition
        return above.stands_for

    def adapter(self, name: str) -> Adapter:
        """The modules of one adapter.

        Raises:
            ValueError: there is none of that name; names the nearest.
        """
        found = self.adapters._modules.get(name)
        if found is None:
            there = ", ".join(map(repr, self.adapter_names)) or "none yet"
            hint = nearest(name, self.adapter_names)
            raise ValueError(f"no adapter is called {name!r}{hint}; there are {there}")
        assert isinstance(found, Adapter)
        return found

    def add_adapter(self, name: str, config: MethodConfig | str) -> None:
        """Inserts a fresh adapter, neither active nor trainable, and checks that it can act.

        Args:
            name: letters, digits, `_`, `-`, `+`, `@` and spaces.
            config: a config of `mmadapters.methods`, or a method's name for its defaults.

        Raises:
            ValueError: a bad name or config, or the encoder has no place for the method.
            InertAdapterError: a site at which the adapter would change nothing.
        """
        if isinstance(config, str):
            config = methods.method_named(config)()
        self._insert(name, self._build(name, config))

    def add_adapters(
        self,
        names: Iterable[str] | Mapping[str, MethodConfig | str],
        config: MethodConfig | str | None = None,
        *,
        sharing: Sharing | None = None,
        share_with: str | None = None,
    ) -> None:
        """Inserts fresh adapters, one for each task, that share parameters (VL-Adapter, Sung et al.
        2022); see `mmadapters.model.sharing`.

        Each is an adapter like any other: it acts, is trained and is saved alone, with all its
        tensors. Training one moves what the others share with it.

        Args:
            names: of the adapters, all with `config`, or a mapping to configs of their own.
            sharing: "single" (one adapter under several names), "multiple" (nothing is shared, the
                default), "half_down" or "half_up" (the down- or the up-projections).
            share_with: an adapter that is here, whose group they join. It gives the config, and
                what is shared, where these are left out. What was trained already is shared as it
                is, so that with "single" and "half_up" they do not start as the identity.

        Raises:
            ValueError: as `add_adapter`; or the methods have no such halves, or differ in what is
                to be shared. Nothing is added then.
        """
        groups.add(self, names, config, sharing=sharing, share_with=share_with)

    def share_adapters(self, names: Iterable[str], sharing: Sharing) -> None:
        """Lets adapters that are here share what has the same bits in all of them.

        So a group is shared again after each of its files was loaded with `load_adapter`. Call it
        before an optimiser is made: the parameters of all but the first are replaced.

        Raises:
            ValueError: what is to be shared differs, or an adapter shares with others already.
        """
        groups.share(self, names, sharing)

    def _build(self, name: str, config: MethodConfig) -> Adapter:
        if self._detached:
            raise ValueError("this model was detached from its encoder; call mmadapters.init anew")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(
                f"{name!r} cannot name an adapter: use letters, digits, '_', '-', '+', '@' and "
                "spaces, no path separators or dots"
            )
        if name == BASE:
            raise ValueError(
                f"{BASE!r} means the encoder without adapters: choose another name for this one"
            )
        if name in self.adapter_names:
            raise ValueError(
                f"an adapter called {name!r} is here already; delete it or choose another name"
            )
        if not isinstance(config, MethodConfig):
            raise ValueError(f"config must be a method's config or name, not {config!r}")
        parts: dict[str, AdapterModule] = {}
        for key, part in config.parts():
            for site, module in part.build(self.sites).items():
                parts[f"{site}#{key}"] = module
        adapter = Adapter(config, parts)
        adapter.requires_grad_(False)
        return adapter

    def _filled(
        self,
        name: str,
        config: MethodConfig,
        tensors: Mapping[str, Tensor],
        source: str | os.PathLike,
    ) -> Adapter:
        """An adapter that holds `tensors`; see `Adapter.load`."""
        with skip_init():
            adapter = self._build(name, config)
        adapter.load(tensors, source)
        return adapter

    def _insert(self, name: str, adapter: Adapter) -> None:
        for folded in self._merged:
            wide = {leaf.name for leaf in folded.widened}
            for site in adapter.plan().delta.keys() & wide:
                raise ValueError(
                    f"adapter {name!r} cannot be added: {site} has channels of adapter "
                    f"{folded.name!r}, which is merged; call reset_adapter({folded.name!r}) first"
                )
        adapter.train(self.training)
        self.adapters._modules[name] = adapter
        try:
            self._sync()
            self._check(adapter)
        except BaseException:
            del self.adapters._modules[name]
            self._sync()
            raise

    def _sync(self) -> None:
        held = [self.adapter(name).plan() for name in self.adapter_names]
        held += [fusion.plan() for fusion in self.fusions._modules.values()]  # type: ignore[union-attr, operator]
        self._runtime.sync(held)
        if self._composition is not None:
            self._runtime.active = self._plan(self._composition, self._drop)

    def _check(self, adapter: Adapter) -> None:
        """Checks the points that no earlier adapter of this model has been checked at."""
        plan = Plan()
        points = set()
        for kind, site, module in adapter.plan().entries():
            point = (kind, site, type(module), getattr(module, "reads", None))
            if point not in self._verified:
                points.add(point)
                plan.add(kind, site, module)
        if points:
            # The check must not move the random state, or it would change what is drawn next.
            with torch.random.fork_rng(devices=[]):
                example = self._example_input()
            check(self, self._runtime, plan, example)
            self._verified |= points

    def _example_input(self) -> tuple[tuple, dict]:
        given = self._example_inputs
        if isinstance(given, Mapping):
            return (), dict(given)
        if given is not None:
            return tuple(given), {}
        # Asked for anew, as a table's function need not be picklable, as this model is.
        _, example = describe(self.backbone, self._architecture)
        if example is None:
            raise ValueError(
                "the self-check needs an input: pass example_inputs=(tensor, ...) to init"
            )
        return example(self.backbone)

    def _plan(self, composition: Composition | None, drop: int = 0) -> Plan:
        if composition is None:
            return NOTHING
        return self._plans.get((composition, drop), lambda: self._make_plan(composition, drop))

    def _make_plan(self, composition: Composition, drop: int) -> Plan:
        self._check_drop(drop)
        merged = [merge.name for merge in self._merged]
        for name in composition.names():
            self.adapter(name)
            if name in merged:
                raise ValueError(
                    f"adapter {name!r} is merged into the weights and would act twice; call "
                    f"reset_adapter({name!r}) first"
                )
        plan = plan_of(composition, self.sites, self.adapter, self._fusion, drop=drop)
        if plan.copies > 1:
            self._runtime.allow_copies()
        return plan

    def _check_drop(self, drop: int) -> None:
        deepest = max(len(tower.blocks) for tower in self.sites.towers.values())
        if isinstance(drop, bool) or not isinstance(drop, int) or not 0 <= drop <= deepest:
            raise ValueError(f"drop must be a number of blocks from 0 to {deepest}, not {drop!r}")

    def _forget(self, name: str) -> list[Plan]:
        """Drops the plans in which an adapter acts, and returns them."""
        return self._plans.forget(lambda composition: name in composition.names())

    def set_active_adapters(self, setup: Setup, *, drop: int = 0) -> None:
        """Lets adapters act: a name, several names (a `Stack`), a composition, or None for none.

        Args:
            drop: leave out the adapters of the lowest `drop` blocks of each tower (AdapterDrop,
                Rücklé et al. 2021).

        Raises:
            ValueError: a name that is not here, or that is merged; or a method that cannot take
                part in the composition.
        """
        composition = parse(setup)
        self._runtime.active = self._plan(composition, drop)
        self._composition, self._drop, self._random_drop = composition, drop, None

    @contextlib.contextmanager
    def using(self, setup: Setup, *, drop: int = 0) -> Iterator[AdapterModel]:
        """Inside the block, in this thread alone, `setup` acts; then what acted before does again.

        Other threads that run the same model are not affected.
        """
        with self._runtime.pinned(self._plan(parse(setup), drop)):
            yield self

    @property
    def looks_at_images(self) -> bool:
        """Whether what acts now, in this thread, lets texts look at images (gated
        cross-attention)."""
        plan = self._runtime.plan()
        return any("image" in act.reads for acts in plan.branch.values() for act in acts)

    @contextlib.contextmanager
    def looking_at(self, image_tokens: Tensor | None) -> Iterator[AdapterModel]:
        """Inside the block, in this thread alone, texts look at these images: gated cross-attention
        where the towers are run one after another (`encode_text`, `get_text_features`).

        Args:
            image_tokens: (B, N, D), what the image tower's last block gave (see `paired`), of one
                image for each text; None lets texts stand alone, without these adapters.

        Raises:
            ValueError: another shape.
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
        with attending_to(self._runtime.state, ImageTokens(image_tokens, given=True)):
            yield self

    @contextlib.contextmanager
    def paired(self) -> Iterator[ImageTokens]:
        """Inside the block, in this thread alone, texts look at the images that were encoded last
        in it, as they do in one call of the model. Gives what holds their `tokens` (B, N, D), once
        there are some."""
        with attending_to(self._runtime.state, ImageTokens()) as images:
            yield images

    def train_adapter(self, setup: Setup, *, drop: int | tuple[int, int] = 0) -> None:
        """Makes adapters active and trainable, all others frozen, and enters train mode.

        What they share with others is trained too, and so moves the others.

        Args:
            drop: train without the adapters of so many of the lowest blocks, or, given as
                (least, most), of a number that every forward pass in train mode draws anew: such an
                adapter works with any number dropped (robust AdapterDrop, Rücklé et al. 2021).
        """
        composition = parse(setup)
        self._activate(composition, drop)
        self.adapters.requires_grad_(False)
        for name in composition.names() if composition is not None else ():
            self.adapter(name).requires_grad_(True)
        self.fusions.requires_grad_(False)
        self.train()

    def _activate(self, composition: Composition | None, drop: int | tuple[int, int]) -> None:
        if not isinstance(drop, (tuple, list)):
            self.set_active_adapters(composition, drop=drop)
            return
        for end in drop:
            self._check_drop(end)
        if len(drop) != 2 or not drop[0] <= drop[1]:
            raise ValueError(f"drop is a number or a pair (least, most), not {drop!r}")
        self.set_active_adapters(composition)
        self._random_drop = (drop[0], drop[1])

    @contextlib.contextmanager
    def randomly_dropped(self) -> Iterator[int]:
        """Inside the block, in this thread, one draw of `train_adapter`'s range of drops acts.

        `model(x)` does so by itself in train mode; other entries (`model.encode_image`) need it
        around them. Gives the number of blocks; does nothing where no range was asked for.
        """
        if self._random_drop is None:
            yield self._drop
            return
        least, most = self._random_drop
        drop = int(torch.randint(least, most + 1, ()))
        with self.using(self._composition, drop=drop):
            yield drop

    def _fusion(self, members: Fuse) -> Adapter:
        found = self.fusions._modules.get(members.name)
        if found is None:
            there = ", ".join(map(repr, self.fusion_names)) or "none yet"
            raise ValueError(
                f"there is no AdapterFusion of {members.name!r}: call "
                f"add_adapter_fusion({members!r}) first; there are {there}"
            )
        assert isinstance(found, Adapter)
        return found

    @property
    def fusion_names(self) -> tuple[str, ...]:
        """The AdapterFusions held, by their members: `a,b` or `a,b>c`."""
        return tuple(self.fusions._modules)

    def add_adapter_fusion(
        self, members: Fuse | Iterable[str], config: FusionConfig | None = None
    ) -> str:
        """Adds the attention over several adapters at every site where one of them acts.

        Neither active nor trainable yet; returns its name. Fresh, it averages what they add, as
        its queries and keys start near zero.

        Raises:
            ValueError: a name that is not here, or no bottleneck; or the fusion is here already.
        """
        fused = members if isinstance(members, Fuse) else Fuse(*members)
        if fused.name in self.fusion_names:
            raise ValueError(f"there is an AdapterFusion of {fused.name!r} already")
        self._insert_fusion(fused, fusions.build(self, fused, config or FusionConfig()))
        return fused.name

    def _insert_fusion(self, members: Fuse, fusion: Adapter) -> None:
        fusion.requires_grad_(False)
        fusion.train(self.training)
        self.fusions._modules[members.name] = fusion
        try:
            self._sync()
            # Asked for once, so that what cannot be fused raises now.
            plan_of(members, self.sites, self.adapter, self._fusion)
        except BaseException:
            del self.fusions._modules[members.name]
            self._sync()
            raise

    def train_adapter_fusion(
        self, members: Fuse | Iterable[str], *, drop: int | tuple[int, int] = 0
    ) -> None:
        """Makes a fusion active and it alone trainable: its members stay as they are.

        Add `fusion_penalty()` to the loss.
        """
        fused = members if isinstance(members, Fuse) else Fuse(*members)
        fusion = self._fusion(fused)
        self._activate(fused, drop)
        self.adapters.requires_grad_(False)
        self.fusions.requires_grad_(False)
        fusion.requires_grad_(True)
        self.train()

    def fusion_penalty(self) -> torch.Tensor:
        """How far the value matrices of trainable fusions are from the identity, a scalar.

        0.01 x ||V - I||^2 summed over sites, by each config's `regularization`.
        """
        return fusions.penalty(self)

    def recorded_fusion(
        self,
    ) -> contextlib.AbstractContextManager[Mapping[str, Mapping[str, torch.Tensor]]]:
        """Inside the block, in this thread, the attention of fusions is noted.

        Gives a mapping by fusion and site of the weights (members,), the mean over all tokens seen.
        """
        return fusions.recorded(self)

    def delete_adapter_fusion(self, name: str | Fuse) -> None:
        """Removes a fusion, not its members; nothing acts if it was acting.

        Raises:
            ValueError: there is none of that name.
        """
        name = name.name if isinstance(name, Fuse) else name
        fusions.of(self, name)
        del self.fusions._modules[name]
        if self._composition is not None and name in fusions.names_in(self._composition):
            self.set_active_adapters(None)
        for plan in self._plans.forget(lambda known: name in fusions.names_in(known)):
            plan.clear()
        self._sync()

    def save_adapter_fusion(self, directory: str | os.PathLike, name: str | Fuse) -> None:
        """Writes a fusion with references to its members: their names and hashes.

        Raises:
            ValueError: there is none of that name, or the directory holds something else.
        """
        fusions.save(self, directory, name.name if isinstance(name, Fuse) else name)

    def load_adapter_fusion(self, directory: str | os.PathLike) -> str:
        """Adds the fusion of a directory, not yet active, and returns its name.

        Its members must be here, under the names and with the values that they had.

        Raises:
            FileNotFoundError, ValueError: see `storage.read`; a member is missing or another; or
                the fusion is for another encoder.
        """
        return fusions.load(self, directory)

    def save_composition(
        self,
        directory: str | os.PathLike,
        setup: Setup,
        *,
        head: nn.Module | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes a composition with all its adapters and fusions, a task's head and metadata.

        Raises:
            ValueError: a name that is not here, or the directory holds something else.
        """
        bundles.save(self, directory, setup, head=head, metadata=metadata)

    def load_composition(
        self, directory: str | os.PathLike, *, allow_different_weights: bool = False
    ) -> tuple[Composition, storage.Stored]:
        """Adds the adapters and fusions of a directory, under the names that they have there.

        Returns the composition, not yet active, and what the directory holds.

        Raises:
            FileNotFoundError, ValueError: see `load_adapter`; a name is taken already.
        """
        return bundles.load(self, directory, allow_different_weights=allow_different_weights)

    def average_adapter(
        self,
        name: str,
        members: Iterable[str],
        weights: Iterable[float] | None = None,
        *,
        how: Literal["linear", "concat", "svd"] = "linear",
        rank: int | None = None,
    ) -> None:
        """Adds an adapter whose parameters are sum_i w_i of the members', idle like a fresh one.

        Args:
            weights: equal shares by default; they need not add up to 1, so that task vectors can
                be added and subtracted (Ilharco et al. 2023): `(1, 1, -1)`.
            how: "linear" adds parameters of equal structure; "concat" and "svd" add what LoRAs of
                any ranks amount to, exactly with the sum of the ranks, or as well as `rank` can.

        Raises:
            ValueError: adapters that differ in structure, with the first difference.
        """
        names = list(members)
        if isinstance(members, str) or not names:
            raise ValueError(f"members is a list of adapters, not {members!r}")
        given = [1 / len(names)] * len(names) if weights is None else list(weights)
        config, tensors = combined(
            [self.adapter(member) for member in names], names, given, how=how, rank=rank
        )
        average = f"the average of {', '.join(names)}"
        self._insert(name, self._filled(name, config, tensors, average))

    def delete_adapter(self, name: str) -> None:
        """Removes an adapter and the hooks that only it needed; nothing acts if it was acting.

        Raises:
            ValueError: there is none of that name, or it is merged.
        """
        self.adapter(name)
        self._refuse_merged(name, "deleted")
        for fusion in self.fusion_names:
            if name in fusions.of(self, fusion).members.names():
                raise ValueError(
                    f"adapter {name!r} is a member of the AdapterFusion {fusion!r}; call "
                    f"delete_adapter_fusion({fusion!r}) first"
                )
        if self._composition is not None and name in self._composition.names():
            self.set_active_adapters(None)
        for plan in self._forget(name):
            # `using` blocks, of this thread or another, may hold it.
            plan.clear()
        del self.adapters._modules[name]
        self._sync()

    def detach(self) -> nn.Module:
        """The encoder without any trace of adapters; this model is no longer of use.

        Merged adapters stay merged: reset them first for the encoder's own bits.
        """
        self._runtime.clear()
        checkpointing.disable(self._runtime)
        self._runtime.interceptors.remove()
        self._composition, self._plans = None, Plans()
        self.adapters._modules.clear()
        self.fusions._modules.clear()
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(self._required_grad.get(name, True))
        for module in self._front_ends:
            module.__dict__["_requires_grad"] = True
        self._detached = True
        return self.backbone

    def merge_adapter(self, name: str) -> None:
        """Folds an adapter into the encoder's weights: the same outputs at no cost.

        The adapter no longer acts by itself. `reset_adapter` undoes it to the bit. A bottleneck
        that stands beside a feed-forward part, reads what it reads and has its activation becomes
        channels of it: the encoder is a wider one then (timm: another `mlp_ratio`).

        Raises:
            ValueError: the method cannot be merged, with the reason; or a bias has nowhere to go;
                or a feed-forward part that is to get channels is of another kind, or other
                adapters change its maps.
        """
        adapter = self.adapter(name)
        self._refuse_merged(name, "merged again")
        if self._runtime.local.plan is not None:
            raise ValueError(
                f"adapter {name!r} cannot be merged inside a using block, where it may act too; "
                "leave the block first"
            )
        if adapter.config.mergeable is not True:
            raise ValueError(f"adapter {name!r} cannot be merged: {adapter.config.mergeable}")
        self.identity()
        changes = merged_tensors(name, adapter, self.sites)
        self._refuse_widening(name, changes)
        if self._composition is not None and name in self._composition.names():
            self._refuse_entangled(name)
            rest = [other for other in self._composition.names() if other != name]
            self.set_active_adapters(rest or None)
        folded = Merged.into_weights(name, changes, self.sites)
        self._merged.append(folded)
        self._forget(name)
        if folded.widened:  # compiled code need not look at the shapes of parameters
            self._runtime.recompile()

    def _refuse_widening(self, name: str, changes: Changes) -> None:
        wide = {leaf.name for leaf in widened_leaves(changes, self.sites)}
        if not wide:
            return
        adapter = self.adapter(name)
        for other in self.adapter_names:
            for site in self.adapter(other).plan().delta.keys() & wide:
                raise ValueError(
                    f"adapter {name!r} cannot be merged: {site} would get more channels, and "
                    f"adapter {other!r} was made for those that it has; delete that first"
                )
        with torch.random.fork_rng(devices=[]):
            example = self._example_input()
        plan, folded = adapter.plan(), functools.partial(while_merged, name, adapter, self.sites)
        parts = [part.output for part in self.sites.sublayers() if part.name in plan.branch]
        if not agrees(self, self._runtime, plan, example, parts, folded):
            raise ValueError(
                f"adapter {name!r} cannot be merged: the feed-forward parts beside which it "
                "stands are not just two maps with its activation between them"
            )

    def _refuse_entangled(self, name: str) -> None:
        """What is merged acts on everything: only a plain Stack may lose a member to it."""
        active = self._composition
        assert active is not None
        if (
            self._drop
            or not isinstance(active, Stack)
            or any(not isinstance(member, str) for member in active.members)
        ):
            raise ValueError(
                f"adapter {name!r} cannot be merged while {active!r} acts: call "
                "set_active_adapters(None) first"
            )
        names = list(active.names())
        sites = self.adapter(name).plan().branch.keys()
        for other in names[: names.index(name)]:
            if self.adapter(other).plan().branch.keys() & sites:
                raise ValueError(
                    f"adapter {name!r} cannot be merged while {other!r} acts before it on the "
                    "same feed-forward parts, and would then act behind: call "
                    "set_active_adapters(None) first"
                )

    def reset_adapter(self, name: str) -> None:
        """Undoes `merge_adapter`: the encoder has the very bits that it had.

        Raises:
            ValueError: it is not merged, or another was merged after it.
        """
        self.adapter(name)
        merged = [merge.name for merge in self._merged]
        if name not in merged:
            raise ValueError(f"adapter {name!r} is not merged")
        if merged[-1] != name:
            raise ValueError(f"adapter {merged[-1]!r} was merged after {name!r}: reset it first")
        folded = self._merged.pop()
        folded.undo()
        if folded.widened:
            self._runtime.recompile()

    def _refuse_merged(self, name: str, what: str) -> None:
        if name in [merge.name for merge in self._merged]:
            raise ValueError(
                f"adapter {name!r} is merged into the weights and cannot be {what}; call "
                f"reset_adapter({name!r}) first"
            )

    def adapter_summary(self) -> list[AdapterRow]:
        """Prints a table of the adapters held, and returns its rows."""
        base = sum(parameter.numel() for parameter in self.backbone.parameters())
        composition = self.active_adapters
        active = set(composition.names()) if composition is not None else set()
        merged = {merge.name for merge in self._merged}
        rows = []
        for name in self.adapter_names:
            adapter = self.adapter(name)
            count = sum(parameter.numel() for parameter in adapter.parameters())
            rows.append(
                AdapterRow(
                    name=name,
                    method=adapter.config.method,
                    sites=len({site for site, _ in adapter.entries()}),
                    parameters=count,
                    share=100 * count / base,
                    active=name in active,
                    trainable=any(p.requires_grad for p in adapter.parameters()),
                    merged=name in merged,
                    shares=groups.shared_with(self, name),
                )
            )
        total = sum(parameter.numel() for parameter in self.adapters.parameters())
        print(summary_table(type(self.backbone).__name__, base, rows, total))
        return rows

    def identity(self) -> dict[str, Any]:
        """The encoder's identity, computed once, before anything is merged into it."""
        if self._identity is None:
            towers = {
                name: storage.tower_identity(tower) for name, tower in self.sites.towers.items()
            }
            self._identity = {
                "library": self.sites.library,
                "architecture": self.sites.architecture,
                "towers": towers,
            }
        return self._identity

    def save_adapter(
        self,
        directory: str | os.PathLike,
        name: str,
        *,
        head: nn.Module | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes one adapter, with a task's head and JSON-ready metadata, into a directory.

        Raises:
            ValueError: there is none of that name, or the directory holds something else.
        """
        adapter = self.adapter(name)
        identity = self.identity()
        used = {site for site, _ in adapter.entries()}
        if "image" in adapter.reads:
            used.add("vision")
        towers = {
            tower.name: identity["towers"][tower.name]
            for tower in self.sites.towers.values()
            if not used.isdisjoint(tower.site_names())
        }
        stored = storage.Stored(
            name=name,
            config=methods.to_dict(adapter.config),
            backbone={**identity, "towers": towers},
            tensors=adapter.tensors(),
            head={} if head is None else dict(head.state_dict()),
            metadata=dict(metadata or {}),
        )
        storage.write(directory, stored)

    def load_adapter(
        self,
        directory: str | os.PathLike,
        name: str | None = None,
        *,
        allow_different_weights: bool = False,
    ) -> storage.Stored:
        """Adds the adapter of a directory, under its own or another name; not yet active.

        Everything is checked before anything changes. Returns what the directory holds, for the
        head and the metadata.

        Raises:
            FileNotFoundError, ValueError: see `storage.read`; or the adapter is for another
                encoder, or its tensors do not fit.
        """
        stored = storage.read(directory)
        method = stored.config.get("method") if isinstance(stored.config, dict) else None
        if method == FusionConfig.method:
            raise ValueError(
                f"{directory} holds an AdapterFusion: load it with load_adapter_fusion, after its "
                "members"
            )
        if method == bundles.METHOD:
            raise ValueError(f"{directory} holds a composition: load it with load_composition")
        storage.check_backbone(
            stored.backbone, self.identity(), allow_different_weights=allow_different_weights
        )
        name = stored.name if name is None else name
        config = methods.from_dict(stored.config)
        self._insert(name, self._filled(name, config, stored.tensors, directory))
        return stored
