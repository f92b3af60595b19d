"""Sums and averages of the parameters of adapters, which make one adapter of several.

    linear   p = p_0 + sum_i w_i (p_i - p_0)            every parameter of any method
    concat   B = [w_1 c_1 B_1, w_2 c_2 B_2, ...], A = [A_1; A_2; ...]           LoRA
    svd      the rank-r matrix nearest to sum_i w_i c_i B_i A_i                 LoRA

p_0 is the constant at which a parameter starts. It is 1 for the scales of IA3 and SSF, for the gain
of a LayerNorm before a bottleneck, and for the gain and the running variance of a batch norm. It is
the config's `scale` for a learned scale, and 0 for all else. So a weight scales an adapter's *task
vector* (Ilharco et al. 2023): [1, 1] adds two, [1, -1] subtracts one.

The meaning of `linear` depends on the method:

    IA3, SSF, BitFit          the encoder's weights and biases change by exactly the weighted sum
    bottlenecks, Compacter,   a plain sum where the start is random (down-projections, tokens,
    convolutions, prefixes,   convolutions), so that an average is useful for adapters that started
    prompts, gates            from the same values, as in model soups (Wortsman et al. 2022)
    LoRA                      A and B are summed, not B A, so that weights must sum to 1: the weight
                              -1 alone would turn both signs and change nothing
    RepAdapter, FacT          the same: the factors are summed, not their product
    DoRA                      the same; and magnitudes start at ||W||, which adapters do not know
    Conformer adapters        means and variances are summed too, so that no weight may be negative

`concat` and `svd` sum B A itself, for any weights.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Literal, NoReturn

import torch
from torch import Tensor

from ..methods import (
    BottleneckConfig,
    ConformerAdapterConfig,
    DoRAConfig,
    FacTConfig,
    IA3Config,
    LAdapterConfig,
    LoRAConfig,
    MethodConfig,
    MonaConfig,
    RepAdapterConfig,
    SSFConfig,
)
from ..methods.lora import LoRA
from ..methods.select import check_choice, check_count, check_number
from ..methods.union import Gated
from .adapter import Adapter

How = Literal["linear", "concat", "svd"]
HOWS: tuple[How, ...] = ("linear", "concat", "svd")
# Options that act in training alone, so that adapters with different values may be summed.
_TRAINING_ONLY = ("dropout", "drop_path")


@torch.no_grad()
def combined(
    adapters: Sequence[Adapter],
    names: Sequence[str],
    weights: Sequence[float],
    *,
    how: How = "linear",
    rank: int | None = None,
) -> tuple[MethodConfig, dict[str, Tensor]]:
    """Returns the config and the tensors, by the keys of `Adapter.tensors`, of sum_i w_i adapter_i.

    The head of this file has the formulas. Sums are computed in float32 or wider. They have the
    dtype and the device of the first adapter's tensors and share no memory with them. Dropout and
    drop path are the first adapter's.

    Args:
        names: the adapters' names, for messages.
        weights: one number for each adapter, of any sign.
        how: "linear" is for adapters of equal structure. "concat" is for LoRAs whose rank, alpha
            and rslora may differ: the result is exact, its rank is the sum of their ranks, and
            c = 1; a linear map that only some have counts as unchanged in the others. "svd" does
            the same at a given rank: no matrix of that rank is nearer in the Frobenius or the
            spectral norm (Eckart and Young 1936, Mirsky 1960); the error is the singular values
            left out. Each singular value is split evenly, as its root, between A and B.
        rank: the rank for "svd", at least 1; by default the largest of the members' ranks.

    Raises:
        ValueError: the adapters cannot be combined in this way; the message names two of them, the
            first difference, and a way out. Or a weight or a parameter is not finite.
    """
    check_choice("how", how, HOWS)
    if not adapters:
        raise ValueError("there is nothing to combine: name at least one adapter")
    if len(weights) != len(adapters):
        raise ValueError(
            f"{len(weights)} weights are given for {len(adapters)} adapters: give one for each"
        )
    for name, weight in zip(names, weights, strict=True):
        check_number(f"the weight of adapter {name!r}", weight)
    weights = [float(weight) for weight in weights]
    if rank is not None:
        check_count("rank", rank)
        if how != "svd":
            raise ValueError(f"rank={rank} is for how='svd': leave it out with how={how!r}")
    for name, adapter in zip(names, adapters, strict=True):
        for key, tensor in adapter.tensors().items():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"adapter {name!r}: {key} holds values that are not finite")
    if how == "linear":
        return _linear(adapters, names, weights)
    return _low_rank(adapters, names, weights, how, rank)


def _linear(
    adapters: Sequence[Adapter], names: Sequence[str], weights: Sequence[float]
) -> tuple[MethodConfig, dict[str, Tensor]]:
    config = adapters[0].config
    for name, adapter in zip(names[1:], adapters[1:], strict=True):
        _check_equal_structure(adapters[0], adapter, names[0], name)
    _check_variances(config, weights)
    total = math.fsum(weights)
    if not math.isclose(total, 1.0, abs_tol=1e-6):
        _check_any_weights(config, total)
    parts = dict(config.parts())
    members = [adapter.tensors() for adapter in adapters]
    summed: dict[str, Tensor] = {}
    for key, first in members[0].items():
        start = _start(parts, key)
        value = weights[0] * _wide(first)
        for weight, tensors in zip(weights[1:], members[1:], strict=True):
            value += weight * _wide(tensors[key])
        # Not summed as differences: those would round, and an average of equals keeps its bits.
        if start:
            value += (1.0 - total) * start
        summed[key] = value.to(first.dtype)
    return config, summed


def _start(parts: dict[str, MethodConfig], key: str) -> float:
    """Returns the constant at which a parameter starts, 0 if it has none.

    Args:
        parts: the configs of the adapter's methods, by the name that stands behind `#` in keys.
        key: the parameter's key in `Adapter.tensors`.
    """
    part, parameter = key.split("#")[1].rsplit("/", 1)
    config, parameter = _ungated(parts[part]), parameter.removeprefix("inner.")
    if isinstance(config, (IA3Config, SSFConfig)) and parameter == "scale":
        return 1.0
    if isinstance(config, ConformerAdapterConfig):
        ones = ("norm.weight", "batch_norm.weight", "batch_norm.running_var")
        return 1.0 if parameter in ones else 0.0
    if isinstance(config, LAdapterConfig) and not config.residual:
        return 1.0 if re.fullmatch(r"norms\.\d+\.weight", parameter) else 0.0
    if isinstance(config, MonaConfig):
        return {"norm.weight": 1.0, "gain": 1e-6, "gain_x": 1.0}.get(parameter, 0.0)
    if isinstance(config, BottleneckConfig):
        return {"norm_before.weight": 1.0, "scale": config.scale}.get(parameter, 0.0)
    return 0.0


def _ungated(part: MethodConfig) -> MethodConfig:
    return part.config if isinstance(part, Gated) else part


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _check_any_weights(config: MethodConfig, total: float) -> None:
    """Raises ValueError for methods whose weights must sum to 1."""
    for _, part in config.parts():
        method = _ungated(part)
        if isinstance(method, DoRAConfig):
            raise ValueError(
                f"the weights sum to {total:g}, but must sum to 1 for DoRA, whose magnitudes start "
                "at the lengths of frozen rows, which an adapter does not know; give such weights"
            )
        if isinstance(method, LoRAConfig):
            instead = "use how='concat' or how='svd', which sum the products B A"
            raise ValueError(
                f"the weights sum to {total:g}, but must sum to 1 where how='linear' sums LoRA's "
                f"factors A and B; {instead if config is method else 'give such weights'}"
            )
        if isinstance(method, (RepAdapterConfig, FacTConfig)):
            raise ValueError(
                f"the weights sum to {total:g}, but must sum to 1 where how='linear' sums the "
                f"factors of {method.method}, whose product is what acts; give such weights"
            )


def _check_variances(config: MethodConfig, weights: Sequence[float]) -> None:
    """Raises ValueError if a negative weight could make a variance negative."""
    if min(weights) < 0 and any(isinstance(p, ConformerAdapterConfig) for _, p in config.parts()):
        raise ValueError(
            f"a weight is {min(weights):g}, but must be at least 0 for a Conformer adapter, whose "
            "batch norm holds variances, which cannot be subtracted from one another"
        )


def _check_equal_structure(first: Adapter, other: Adapter, name: str, other_name: str) -> None:
    """Raises ValueError unless both have the same method, options and shapes."""
    different = _difference(first.config, other.config)
    if different is not None:
        option, here, there = different
        both_lora = _is_lora(first.config) and _is_lora(other.config)
        raise ValueError(
            f"adapters {name!r} and {other_name!r} cannot be summed by how='linear': {option} is "
            f"{here!r} in {name!r} and {there!r} in {other_name!r}; "
            + ("use how='concat' or how='svd'" if both_lora else "it must be the same in both")
        )
    here, there = first.tensors(), other.tensors()
    for key in (*here, *there):
        if key not in here or key not in there or here[key].shape != there[key].shape:
            _refuse_other_encoder(name, other_name, key)


def _refuse_other_encoder(name: str, other_name: str, where: str) -> NoReturn:
    raise ValueError(
        f"adapters {name!r} and {other_name!r} cannot be combined: they differ in the shape or "
        f"presence of {where}, as those of different encoders do; combine adapters of one"
    )


def _difference(first: MethodConfig, other: MethodConfig) -> tuple[str, object, object] | None:
    """Returns the first option that differs and its two values, or None if all are equal."""
    if first.method != other.method:
        return "method", first.method, other.method
    parts, other_parts = dict(first.parts()), dict(other.parts())
    if list(parts) != list(other_parts):
        return "the list of methods", list(parts), list(other_parts)
    for key, part in parts.items():
        here, there = _options(_ungated(part)), _options(_ungated(other_parts[key]))
        of = "" if part is first else f" of {key}"
        for option, value in here.items():
            if value != there[option]:
                return option + of, value, there[option]
    return None


def _options(config: MethodConfig) -> dict[str, object]:
    """Returns the options that bear on the shapes or the meaning of parameters.

    Sites and targets are sorted, as their order does not matter. LoRA's factor c stands for the
    options that it is computed from.
    """
    options = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in _TRAINING_ONLY
    }
    for name in ("sites", "targets"):
        if name in options:
            options[name] = tuple(sorted(set(options[name])))
    if isinstance(config, LoRAConfig):
        del options["alpha"], options["rslora"]
        options["scaling"] = config.scaling
    return options


def _is_lora(config: MethodConfig) -> bool:
    return isinstance(config, LoRAConfig) and not isinstance(config, DoRAConfig)


def _low_rank(
    adapters: Sequence[Adapter],
    names: Sequence[str],
    weights: Sequence[float],
    how: How,
    rank: int | None,
) -> tuple[MethodConfig, dict[str, Tensor]]:
    for name, adapter in zip(names, adapters, strict=True):
        if not _is_lora(adapter.config):
            raise ValueError(
                f"how={how!r} takes LoRA adapters alone, whose changes are low-rank matrices, and "
                f"{name!r} is of method {adapter.config.method!r}; use how='linear'"
            )
    configs = [adapter.config for adapter in adapters if isinstance(adapter.config, LoRAConfig)]
    ranks = [config.rank for config in configs]
    if rank is not None and rank > sum(ranks):
        raise ValueError(
            f"rank {rank} is more than the {sum(ranks)} that a sum of ranks "
            f"{' + '.join(map(str, ranks))} can have; use at most that"
        )
    members = [_loras(adapter) for adapter in adapters]
    config = _covering(configs, members, names)
    kept = sum(ranks) if how == "concat" else rank or max(ranks)
    summed: dict[str, Tensor] = {}
    for site in dict.fromkeys(site for loras in members for site in loras):
        a, b = _stacked(site, members, ranks, weights, names)
        widest = min(a.shape[1], b.shape[0])
        if kept > widest:
            raise ValueError(
                f"rank {kept} is larger than {site} is wide ({a.shape[1]} -> {b.shape[0]}); use "
                f"how='svd' with a rank of at most {widest}"
            )
        if how == "svd":
            a, b = _truncated(a, b, kept)
        like = next(loras[site] for loras in members if site in loras).a
        summed[f"{site}#{config.method}/a"] = a.to(like.dtype)
        summed[f"{site}#{config.method}/b"] = b.to(like.dtype)
    return dataclasses.replace(config, rank=kept, alpha=None, rslora=False), summed


def _loras(adapter: Adapter) -> dict[str, LoRA]:
    return {site: module for site, module in adapter.entries() if isinstance(module, LoRA)}


def _covering(
    configs: Sequence[LoRAConfig], members: Sequence[dict[str, LoRA]], names: Sequence[str]
) -> LoRAConfig:
    """Returns the first config with targets and sites that cover the linear maps of all members.

    Raises:
        ValueError: no config covers these linear maps and no others.
    """
    first = configs[0]
    for name, config, loras in zip(names[1:], configs[1:], members[1:], strict=True):
        if loras.keys() == members[0].keys():
            continue
        one = min(loras.keys() ^ members[0].keys())
        here, there = _options(first), _options(config)
        if here["targets"] == there["targets"] and here["sites"] == there["sites"]:
            _refuse_other_encoder(names[0], name, one)
        # Unions of both would also cover the targets of one at the sites of the other.
        if len({_options(c)["targets"] for c in configs}) > 1 and (
            len({_options(c)["sites"] for c in configs}) > 1
        ):
            raise ValueError(
                f"adapters {names[0]!r} and {name!r} cannot be combined: only one of them acts on "
                f"{one}, and no LoRAConfig covers just the linear maps of both, as they differ in "
                "targets and in sites; combine adapters that share one of these"
            )
        return dataclasses.replace(
            first,
            targets=tuple(dict.fromkeys(target for c in configs for target in c.targets)),
            sites=tuple(dict.fromkeys(pattern for c in configs for pattern in c.sites)),
        )
    return first


def _stacked(
    site: str,
    members: Sequence[dict[str, LoRA]],
    ranks: Sequence[int],
    weights: Sequence[float],
    names: Sequence[str],
) -> tuple[Tensor, Tensor]:
    """Returns A (R, in) and B (out, R) of the weighted sum at one linear map.

    R is the sum of the ranks.
    """
    like, like_name = next(
        (loras[site], name) for loras, name in zip(members, names, strict=True) if site in loras
    )
    rows, columns = [], []
    for loras, rank, weight, name in zip(members, ranks, weights, names, strict=True):
        if site in loras:
            lora = loras[site]
            rows.append(_wide(lora.a))
            columns.append(weight * lora.scaling * _wide(lora.b))
            if lora.a.shape[1] != like.a.shape[1] or lora.b.shape[0] != like.b.shape[0]:
                _refuse_other_encoder(like_name, name, site)
        else:
            rows.append(_wide(like.a.new_zeros(rank, like.a.shape[1])))
            columns.append(_wide(like.b.new_zeros(like.b.shape[0], rank)))
    return torch.cat(rows), torch.cat(columns, dim=1)


def _truncated(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Returns A (rank, in) and B (out, rank) whose product is nearest to b a.

    The given ones are a (R, in) and b (out, R).

    With b = Q_b R_b and a^T = Q_a R_a, the singular values of b a are those of the small R_b R_a^T;
    no (out, in) matrix is made.
    """
    q_a, r_a = torch.linalg.qr(a.T)
    q_b, r_b = torch.linalg.qr(b)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * (vh[:rank] @ q_a.T), (q_b @ u[:, :rank]) * root
