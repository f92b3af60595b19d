"""All methods, by name, and their configs as plain data."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..sites import nearest
from .base import AdapterModule, Branch, Delta, MethodConfig, Prefix, Prompt
from .bitfit import BitFitConfig
from .bottleneck import (
    AdapterPlusConfig,
    AdaptFormerConfig,
    BottleneckConfig,
    DoubleSeqBnConfig,
    Parallel,
    ParBnConfig,
    SeqBnConfig,
    Sequential,
)
from .compacter import CompacterConfig
from .lora import DoRAConfig, LoRAConfig
from .prefix import PrefixConfig
from .prompt import PromptConfig
from .scaling import IA3Config, SSFConfig
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
        LoRAConfig,
        DoRAConfig,
        IA3Config,
        SSFConfig,
        BitFitConfig,
        PrefixConfig,
        PromptConfig,
        ConfigUnion,
        MAMConfig,
        UniPELTConfig,
    )
}
_PLACEMENTS = {"sequential": Sequential, "parallel": Parallel}


def method_named(name: str) -> type[MethodConfig]:
    """The config class of a method.

    Raises:
        ValueError: there is none of that name; names the nearest.
    """
    if name not in METHODS:
        raise ValueError(
            f"no method is called {name!r}{nearest(name, METHODS)}; "
            f"there are {', '.join(sorted(METHODS))}"
        )
    return METHODS[name]


def to_dict(config: MethodConfig) -> dict[str, Any]:
    """A config as JSON-ready data that `from_dict` reads."""
    data: dict[str, Any] = {"method": config.method}
    if isinstance(config, ConfigUnion):
        data["configs"] = [to_dict(part) for part in config.configs]
        return data
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, (Sequential, Parallel)):
            kind = "sequential" if isinstance(value, Sequential) else "parallel"
            value = {"kind": kind, **dataclasses.asdict(value)}
            value["at"] = list(value["at"])
        data[field.name] = list(value) if isinstance(value, tuple) else value
    return data


def from_dict(data: dict[str, Any]) -> MethodConfig:
    """The config that `to_dict` wrote.

    Raises:
        ValueError: an unknown method or option; names the nearest.
    """
    values = dict(data)
    cls = method_named(str(values.pop("method", "")))
    if issubclass(cls, ConfigUnion):
        return cls(*[from_dict(part) for part in values.get("configs", ())])
    options = [field.name for field in dataclasses.fields(cls)]
    for key in values:
        if key not in options:
            raise ValueError(f"{cls.__name__} has no option {key!r}{nearest(key, options)}")
    placement = values.get("placement")
    if isinstance(placement, dict):
        placement = dict(placement)
        kind = _PLACEMENTS.get(placement.pop("kind", None))
        if kind is None:
            raise ValueError("placement.kind must be 'sequential' or 'parallel'")
        values["placement"] = kind(**placement)
    for key, value in values.items():
        if isinstance(value, list):
            values[key] = tuple(value)
    return cls(**values)


__all__ = [
    "METHODS",
    "AdaptFormerConfig",
    "AdapterModule",
    "AdapterPlusConfig",
    "BitFitConfig",
    "BottleneckConfig",
    "Branch",
    "CompacterConfig",
    "ConfigUnion",
    "Delta",
    "DoRAConfig",
    "DoubleSeqBnConfig",
    "IA3Config",
    "LoRAConfig",
    "MAMConfig",
    "MethodConfig",
    "ParBnConfig",
    "Parallel",
    "Prefix",
    "PrefixConfig",
    "Prompt",
    "PromptConfig",
    "SSFConfig",
    "SeqBnConfig",
    "Sequential",
    "UniPELTConfig",
    "from_dict",
    "method_named",
    "to_dict",
]
