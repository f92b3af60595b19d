"""Adapters for frozen vision, speech and vision-language encoders of any library."""

# ruff: noqa: F401

import importlib as _importlib
import typing as _typing
import warnings as _warnings

if _typing.TYPE_CHECKING:
    from .adapters.summary import AdapterRow
    from .backbones.load import load_backbone
    from .composition import Average, BatchSplit, Fuse, Parallel, Route, Split, Stack
    from .injectors.selfcheck import InertAdapterError
    from .methods import (
        AdapterPlusConfig,
        AdaptFormerConfig,
        BitFitConfig,
        BottleneckConfig,
        CLIPAdapterConfig,
        CompacterConfig,
        ConfigUnion,
        ConformerAdapterConfig,
        ConvpassConfig,
        CrossModalConfig,
        DoRAConfig,
        DoubleSeqBnConfig,
        EAdapterConfig,
        FacTConfig,
        FrontEndAdapterConfig,
        FusionConfig,
        GatedCrossAttentionConfig,
        IA3Config,
        LAdapterConfig,
        LadderConfig,
        LoRAConfig,
        MAMConfig,
        MethodConfig,
        MMAConfig,
        MMSAdapterConfig,
        MonaConfig,
        ParallelPlacement,
        ParBnConfig,
        PrefixConfig,
        PromptConfig,
        RepAdapterConfig,
        SeqBnConfig,
        SequentialPlacement,
        SSFConfig,
        UniAdapterConfig,
        UniPELTConfig,
    )
    from .model.model import AdapterModel, init
    from .plans.heads import RoutedHeads
    from .sites.spec import (
        Architecture,
        EmbeddingSpec,
        LeafSpec,
        PatchSpec,
        SublayerSpec,
        TowerSpec,
    )
    from .trunk.frozen import FrozenTrunk, TowerTrunk, placeholder

__version__ = "0.1.0"

# The module of each public name. It is imported when the name is first used, so that
# `mmadapters --help` does not wait for torch.
_HOMES = {
    "backbones.load": ("load_backbone",),
    "composition": (
        "Average",
        "BatchSplit",
        "Fuse",
        "Parallel",
        "Route",
        "Split",
        "Stack",
    ),
    "plans.heads": ("RoutedHeads",),
    "sites.spec": (
        "Architecture",
        "EmbeddingSpec",
        "LeafSpec",
        "PatchSpec",
        "SublayerSpec",
        "TowerSpec",
    ),
    "methods": (
        "AdaptFormerConfig",
        "AdapterPlusConfig",
        "BitFitConfig",
        "BottleneckConfig",
        "CLIPAdapterConfig",
        "CompacterConfig",
        "ConfigUnion",
        "ConformerAdapterConfig",
        "ConvpassConfig",
        "CrossModalConfig",
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
        "PrefixConfig",
        "PromptConfig",
        "RepAdapterConfig",
        "SSFConfig",
        "SeqBnConfig",
        "SequentialPlacement",
        "UniAdapterConfig",
        "UniPELTConfig",
    ),
    "model.model": (
        "AdapterModel",
        "init",
    ),
    "trunk.frozen": (
        "FrozenTrunk",
        "TowerTrunk",
        "placeholder",
    ),
    "injectors.selfcheck": ("InertAdapterError",),
    "adapters.summary": ("AdapterRow",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}
# Old names, which still work but warn.
_RENAMED = {"FrozenPrefix": "FrozenTrunk", "TowerPrefix": "TowerTrunk"}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> _typing.Any:
    if name in _RENAMED:
        _warnings.warn(
            f"mmadapters.{name} is now called mmadapters.{_RENAMED[name]}: use the new name",
            DeprecationWarning,
            stacklevel=2,
        )
        return __getattr__(_RENAMED[name])
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(_importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
