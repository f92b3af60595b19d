"""`AdapterStore`: the state that the verbs of an `AdapterModel` share."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.adapter import Adapter, Fusion, check_name
from ..adapters.dependence import tensors_behind
from ..adapters.identity import encoder_identity
from ..adapters.merging import MergedAdapter
from ..adapters.shapes import NoShapes, shapes_alone
from ..composition import Composition, Fuse
from ..injectors import checkpointing
from ..injectors.installer import Runtime
from ..injectors.plan import NOTHING, Plan
from ..injectors.selfcheck import check, like_parameters
from ..methods import AdapterModule, MethodConfig
from ..methods.init import skip_init
from ..plans.build import plan_of
from ..plans.cache import Plans
from ..sites.sitemap import SiteMap
from ..sites.spec import Architecture
from ..sites.tables import describe
from ..suggest import listing, nearest
from .freezing import Freeze


class AdapterStore:
    """Holds a frozen encoder, its adapters and fusions, and which of them act.

    It is no module: the encoder and the two containers are modules of the `AdapterModel`, which
    registers their parameters once.

    Attributes:
        model: the whole `AdapterModel`, which the self-check runs.
        backbone: the frozen encoder.
        adapters: the module whose children are the adapters, by name.
        fusions: the module whose children are the AdapterFusions, by name.
        runtime: the hooks on the encoder and the active plan of each thread.
        composition: the composition that acts where no `using` block says otherwise, or None.
        drop: the number of lowest blocks of each tower whose adapters are left out of it.
        random_drop: the (least, most) blocks to drop that each forward pass in train mode draws
            from, or None.
        merged: the adapters that are merged into the encoder's weights, in that order.
        detached: whether the encoder was given back and this store is of no more use.
    """

    def __init__(
        self,
        model: nn.Module,
        backbone: nn.Module,
        *,
        adapters: nn.Module,
        fusions: nn.Module,
        sites: Architecture | None,
        example_inputs: tuple | Mapping[str, Any] | None,
    ) -> None:
        site_map, _ = describe(backbone, sites)
        self.model = model
        self.backbone = backbone
        self.adapters = adapters
        self.fusions = fusions
        self.runtime = Runtime(site_map, backbone)
        self.composition: Composition | None = None
        self.drop = 0
        self.random_drop: tuple[int, int] | None = None
        self.merged: list[MergedAdapter] = []
        self.detached = False
        self._architecture = sites
        self._example_inputs = example_inputs
        self._plans = Plans()
        self._verified: set[tuple] = set()
        self._identity: dict[str, Any] | None = None
        self._freeze = Freeze(backbone)

    @property
    def sites(self) -> SiteMap:
        """The `SiteMap` of the encoder."""
        return self.runtime.sites

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """The names of the adapters, in the order in which they were added."""
        return tuple(self.adapters._modules)

    @property
    def fusion_names(self) -> tuple[str, ...]:
        """The names of the AdapterFusions, in the order in which they were added."""
        return tuple(self.fusions._modules)

    def adapter(self, name: str) -> Adapter:
        """Returns the adapter called `name`.

        Raises:
            ValueError: no adapter has that name; the message names the nearest.
        """
        adapter = self.adapters._modules.get(name)
        if adapter is None:
            there = listing(self.adapters._modules)
            hint = nearest(name, self.adapter_names)
            raise ValueError(f"no adapter is called {name!r}{hint}; there are {there}")
        assert isinstance(adapter, Adapter)
        return adapter

    def fusion(self, name: str) -> Fusion:
        """Returns the AdapterFusion called `name`.

        Raises:
            ValueError: no fusion has that name; the message names the nearest.
        """
        fusion = self.fusions._modules.get(name)
        if fusion is None:
            there = listing(self.fusions._modules)
            hint = nearest(name, self.fusion_names)
            raise ValueError(f"there is no AdapterFusion {name!r}{hint}; there are {there}")
        assert isinstance(fusion, Fusion)
        return fusion

    def fusion_of(self, members: Fuse) -> Fusion:
        """Returns the AdapterFusion of these members in this order.

        Raises:
            ValueError: none was added for them.
        """
        if members.name not in self.fusions._modules:
            there = listing(self.fusions._modules)
            raise ValueError(
                f"there is no AdapterFusion of {members.name!r}: call "
                f"add_adapter_fusion({members!r}) first; there are {there}"
            )
        return self.fusion(members.name)

    def build(self, name: str, config: MethodConfig) -> Adapter:
        """Makes a fresh, frozen adapter for this encoder without inserting it.

        Raises:
            ValueError: the name is not valid or is taken, `config` is no config, or the encoder has
                no place for the method.
        """
        if self.detached:
            raise ValueError("this model was detached from its encoder; call mmadapters.init anew")
        check_name(name)
        if name in self.adapters._modules:
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

    def filled(
        self,
        name: str,
        config: MethodConfig,
        *,
        tensors: Mapping[str, Tensor],
        source: str | os.PathLike,
    ) -> Adapter:
        """Makes an adapter that holds `tensors` without inserting it.

        Args:
            tensors: values by the names of `Adapter.tensors`.
            source: says in errors where the tensors come from.

        Raises:
            ValueError: see `build` and `Adapter.load`.
        """
        with skip_init():
            # A config may ask for more memory than there is.
            with contextlib.suppress(NoShapes), shapes_alone():
                self.build(name, config).check_fit(tensors, source)
            adapter = self.build(name, config)
        adapter.load(tensors, source)
        return adapter

    def insert(self, name: str, adapter: Adapter) -> None:
        """Adds an adapter, not active, and checks that it can act. If it cannot, nothing changes.

        Raises:
            ValueError: it acts on a linear map that a merged adapter has widened.
            InertAdapterError: at one of its sites it would change nothing.
        """
        plan = adapter.plan()
        for merge in self.merged:
            wide = {leaf.name for leaf in merge.widened}
            for site in plan.delta.keys() & wide:
                raise ValueError(
                    f"adapter {name!r} cannot be added: {site} has channels of adapter "
                    f"{merge.name!r}, which is merged; call reset_adapter({merge.name!r}) first"
                )
        adapter.train(self.adapters.training)
        self.adapters._modules[name] = adapter
        try:
            self.runtime.hold(name, plan)
            self.check(plan)
        except BaseException:
            del self.adapters._modules[name]
            self.runtime.release(name)
            raise

    def insert_fusion(self, fusion: Fusion) -> None:
        """Adds an AdapterFusion, neither active nor trainable. If it cannot act, nothing changes.

        Raises:
            ValueError: its members cannot be fused.
        """
        name = fusion.members.name
        fusion.requires_grad_(False)
        fusion.train(self.fusions.training)
        self.fusions._modules[name] = fusion
        try:
            self.runtime.hold(_held(fusion), fusion.plan())
            # Made once and dropped, so that members that cannot be fused raise now.
            plan_of(fusion.members, self.sites, self.adapter, self.fusion_of)
        except BaseException:
            del self.fusions._modules[name]
            self.runtime.release(_held(fusion))
            raise

    @contextlib.contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Removes the adapters and fusions that the block has added, if it raises."""
        adapters, fusions = self.adapter_names, self.fusion_names
        try:
            yield
        except BaseException:
            for name in self.fusion_names[len(fusions) :]:
                self.remove_fusion(name)
            for name in self.adapter_names[len(adapters) :]:
                self.remove(name)
            raise

    def remove(self, name: str) -> None:
        """Removes an adapter and the hooks that only it needed. If it acts, nothing acts then.

        Raises:
            ValueError: no adapter has that name, it is merged, or it is a member of a fusion.
        """
        self.adapter(name)
        self.refuse_merged(name, "deleted")
        for fusion in self.fusion_names:
            if name in self.fusion(fusion).members.names():
                raise ValueError(
                    f"adapter {name!r} is a member of the AdapterFusion {fusion!r}; call "
                    f"delete_adapter_fusion({fusion!r}) first"
                )
        if self.composition is not None and name in self.composition.names():
            self.activate(None)
        for plan in self.forget(name):
            # `using` blocks, of this thread or another, may hold it.
            plan.clear()
        del self.adapters._modules[name]
        self.runtime.release(name)

    def remove_fusion(self, name: str) -> None:
        """Removes an AdapterFusion but not its members. If it acts, nothing acts then.

        Raises:
            ValueError: no fusion has that name.
        """
        fusion = self.fusion(name)
        del self.fusions._modules[name]
        if self.composition is not None and name in self.composition.fusion_names():
            self.activate(None)
        for plan in self._plans.forget(lambda composition: name in composition.fusion_names()):
            plan.clear()
        self.runtime.release(_held(fusion))

    def renew(self, names: Iterable[str]) -> None:
        """Makes the plans with these adapters anew, after their modules were replaced."""
        for name in names:
            self.forget(name)
        if self.composition is not None:
            self.runtime.active = self.plan(self.composition, self.drop)
        self.runtime.recompile()

    def check(self, acting: Plan) -> None:
        """Runs the self-check at the sites where no earlier adapter of this kind was checked.

        Args:
            acting: the plan of the adapter alone.

        Raises:
            InertAdapterError: at one of them the adapter would change nothing.
        """
        plan = Plan()
        points = set()
        for kind, site, module in acting.entries():
            point = (kind, site, type(module), getattr(module, "reads", None))
            if point not in self._verified:
                points.add(point)
                plan.add(kind, site, module)
        if points:
            check(self.model, self.runtime, plan, self.example_input())
            self._verified |= points

    def example_input(self) -> tuple[tuple, dict]:
        """Returns a small input for the encoder as (args, kwargs). Random states do not move.

        Raises:
            ValueError: none was given to `init`, and the encoder is not a known one.
        """
        # Or the self-check would change the random numbers that are drawn after it.
        with torch.random.fork_rng(devices=[]):
            given = self._example_inputs
            if isinstance(given, Mapping):
                return (), dict(given)
            if given is not None:
                return tuple(given), {}
            # Not kept from `__init__`: a table's function need not be picklable, as models are.
            _, example = describe(self.backbone, self._architecture)
            if example is None:
                raise ValueError(
                    "the self-check needs an input: pass example_inputs=(tensor, ...) to init"
                )
            return example(self.backbone)

    def plan(self, composition: Composition | None, drop: int = 0) -> Plan:
        """Returns the plan of a composition, made at the first call and kept.

        Args:
            drop: the number of lowest blocks of each tower whose adapters are left out.

        Raises:
            ValueError: an adapter is not here or is merged, a method cannot take part in the
                composition, or `drop` is no number of blocks.
        """
        if composition is None:
            return NOTHING
        return self._plans.get((composition, drop), lambda: self._make_plan(composition, drop))

    def _make_plan(self, composition: Composition, drop: int) -> Plan:
        self.check_drop(drop)
        merged = [merge.name for merge in self.merged]
        for name in composition.names():
            self.adapter(name)
            if name in merged:
                raise ValueError(
                    f"adapter {name!r} is merged into the weights and would act twice; call "
                    f"reset_adapter({name!r}) first"
                )
        plan = plan_of(composition, self.sites, self.adapter, self.fusion_of, drop=drop)
        self.runtime.admit(plan)
        return plan

    def check_drop(self, drop: int) -> None:
        """Raises ValueError unless `drop` is a number of blocks that some tower has."""
        deepest = max(len(tower.blocks) for tower in self.sites.towers.values())
        if isinstance(drop, bool) or not isinstance(drop, int) or not 0 <= drop <= deepest:
            raise ValueError(f"drop must be a number of blocks from 0 to {deepest}, not {drop!r}")

    def forget(self, name: str) -> list[Plan]:
        """Drops the plans in which an adapter acts, and returns those that are still in use."""
        return self._plans.forget(lambda composition: name in composition.names())

    def activate(self, composition: Composition | None, drop: int = 0) -> None:
        """Lets a composition act in all threads; see `AdapterModel.set_active_adapters`."""
        self.runtime.active = self.plan(composition, drop)
        self.composition, self.drop, self.random_drop = composition, drop, None

    def activate_for_training(
        self, composition: Composition | None, drop: int | tuple[int, int]
    ) -> None:
        """Lets a composition act in all threads; see `AdapterModel.train_adapter` for `drop`."""
        if not isinstance(drop, (tuple, list)):
            self.activate(composition, drop)
            return
        for end in drop:
            self.check_drop(end)
        if len(drop) != 2 or not drop[0] <= drop[1]:
            raise ValueError(f"drop is a number or a pair (least, most), not {drop!r}")
        self.activate(composition)
        self.random_drop = (drop[0], drop[1])

    def refuse_merged(self, name: str, action: str) -> None:
        """Raises ValueError if the adapter is merged, and so cannot be `action` ("deleted")."""
        if name in [merge.name for merge in self.merged]:
            raise ValueError(
                f"adapter {name!r} is merged into the weights and cannot be {action}; call "
                f"reset_adapter({name!r}) first"
            )

    def identity(self, *, anew: bool = False) -> dict[str, Any]:
        """Returns the encoder's identity; `anew` computes it again, as the encoder has changed."""
        if self._identity is None or anew:
            self._identity = encoder_identity(self.sites, self._tensors_behind())
        return self._identity

    def _tensors_behind(self) -> dict[str, dict[str, Tensor]] | None:
        """Returns the tensors that each tower depends on; None without an input to run it on."""
        try:
            args, kwargs = like_parameters(self.backbone, self.example_input())
        except ValueError:
            return None
        with self.runtime.pinned(NOTHING):
            run = functools.partial(self.backbone, *args, **kwargs)
            return tensors_behind(self.backbone, self.sites.towers, run)

    def detach(self) -> None:
        """Removes all adapters, fusions and hooks, and lets the encoder's parameters train again.

        Merged adapters stay merged.
        """
        self.runtime.clear()
        checkpointing.disable(self.runtime)
        self.runtime.interceptors.remove()
        self.composition, self._plans = None, Plans()
        self.adapters._modules.clear()
        self.fusions._modules.clear()
        self._freeze.undo()
        self.detached = True


def _held(fusion: Fusion) -> str:
    """Returns the name under which the runtime holds a fusion: no adapter's name has a slash."""
    return f"fusions/{fusion.members.name}"
