"""Adapters of several tasks that share parameters (VL-Adapter, Sung et al. 2022).

    single      all tasks have the same parameters
    multiple    each task has its own
    half_down   the down-projections are shared, the rest is each task's own
    half_up     the up-projections are shared, the rest is each task's own

Shared parameters are the same `Parameter` objects under the names of several adapters. Nothing else
records the sharing. A projection is its weight and bias. The down-projection of LoRA and DoRA is A,
their up-projection is B. Norms, convolutions, scales and gates between the projections belong to
neither half. Compacter makes both projections of one rule, which is therefore shared with either.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

import torch
from torch import nn

from ..adapters.adapter import Adapter, parts
from ..methods import MethodConfig, method_named
from ..methods.bottleneck import Bottleneck
from ..methods.conv import Convpass, Mona
from ..methods.lora import LoRA
from ..methods.reparam import RepAdapter
from ..methods.select import check_choice
from ..methods.speech import FrontEndAdapter
from ..methods.union import GatedBranch, GatedDelta
from .store import AdapterStore

Sharing = Literal["single", "multiple", "half_down", "half_up"]
Half = Literal["half_down", "half_up"]
SHARINGS: tuple[Sharing, ...] = ("single", "multiple", "half_down", "half_up")
HALVES: tuple[Half, ...] = ("half_down", "half_up")

# The names of the parameters, or of modules of them, that are the down- and the up-projection.
_PROJECTIONS: dict[type[nn.Module], tuple[tuple[str, ...], tuple[str, ...]]] = {
    Bottleneck: (("down",), ("up",)),
    Convpass: (("down",), ("up",)),
    Mona: (("down",), ("up",)),
    FrontEndAdapter: (("down",), ("up",)),
    RepAdapter: (("down", "down_bias"), ("up", "up_bias")),
    LoRA: (("a",), ("b",)),
}


def add(
    store: AdapterStore,
    names: Iterable[str] | Mapping[str, MethodConfig | str],
    config: MethodConfig | str | None,
    *,
    sharing: Sharing | None,
    share_with: str | None,
) -> None:
    """See `AdapterModel.add_adapters`."""
    configs = _configs(store, names, config, share_with)
    group = {} if share_with is None else {share_with: store.adapter(share_with)}
    kind = _kind_of_group(store, sharing, share_with)
    fresh = {name: store.build(name, its_config) for name, its_config in configs.items()}
    tie({**group, **fresh}, kind)
    with store.all_or_nothing():
        for name, adapter in fresh.items():
            store.insert(name, adapter)


def _configs(
    store: AdapterStore,
    names: Iterable[str] | Mapping[str, MethodConfig | str],
    config: MethodConfig | str | None,
    share_with: str | None,
) -> dict[str, MethodConfig]:
    if config is None and share_with is not None:
        config = store.adapter(share_with).config
    if isinstance(names, Mapping):
        given = dict(names)
    else:
        listed = [] if isinstance(names, str) else list(names)
        twice = [name for name, count in Counter(listed).items() if count > 1]
        if twice:
            raise ValueError(f"two adapters are to be called {twice[0]!r}: give each its own name")
        if config is None and listed:
            raise ValueError(
                "give one config for all adapters, or a config for each: {name: config}"
            )
        given = {name: config for name in listed if config is not None}
    if not given:
        raise ValueError(f"names is a list of names or a mapping to configs, not {names!r}")
    return {n: method_named(c)() if isinstance(c, str) else c for n, c in given.items()}


def _kind_of_group(store: AdapterStore, sharing: Sharing | None, share_with: str | None) -> Sharing:
    """Returns the sharing that is asked for, or the one of the group that is joined.

    Raises:
        ValueError: the sharing is unknown, is not given, or is not that of the group.
    """
    if sharing is not None:
        check_choice("sharing", sharing, SHARINGS)
    if share_with is None:
        return sharing or "multiple"
    others = shared_with(store, share_with)
    if not others:
        if sharing is None:
            raise ValueError(
                f"adapter {share_with!r} shares nothing yet: say what is to be shared with it, "
                f"sharing={' or '.join(map(repr, SHARINGS))}"
            )
        return sharing
    there = sharing_of(store.adapter(share_with), store.adapter(others[0]))
    if sharing not in (None, there):
        raise ValueError(
            f"adapter {share_with!r} shares {there} with {others[0]!r}, and a group shares one "
            f"thing: leave sharing={sharing!r} out, or share with another adapter"
        )
    return there


def share(store: AdapterStore, names: Iterable[str], sharing: Sharing) -> None:
    """See `AdapterModel.share_adapters`."""
    check_choice("sharing", sharing, ("single", *HALVES))
    listed = [] if isinstance(names, str) else list(dict.fromkeys(names))
    if len(listed) < 2:
        raise ValueError(f"names is a list of at least two adapters, not {names!r}")
    group = {name: store.adapter(name) for name in listed}
    shares = sharers(store)
    for name in listed:
        for other in shares[name]:
            there = sharing_of(store.adapter(name), store.adapter(other))
            if other not in group or there != sharing:
                raise ValueError(
                    f"adapter {name!r} shares {there} with {other!r} already: a group shares one "
                    f"thing, so share {there} among all of it, {other!r} too"
                )
    tie(group, sharing, equal=True)
    store.renew(listed)


def shared_with(store: AdapterStore, name: str) -> tuple[str, ...]:
    """Returns the names of the other adapters that have a parameter of this one."""
    return sharers(store)[name]


def sharers(store: AdapterStore) -> dict[str, tuple[str, ...]]:
    """Returns for each adapter the names of the others that have a parameter of it."""
    ids = {name: _ids(store.adapter(name)) for name in store.adapter_names}
    owners: dict[int, dict[str, None]] = {}
    for name, its in ids.items():
        for parameter in its:
            owners.setdefault(parameter, {})[name] = None
    order = {name: number for number, name in enumerate(ids)}
    return {
        name: tuple(
            sorted(
                {other for parameter in its for other in owners[parameter]} - {name},
                key=order.__getitem__,
            )
        )
        for name, its in ids.items()
    }


def sharing_of(adapter: Adapter, other: Adapter) -> Sharing:
    """Returns which parameters two adapters share."""
    ids = _ids(adapter)
    common = ids & _ids(other)
    if not common:
        return "multiple"
    if common == ids:
        return "single"
    return next(
        half
        for half in HALVES
        if common == {id(p) for p in half_parameters(adapter, half).values()}
    )


def _ids(adapter: Adapter) -> set[int]:
    values = (parameter for part in parts(adapter) for parameter in part._parameters.values())
    return {id(parameter) for parameter in values if parameter is not None}


def tie(adapters: Mapping[str, Adapter], sharing: Sharing, *, equal: bool = False) -> None:
    """Replaces the shared parameters of all adapters but the first by those of the first.

    Args:
        adapters: the adapters by name.
        equal: raise if the parameters to be shared have other bits in one of them.

    Raises:
        ValueError: two adapters differ in structure where they are to be shared, a method has no
            two projections, or values differ although `equal` is set. Nothing has changed then.
    """
    if sharing == "multiple":
        return
    (first_name, first), *rest = adapters.items()
    for name, other in rest:
        if sharing == "single" and other.config != first.config:
            raise ValueError(
                f"sharing='single' is one adapter under several names, but {name!r} and "
                f"{first_name!r} have different configs: give them one"
            )
        _check_alike(first, other, first_name, name, sharing, equal)
    for _, other in rest:
        if sharing == "single":
            # Whole modules, as statistics that are no parameters are shared too.
            other._modules.update(first._modules)
            continue
        theirs = half_parameters(other, sharing)
        shared = {id(theirs[key]): p for key, p in half_parameters(first, sharing).items()}
        for module in other.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None and id(parameter) in shared:
                    module._parameters[key] = shared[id(parameter)]


def _check_alike(
    first: Adapter, other: Adapter, first_name: str, name: str, sharing: Sharing, equal: bool
) -> None:
    if sharing == "single":
        ours, theirs = first.tensors(), other.tensors()
    else:
        ours, theirs = _half(first, first_name, sharing), _half(other, name, sharing)
    if alone := sorted(ours.keys() ^ theirs.keys()):
        raise ValueError(
            f"{name!r} and {first_name!r} cannot share {sharing}: {alone[0]} is in one of them "
            "alone; give them the same sites"
        )
    for key, tensor in ours.items():
        if tensor.shape != theirs[key].shape or tensor.dtype != theirs[key].dtype:
            raise ValueError(
                f"{name!r} and {first_name!r} cannot share {sharing}: {key} is "
                f"{tuple(theirs[key].shape)} in one and {tuple(tensor.shape)} in the other, or of "
                "another dtype; give them the same size"
            )
        if equal and not torch.equal(tensor, theirs[key]):
            raise ValueError(
                f"{name!r} and {first_name!r} cannot share {sharing}: {key} differs between them, "
                "so they were not trained as one; leave them as they are, each with its own"
            )


def _half(adapter: Adapter, name: str, half: Sharing) -> dict[str, torch.Tensor]:
    assert half in HALVES
    try:
        return dict(half_parameters(adapter, half))
    except ValueError as error:
        raise ValueError(f"adapter {name!r} cannot share {half}: {error}") from None


def half_parameters(adapter: Adapter, half: Half) -> dict[str, nn.Parameter]:
    """Returns the parameters of one half by the names that files use.

    Raises:
        ValueError: a module of the adapter has no down- and up-projection.
    """
    return {
        f"{place}/{key}": parameter
        for place, module in _modules(adapter)
        for key, parameter in _projection(place, module, HALVES.index(half))
    }


def _modules(adapter: Adapter) -> Iterator[tuple[str, nn.Module]]:
    for key, module in adapter.named_children():
        yield key.replace("/", "."), module


def _projection(place: str, module: nn.Module, side: int) -> Iterator[tuple[str, nn.Parameter]]:
    core, prefix = module, ""
    if isinstance(module, (GatedBranch, GatedDelta)):
        core, prefix = module.inner, "inner."
    names = next((sides[side] for c, sides in _PROJECTIONS.items() if isinstance(core, c)), None)
    if names is None:
        raise ValueError(
            f"the {type(core).__name__} at {place} has no down- and up-projection; use "
            "sharing='single' or 'multiple', or leave it out of the config"
        )
    for key, parameter in core.named_parameters(remove_duplicate=False):
        if key.partition(".")[0] in names:
            yield prefix + key, parameter
