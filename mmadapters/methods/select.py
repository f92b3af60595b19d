"""Checks of the options of methods, and the choice of the sites that a method acts at."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ..limits import FACTOR
from ..sites.sitemap import ATTENTION_LEAVES, FFN_LEAVES, Leaf, SiteMap, Sublayer, Tower
from ..suggest import nearest
from .base import MethodConfig

# The roles that a config's `targets` may name.
TARGETS = (*ATTENTION_LEAVES, *FFN_LEAVES)
_LEAST = 1e-20  # of a factor other than 0, in size: one over it is finite in float32


def check_choice(what: str, value: object, choices: Iterable[str | None]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    choices = list(choices)
    if value not in choices:
        hint = nearest(value, filter(None, choices)) if isinstance(value, str) else ""
        raise ValueError(
            f"{what} must be one of {', '.join(map(repr, choices))}, not {value!r}{hint}"
        )


def check_count(what: str, value: int) -> None:
    """Raises ValueError unless `value` is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{what} must be a whole number of at least 1, not {value!r}")


def check_number(what: str, value: float) -> None:
    """Raises ValueError unless `value` is a number that leaves outputs in float32 finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{what} must be a finite number, not {value!r}")
    if value and not _LEAST <= abs(value) <= FACTOR.value:
        raise ValueError(
            f"{what} must be 0 or between {_LEAST:g} and {FACTOR.value:,} in size, not {value!r}: "
            f"outputs would not be finite ({FACTOR.variable} sets another limit)"
        )


def check_rate(what: str, value: float) -> None:
    """Raises ValueError unless `value` is a probability below 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < 1.0:
        raise ValueError(f"{what} must be at least 0 and below 1, not {value!r}")


def check_scale(scale: float, *, zero: str = "the up-projection") -> None:
    """Raises ValueError unless `scale` is a finite number other than 0; `zero` starts at zero."""
    check_number("scale", scale)
    if scale == 0:
        raise ValueError(f"scale must not be 0: with {zero} at zero nothing would learn")


def check_size(size: int | None, reduction_factor: float | None) -> None:
    """Raises ValueError unless at most one of both is given, and that one is positive."""
    if size is not None and reduction_factor is not None:
        raise ValueError(
            f"give the bottleneck as size={size} or as reduction_factor={reduction_factor}, "
            "not as both"
        )
    if size is not None:
        check_count("size", size)
    if reduction_factor is not None:
        check_number("reduction_factor", reduction_factor)
        if reduction_factor <= 0:
            raise ValueError(f"reduction_factor must be above 0, not {reduction_factor}")


def bottleneck_size(sublayer: Sublayer, size: int | None, reduction_factor: float | None) -> int:
    """Returns the size of one sublayer's bottleneck: `size` if given, else the width over the
    factor, rounded down.

    Raises:
        ValueError: the factor is larger than the width.
    """
    if size is not None:
        return size
    assert reduction_factor is not None
    if reduction_factor > sublayer.width:
        raise ValueError(
            f"reduction_factor {reduction_factor:g} is larger than the width {sublayer.width} of "
            f"{sublayer.name}: nothing would be left; use at most {sublayer.width} or give size"
        )
    return int(sublayer.width / reduction_factor)


def check_targets(config: MethodConfig) -> None:
    """Makes the config's `targets` a tuple.

    Raises:
        ValueError: it is empty or one string, or names a role that is not in `TARGETS`.
    """
    targets = config.targets  # type: ignore[attr-defined]
    if isinstance(targets, str):
        raise ValueError(f"targets must be a tuple of leaves, e.g. targets=({targets!r},)")
    object.__setattr__(config, "targets", tuple(targets))
    if not targets:
        raise ValueError(f"targets is empty: name at least one of {', '.join(TARGETS)}")
    for target in targets:
        check_choice("targets", target, TARGETS)


def chosen_leaves(config: MethodConfig, sites: SiteMap, roles: tuple[str, ...]) -> list[Leaf]:
    """Returns the leaves of the given roles under the config's `sites`.

    Raises:
        ValueError: there is no leaf of one of the roles.
    """
    selection = sites.select(config.sites)
    chosen = [leaf for leaf in sites.leaves() if leaf.name in selection and leaf.role in roles]
    there = {leaf.role for leaf in chosen}
    for role in roles:
        if role not in there:
            known = sorted({leaf.role for leaf in sites.leaves() if leaf.name in selection})
            raise ValueError(
                f"{sites.architecture} has no linear map {role!r} under sites={config.sites!r}; "
                f"it has {', '.join(known)}"
            )
    return chosen


def chosen_sublayers(
    config: MethodConfig, sites: SiteMap, kinds: tuple[str, ...]
) -> list[Sublayer]:
    """Returns the sublayers of the given kinds under the config's `sites`.

    Raises:
        ValueError: there is none.
    """
    selection = sites.select(config.sites)
    chosen = [s for s in sites.sublayers() if s.name in selection and s.kind in kinds]
    if not chosen:
        there = sorted({sublayer.kind for sublayer in sites.sublayers()})
        raise ValueError(
            f"{sites.architecture} has no {' or '.join(kinds)} under sites={config.sites!r}; "
            f"it has {', '.join(there)}"
        )
    return chosen


def image_sublayers(config: MethodConfig, sites: SiteMap) -> list[tuple[Sublayer, bool]]:
    """Returns the attention and feed-forward parts under the config's `sites`, each with True if
    the batch comes first there.

    Raises:
        ValueError: there is none, or one lies in a tower whose tokens are not patches of an image.
    """
    selection = sites.select(config.sites)
    parts = []
    for tower in sites.towers.values():
        every = [part for block in tower.blocks for part in block.sublayers.values()]
        chosen = [part for part in every if part.name in selection and part.kind != "cross"]
        if chosen and tower.patches is None:
            able = [name for name, other in sites.towers.items() if other.patches is not None]
            hint = f"; name sites=({able[0]!r},)" if able else "; image encoders can take it"
            raise ValueError(
                f"{config.method} reads the grid of an image's patches, which tower "
                f"{tower.name!r} of {sites.architecture} does not have{hint}"
            )
        parts += [(part, tower.batch_first) for part in chosen]
    if not parts:
        raise ValueError(f"{sites.architecture} has no attn or ffn under sites={config.sites!r}")
    return parts


def audio_tower(config: MethodConfig, sites: SiteMap) -> Tower:
    """Returns the tower that reads speech.

    Raises:
        ValueError: there is none.
    """
    tower = sites.towers.get("audio")
    if tower is None:
        raise ValueError(
            f"{config.method} is for speech, and {sites.architecture} has no audio tower; "
            f"it has {', '.join(sites.towers)}"
        )
    return tower
