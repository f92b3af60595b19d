"""`resolve` finds the modules that the specs of an architecture name."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from .sitemap import (
    Block,
    Embedding,
    FrontLayer,
    Leaf,
    Parameter,
    Patches,
    SiteMap,
    Stem,
    Sublayer,
    Tower,
)
from .spec import Architecture, EmbeddingSpec, LeafSpec, SublayerSpec, TowerSpec, Unresolved

_PART = re.compile(r"^(?P<path>[^\[\]]+)(\[(?P<index>\d+)/(?P<parts>\d+)\])?$")


def resolve(module: nn.Module, architecture: Architecture) -> SiteMap:
    """Returns the sites that `architecture` describes on `module`.

    Raises:
        Unresolved: a path does not exist; the message names it.
    """
    towers = {spec.name: _tower(module, spec) for spec in architecture.towers}
    return SiteMap(architecture.library, type(module).__name__, towers)


def _tower(root: nn.Module, spec: TowerSpec) -> Tower:
    modules = _blocks(root, spec.blocks)
    blocks = [_block(module, index, spec) for index, module in enumerate(modules)]
    width = next(iter(blocks[0].sublayers.values())).width
    norm = None
    if spec.norm is not None:
        norm = _leaf(root, f"{spec.name}.norm", spec.norm, None)
    patches = None
    if spec.patches is not None:
        patches = Patches(_module(root, spec.patches.path), spec.patches.num_prefix_tokens)
    front = [] if spec.front is None else _front(root, spec.name, spec.front)
    embedding = None
    if isinstance(spec.embedding, EmbeddingSpec):
        module = _module(root, spec.embedding.path)
        embedding = Embedding(f"{spec.name}.embedding", module, spec.embedding.width)
    return Tower(
        name=spec.name,
        width=width,
        path=spec.blocks,
        blocks=blocks,
        norm=norm,
        prompts=spec.prompts,
        copies=spec.copies,
        batch_first=spec.batch_first,
        front=front,
        runner=None if spec.runner is None else _module(root, spec.runner),
        patches=patches,
        embedding=embedding,
        unembedded=spec.embedding if isinstance(spec.embedding, str) else None,
        stem=_stem(patches, front, [_module(root, path) for path in spec.stem]),
    )


def _stem(patches: Patches | None, front: list[FrontLayer], others: list[nn.Module]) -> list[Stem]:
    """Returns the costly modules before the blocks, in the order of running.

    Patches that no convolution makes are left out: their output is not known beforehand.
    """
    parts: list[tuple[nn.Module, nn.Module | None]] = []
    if patches is not None and isinstance(patches.module, nn.Conv2d):
        parts.append((patches.module, patches.module))
    for layer in front:
        convolution = next(m for m in layer.module.modules() if isinstance(m, nn.Conv1d))
        parts.append((layer.module, convolution))
    for module in others:
        parts.append((module, module if isinstance(module, (nn.Conv1d, nn.Conv2d)) else None))
    return [Stem(index, *pair) for index, pair in enumerate(parts)]


def _front(root: nn.Module, tower: str, path: str) -> list[FrontLayer]:
    layers = []
    for index, layer in enumerate(_module(root, path).children()):
        conv = next((part for part in layer.modules() if isinstance(part, nn.Conv1d)), None)
        if conv is None:
            raise Unresolved(f"{type(layer).__name__} at {path}.{index} has no nn.Conv1d")
        layers.append(FrontLayer(f"{tower}.front.{index}", index, layer, conv.out_channels))
    return layers


def _blocks(root: nn.Module, pattern: str) -> list[nn.Module]:
    if "*" not in pattern:
        modules = list(_module(root, pattern).children())
    else:
        expression = re.compile(re.escape(pattern).replace(r"\*", r"[^.]+") + "$")
        modules = [module for name, module in root.named_modules() if expression.match(name)]
    if not modules:
        raise Unresolved(f"no blocks at {pattern!r} in {type(root).__name__}")
    return modules


def _block(module: nn.Module, index: int, spec: TowerSpec) -> Block:
    sublayers = {}
    for key, part in spec.sublayers.items():
        tower = spec.names.get(key, spec.name)
        name = f"{tower}.blocks.{index}.{key}"
        try:
            sublayers[key] = _sublayer(module, name, key, part)
        except Unresolved:
            if key not in spec.optional:
                raise
    return Block(f"{spec.name}.blocks.{index}", index, module, sublayers)


def _sublayer(block: nn.Module, name: str, key: str, spec: SublayerSpec) -> Sublayer:
    output = _module(block, spec.output)
    residual = _module(block, spec.residual)
    reads = output if spec.input is None else _module(block, spec.input)
    attention = None if spec.attention is None else _module(block, spec.attention)
    written: dict[str, str | LeafSpec] = dict(spec.leaves)
    if spec.norm is not None:
        written["norm"] = spec.norm
    owner = attention if spec.owner is None else _module(block, spec.owner)
    leaves = {role: _leaf(block, f"{name}.{role}", leaf, owner) for role, leaf in written.items()}
    kind = spec.kind or key
    if kind not in ("attn", "cross", "ffn"):
        raise ValueError(f"{name}: a sublayer's kind is 'attn', 'cross' or 'ffn', not {kind!r}")
    return Sublayer(
        name=name,
        kind=kind,  # type: ignore[arg-type]
        width=_width(name, leaves),
        output=output,
        residual=residual,
        input=reads,
        attention=attention,
        post_norm=spec.post_norm,
        leaves=leaves,
    )


def _width(name: str, leaves: Mapping[str, Leaf]) -> int:
    for role in ("o", "down"):
        if role in leaves:
            return leaves[role].out_features
    for role in ("q", "up"):
        if role in leaves:
            return leaves[role].in_features
    if "norm" in leaves:
        return leaves["norm"].in_features
    raise ValueError(f"{name}: give at least one of the leaves o, down, q, up or norm")


def _leaf(root: nn.Module, name: str, spec: str | LeafSpec, attention: nn.Module | None) -> Leaf:
    path, index, parts = _parse(spec.path if isinstance(spec, LeafSpec) else spec)
    holder_path, _, attribute = path.rpartition(".")
    holder = _module(root, holder_path)
    if isinstance(holder._parameters.get(attribute), nn.Parameter):
        return _raw_leaf(root, name, spec, holder, attribute, (index, parts), attention)
    module = _module(root, path)
    weight = module._parameters.get("weight")
    weight_at = None if weight is None else Parameter(module, "weight")
    bias_at = None if module._parameters.get("bias") is None else Parameter(module, "bias")
    if weight is not None and weight.dim() == 1:
        return Leaf(name, "norm", module, weight_at, bias_at, len(weight), len(weight))
    if weight is None:
        shape = getattr(module, "normalized_shape", None)
        if not shape:
            raise Unresolved(f"{name}: {type(module).__name__} at {path!r} has no weight")
        return Leaf(name, "norm", module, None, bias_at, shape[-1], shape[-1])
    if weight.dim() != 2:
        raise Unresolved(f"{name}: the weight at {path!r} is not that of a linear map")
    assert weight_at is not None
    out, into = weight.shape
    if parts > 1:
        weight_at, out = _rows(weight_at, index, parts), out // parts
        bias_at = None if bias_at is None else _rows(bias_at, index, parts)
    return Leaf(name, "linear", module, weight_at, bias_at, into, out, False, index, parts)


def _raw_leaf(
    root: nn.Module,
    name: str,
    spec: str | LeafSpec,
    holder: nn.Module,
    attribute: str,
    part: tuple[int, int],
    attention: nn.Module | None,
) -> Leaf:
    index, parts = part
    weight_at = Parameter(holder, attribute)
    if weight_at.whole.dim() != 2:
        raise Unresolved(f"{name}: {attribute!r} is not the weight of a linear map")
    out, into = weight_at.whole.shape
    bias_at = None
    if isinstance(spec, LeafSpec):
        if spec.bias is not None:
            bias_holder, _, bias_attribute = spec.bias.rpartition(".")
            bias_at = Parameter(_module(root, bias_holder), bias_attribute)
    else:
        beside = attribute.removesuffix("weight") + "bias"
        if holder._parameters.get(beside) is not None:
            bias_at = Parameter(holder, beside)
            if parts > 1:
                bias_at = _rows(bias_at, index, parts)
    if parts > 1:
        weight_at, out = _rows(weight_at, index, parts), out // parts
    owner = attention if attention is not None else holder
    return Leaf(name, "linear", holder, weight_at, bias_at, into, out, True, index, parts, owner)


def _rows(whole: Parameter, index: int, parts: int) -> Parameter:
    step = whole.whole.shape[0] // parts
    return Parameter(whole.module, whole.attribute, index * step, (index + 1) * step)


def _parse(path: str) -> tuple[str, int, int]:
    match = _PART.match(path)
    if match is None:
        raise ValueError(f"{path!r} is not a leaf: write a path, or a part of one as 'qkv[0/3]'")
    return match["path"], int(match["index"] or 0), int(match["parts"] or 1)


def _module(root: nn.Module, path: str) -> nn.Module:
    module = root
    for step in path.split(".") if path else ():
        child = module._modules.get(step)
        if child is None:
            raise Unresolved(f"{type(root).__name__} has no module {path!r} (at {step!r})")
        module = child
    return module
