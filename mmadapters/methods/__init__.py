"""All methods by name, and their configs as plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import first_line
from ..limits import METHODS as MOST_METHODS
from ..limits import OPTIONS as MOST_VALUES
from ..suggest import nearest
from .base import AdapterModule, Branch, Delta, MethodConfig, Prefix, Prompt, Readout
from .bitfit import BitFitConfig
from .bottleneck import (
    AdapterPlusConfig,
    AdaptFormerConfig,
    BottleneckConfig,
    DoubleSeqBnConfig,
    ParallelPlacement,
    ParBnConfig,
    SeqBnConfig,
    SequentialPlacement,
)
from .clip_adapter import CLIPAdapterConfig
from .compacter import CompacterConfig
from .conformer import ConformerAdapterConfig
from .conv import ConvpassConfig, MonaConfig
from .cross_modal import CrossModalConfig
from .fact import FacTConfig
from .fusion import FusionConfig
from .gated import GatedCrossAttentionConfig
from .ladder import LadderConfig
from .lora import DoRAConfig, LoRAConfig
from .mma import MMAConfig
from .prefix import PrefixConfig
from .prompt import PromptConfig
from .reparam import RepAdapterConfig
from .scaling import IA3Config, SSFConfig
from .speech import EAdapterConfig, FrontEndAdapterConfig, LAdapterConfig, MMSAdapterConfig
from .types import check_types
from .uniadapter import UniAdapterConfig
from .union import ConfigUnion, MAMConfig, UniPELTConfig

METHODS: dict[str, type[MethodConfig]] = {
    config.method: config
    for config in (
        BottleneckConfig,
        DoubleSeqBnConfig,
        SeqBnConfig,
        ParBnConfig,
        AdaptFormerConfig,
        AdapterPlusConfig,
        CompacterConfig,
        CLIPAdapterConfig,
        ConvpassConfig,
        MonaConfig,
        LoRAConfig,
        DoRAConfig,
        FacTConfig,
        RepAdapterConfig,
        LadderConfig,
        IA3Config,
        SSFConfig,
        BitFitConfig,
        PrefixConfig,
        PromptConfig,
        EAdapterConfig,
        MMSAdapterConfig,
        ConformerAdapterConfig,
        LAdapterConfig,
        FrontEndAdapterConfig,
        UniAdapterConfig,
        MMAConfig,
        CrossModalConfig,
        GatedCrossAttentionConfig,
        ConfigUnion,
        MAMConfig,
        UniPELTConfig,
    )
}
_PLACEMENTS = {"sequential": SequentialPlacement, "parallel": ParallelPlacement}


def method_named(name: str) -> type[MethodConfig]:
    """Returns the config class of a method.

    Raises:
        ValueError: no method has that name; the message names the nearest one.
    """
    if name not in METHODS:
        raise ValueError(
            f"no method is called {name!r}{nearest(name, METHODS)}; "
            f"there are {', '.join(sorted(METHODS))}"
        )
    return METHODS[name]


def to_dict(config: MethodConfig) -> dict[str, Any]:
    """Returns a config as JSON-ready data that `from_dict` reads."""
    data: dict[str, Any] = {"method": config.method}
    if isinstance(config, ConfigUnion):
        data["configs"] = [to_dict(part) for part in config.configs]
        return data
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, (SequentialPlacement, ParallelPlacement)):
            kind = "sequential" if isinstance(value, SequentialPlacement) else "parallel"
            value = {"kind": kind, **dataclasses.asdict(value)}
            value["at"] = list(value["at"])
        data[field.name] = list(value) if isinstance(value, tuple) else value
    return data


def from_dict(data: Mapping[str, Any]) -> MethodConfig:
    """Returns the config that `to_dict` wrote.

    Raises:
        ValueError: an unknown method or option (the message names the nearest one), a value of
            another type than the option has, or more methods or values than a config may hold.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"a config must be a mapping, not {data!r}")
    values = dict(data)
    cls = method_named(str(values.pop("method", "")))
    if issubclass(cls, ConfigUnion):
        _check_options(cls, values, ["configs"])
        parts = values.get("configs", ())
        if not isinstance(parts, (list, tuple)):
            raise ValueError(f"{cls.__name__}: configs must be a list of configs, not {parts!r}")
        if (reason := MOST_METHODS.passed(len(parts))) is not None:
            raise ValueError(f"{cls.__name__} holds {reason}")
        if issubclass(cls, MAMConfig) and len(parts) > 2:
            raise ValueError(f"a MAMConfig takes two configs, not {len(parts)}")
        return cls(*map(from_dict, parts))
    _check_options(cls, values, [field.name for field in dataclasses.fields(cls)])
    placement = values.get("placement")
    if isinstance(placement, Mapping):
        placement = dict(placement)
        kind = _PLACEMENTS.get(str(placement.pop("kind", None)))
        if kind is None:
            raise ValueError("placement.kind must be 'sequential' or 'parallel'")
        _check_options(kind, placement, [field.name for field in dataclasses.fields(kind)])
        try:
            values["placement"] = kind(**placement)
        except TypeError as error:
            raise ValueError(f"placement: {first_line(error)}") from None
    for key, value in values.items():
        if isinstance(value, list):
            if (reason := MOST_VALUES.passed(len(value))) is not None:
                raise ValueError(f"{cls.__name__}: {key} holds {reason}")
            values[key] = tuple(value)
    try:
        config = cls(**values)
    except (TypeError, OverflowError) as error:  # a list where a name is looked up, 10**400
        raise ValueError(f"{cls.__name__}: {first_line(error)}") from None
    check_types(config)
    return config


def _check_options(cls: type, given: Iterable[str], options: list[str]) -> None:
    for key in given:
        if key not in options:
            raise ValueError(f"{cls.__name__} has no option {key!r}{nearest(str(key), options)}")


__all__ = [
    "METHODS",
    "AdaptFormerConfig",
    "AdapterModule",
    "AdapterPlusConfig",
    "BitFitConfig",
    "BottleneckConfig",
    "Branch",
    "CLIPAdapterConfig",
    "CompacterConfig",
    "ConfigUnion",
    "ConformerAdapterConfig",
    "ConvpassConfig",
    "CrossModalConfig",
    "Delta",
    "DoRAConfig",
    "DoubleSeqBnConfig",
    "EAdapterConfig",
    "FacTConfig",
    "FrontEndAdapterConfig",
    "FusionConfig",
    "GatedCrossAttentionConfig",
    "IA3Config",
    "LAdapterConfig",
    "LadderConfig",
    "LoRAConfig",
    "MAMConfig",
    "MMAConfig",
    "MMSAdapterConfig",
    "MethodConfig",
    "MonaConfig",
    "ParBnConfig",
    "ParallelPlacement",
    "Prefix",
    "PrefixConfig",
    "Prompt",
    "PromptConfig",
    "Readout",
    "RepAdapterConfig",
    "SSFConfig",
    "SeqBnConfig",
    "SequentialPlacement",
    "UniAdapterConfig",
    "UniPELTConfig",
    "from_dict",
    "method_named",
    "to_dict",
]
