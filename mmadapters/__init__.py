"""Adapters for frozen vision, speech and vision-language encoders of any library."""

from .backbones import load_backbone
from .composition import Stack
from .injectors import Architecture, LeafSpec, SublayerSpec, TowerSpec
from .methods import (
    AdaptFormerConfig,
    AdapterPlusConfig,
    BitFitConfig,
    BottleneckConfig,
    CompacterConfig,
    ConfigUnion,
    DoRAConfig,
    DoubleSeqBnConfig,
    IA3Config,
    LoRAConfig,
    MAMConfig,
    MethodConfig,
    Parallel,
    ParBnConfig,
    PrefixConfig,
    PromptConfig,
    SeqBnConfig,
    Sequential,
    SSFConfig,
    UniPELTConfig,
)
from .model import AdapterModel, AdapterRow, init
from .selfcheck import InertAdapterError

__version__ = "0.1.0"

__all__ = [
    "AdaptFormerConfig",
    "AdapterModel",
    "AdapterPlusConfig",
    "AdapterRow",
    "Architecture",
    "BitFitConfig",
    "BottleneckConfig",
    "CompacterConfig",
    "ConfigUnion",
    "DoRAConfig",
    "DoubleSeqBnConfig",
    "IA3Config",
    "InertAdapterError",
    "LeafSpec",
    "LoRAConfig",
    "MAMConfig",
    "MethodConfig",
    "ParBnConfig",
    "Parallel",
    "PrefixConfig",
    "PromptConfig",
    "SSFConfig",
    "SeqBnConfig",
    "Sequential",
    "Stack",
    "SublayerSpec",
    "TowerSpec",
    "UniPELTConfig",
    "init",
    "load_backbone",
]
