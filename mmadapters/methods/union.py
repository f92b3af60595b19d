"""Several methods under one adapter name, plainly or with learned gates.

    ConfigUnion   every method acts as it does alone, in the given order
    MAM           prefix tuning and a parallel bottleneck, He et al. 2022
    UniPELT       u' = u + G (m(u) - u) for each method m, Mao et al. 2022

G = sigmoid(w h + b) is a gate for each layer and token; h is the input of the site. Mao et al.
scale the keys and values of a prefix by the mean of G over the tokens, padding included. Here log G
is added to the scores of the prefix, so that every query has a gate of its own, and padding none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..sites.acting import Context
from ..sites.sitemap import Leaf, SiteMap
from .base import AdapterModule, Branch, Delta, MethodConfig, Prefix
from .bottleneck import BottleneckConfig, ParBnConfig, SeqBnConfig
from .lora import LoRAConfig
from .prefix import PrefixConfig


@dataclass(frozen=True)
class ConfigUnion(MethodConfig):
    """Several methods as one: `ConfigUnion(PrefixConfig(), ParBnConfig())`."""

    # The methods, two or more, no unions; each keeps its own `sites`. They act in this order.
    configs: tuple[MethodConfig, ...] = ()

    method: ClassVar[str] = "union"

    def __init__(self, *configs: MethodConfig) -> None:
        object.__setattr__(self, "configs", configs)
        object.__setattr__(self, "sites", ("*",))
        for config in configs:
            if not isinstance(config, MethodConfig) or isinstance(config, ConfigUnion):
                raise ValueError(f"a ConfigUnion holds single methods, not {config!r}")
        if len(configs) < 2:
            raise ValueError("a ConfigUnion needs at least two methods")

    @property
    def identity(self) -> bool:  # type: ignore[override]
        return all(config.identity for config in self.configs)

    @property
    def mergeable(self) -> bool | str:  # type: ignore[override]
        reasons = [config.mergeable for config in self.configs if config.mergeable is not True]
        return reasons[0] if reasons else True

    def parts(self) -> Iterable[tuple[str, MethodConfig]]:
        names = [config.method for config in self.configs]
        for index, config in enumerate(self.configs):
            before = names[:index].count(config.method)
            yield (f"{config.method}.{before}" if before else config.method), config

    def build(self, sites: SiteMap) -> dict[str, AdapterModule]:
        raise TypeError("a ConfigUnion is built part by part")


class MAMConfig(ConfigUnion):
    """Mix-and-match, He et al. 2022: a reparametrised prefix and a parallel bottleneck.

    Args:
        prefix: by default of 30 keys and values, from a network 512 wide.
        bottleneck: by default `ParBnConfig()`.
    """

    method: ClassVar[str] = "mam"

    def __init__(
        self, prefix: PrefixConfig | None = None, bottleneck: BottleneckConfig | None = None
    ) -> None:
        prefix = prefix or PrefixConfig(length=30, reparametrise=512)
        bottleneck = bottleneck or ParBnConfig()
        if not isinstance(prefix, PrefixConfig) or not isinstance(bottleneck, BottleneckConfig):
            raise ValueError(
                "a MAMConfig takes a PrefixConfig and a BottleneckConfig, "
                f"not {prefix!r} and {bottleneck!r}"
            )
        super().__init__(prefix, bottleneck)


class UniPELTConfig(ConfigUnion):
    """UniPELT, Mao et al. 2022: prefix tuning, LoRA and a bottleneck, each with gates.

    Args:
        configs: two or more of these three kinds; by default one of each.
    """

    method: ClassVar[str] = "unipelt"

    def __init__(self, *configs: MethodConfig) -> None:
        chosen = configs or (PrefixConfig(), LoRAConfig(), SeqBnConfig(reduction_factor=16))
        for config in chosen:
            if not isinstance(config, (PrefixConfig, LoRAConfig, BottleneckConfig)):
                raise ValueError(f"UniPELT gates prefix, LoRA and bottleneck, not {config!r}")
        super().__init__(*chosen)

    @property
    def mergeable(self) -> bool | str:  # type: ignore[override]
        return "its gates depend on the input, so no weight equals it"

    def parts(self) -> Iterable[tuple[str, MethodConfig]]:
        for key, config in super().parts():
            yield key, Gated(config=config)


@dataclass(frozen=True, kw_only=True)
class Gated(MethodConfig):
    """One method whose modules have a gate each; `UniPELTConfig` makes it."""

    # The method, a prefix, a LoRA or a bottleneck.
    config: MethodConfig

    method: ClassVar[str] = "gated"

    def build(self, sites: SiteMap) -> dict[str, AdapterModule]:
        leaves = {leaf.name: leaf for leaf in sites.leaves()}
        widths = {sublayer.name: sublayer.width for sublayer in sites.sublayers()}
        built: dict[str, AdapterModule] = {}
        for name, module in self.config.build(sites).items():
            like = {key: getattr(next(module.parameters()), key) for key in ("dtype", "device")}
            if isinstance(module, Delta):
                leaf = leaves[name]
                if leaf.raw and not isinstance(leaf.owner, nn.MultiheadAttention):
                    raise ValueError(
                        f"{name}: {sites.architecture} reads this weight itself, so a gate on its "
                        "input cannot act; leave it out with sites=..."
                    )
                built[name] = GatedDelta(module, nn.Linear(leaf.in_features, 1, **like))
            elif isinstance(module, Branch):
                built[name] = GatedBranch(module, nn.Linear(widths[name], 1, **like))
            else:
                assert isinstance(module, Prefix)
                built[name] = GatedPrefix(module, nn.Linear(widths[name], 1, **like))
        return built


class GatedBranch(Branch):
    """branch + G(h) * (inner(branch) - branch), h the sublayer's own input.

    Parameters of `inner` and `gate` (1, D), with a bias.
    """

    def __init__(self, inner: Branch, gate: nn.Linear) -> None:
        super().__init__()
        self.inner, self.gate = inner, gate
        self.reads = inner.reads | {"input"}

    def change(self, branch: Tensor, context: Context) -> Tensor:
        assert context.input is not None
        inner = self.inner(branch, context) - branch
        return (torch.sigmoid(self.gate(context.input)) * inner).to(branch.dtype)


class GatedDelta(Delta):
    """y + G(x) * (inner(y, x) - y). Parameters of `inner` and `gate` (1, in), with a bias."""

    as_weight = False  # type: ignore[assignment]

    def __init__(self, inner: Delta, gate: nn.Linear) -> None:
        super().__init__()
        self.inner, self.gate = inner, gate

    def forward(self, y: Tensor, x: Tensor, leaf: Leaf) -> Tensor:
        change = self.inner(y, x, leaf) - y
        return y + (torch.sigmoid(self.gate(x.to(self.gate.weight.dtype))) * change).to(y.dtype)


class GatedPrefix(Prefix):
    """Adds log G(x) to the scores of the prefix.

    Before the softmax's division, each query gives the prefix G times the weight of a plain one.
    Parameters of `inner` and `gate` (1, D), with a bias.
    """

    def __init__(self, inner: Prefix, gate: nn.Linear) -> None:
        super().__init__()
        self.inner, self.gate = inner, gate

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys, values, _ = self.inner(x)
        return keys, values, F.logsigmoid(self.gate(x)).squeeze(-1)
