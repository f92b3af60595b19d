"""What must be true of a site map, shown with plain torch hooks on the bare model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from families import Family, tensors
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmadapters.sites.sitemap import Block, Leaf, SiteMap, Sublayer
from mmadapters.sites.tables import describe

ATTENTION = {"q", "k", "v", "o", "norm"}
FEED_FORWARD = {"up", "down", "norm"}
SUBLAYERS = (["attn", "ffn"], ["attn", "cross", "ffn"], ["cross", "ffn"])


class Recorder:
    """First inputs and first outputs of modules, in the order of their calls."""

    def __init__(self) -> None:
        self.inputs: dict[nn.Module, list[Tensor]] = {}
        self.outputs: dict[nn.Module, list[Tensor]] = {}

    def hook(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        named = kwargs.get("hidden_states")
        given = (*args, *([named] if named is not None else kwargs.values()))
        first = next((value for value in given if isinstance(value, Tensor)), None)
        if first is not None:
            # A copy: some libraries add to an output in place.
            self.inputs.setdefault(module, []).append(first.clone())
        made = output if isinstance(output, Tensor) else tensors(output)[0]
        self.outputs.setdefault(module, []).append(made.clone())

    def once(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        """Input and output of a module that was called exactly once."""
        calls = self.outputs.get(module, [])
        assert len(calls) == 1, f"{type(module).__name__} was called {len(calls)} times"
        return self.inputs[module][0], calls[0]


def record(model: nn.Module, args: tuple, kwargs: dict) -> Recorder:
    recorder = Recorder()
    handles = [
        module.register_forward_hook(recorder.hook, with_kwargs=True) for module in model.modules()
    ]
    try:
        run(model, args, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return recorder


def run(model: nn.Module, args: tuple, kwargs: dict) -> list[Tensor]:
    """All floating outputs. With gradients, as torch's fast paths skip the hooks otherwise."""
    return [tensor.detach() for tensor in tensors(model(*args, **kwargs))]


def check_complete(sites: SiteMap) -> None:
    """Every block has all its sublayers with all their leaves. A post-norm tower ends in the norm
    of its last block and has none of its own."""
    for tower in sites.towers.values():
        assert tower.blocks
        assert [block.index for block in tower.blocks] == list(range(len(tower.blocks)))
        post_norm = all(part.post_norm for part in tower.blocks[-1].sublayers.values())
        if tower.name != "fusion":
            assert (tower.norm is None) is post_norm, f"{tower.name}: norm"
        for block in tower.blocks:
            assert list(block.sublayers) in SUBLAYERS
            for sublayer in block.sublayers.values():
                assert sublayer.width == tower.width
                expected = FEED_FORWARD if sublayer.kind == "ffn" else ATTENTION
                assert expected <= set(sublayer.leaves), sublayer.name


def check_stream(sites: SiteMap, seen: Recorder) -> None:
    """x + branch is what the next sublayer gets, and the last one's is the block's output."""
    for block in sites.blocks():
        stream, output = seen.once(block.module)
        for sublayer in block.sublayers.values():
            x, _ = seen.once(sublayer.residual)
            torch.testing.assert_close(x, stream, rtol=0, atol=0)
            _, branch = seen.once(sublayer.output)
            stream = x + _layer_scale(block, sublayer) * branch
            if sublayer.post_norm:
                before, stream = seen.once(sublayer.leaves["norm"].module)
                torch.testing.assert_close(before, x + branch, rtol=0, atol=1e-6)
        torch.testing.assert_close(output, stream, rtol=0, atol=1e-6)


def _layer_scale(block: Block, sublayer: Sublayer) -> Tensor | float:
    """What BEiT multiplies a branch by after the last module of it."""
    if "beit" not in type(block.module).__module__:
        return 1.0
    number = 1 if sublayer.kind == "attn" else 2
    for name in (f"lambda_{number}", f"gamma_{number}"):
        if hasattr(block.module, name):
            return getattr(block.module, name)
    raise AssertionError(f"no LayerScale in {type(block.module).__name__}")


def check_order(sites: SiteMap, seen: Recorder) -> None:
    """Each block reads what the one before it wrote."""
    for tower in sites.towers.values():
        if {"decoder", "fusion"} <= set(sites.towers) and tower.name in ("decoder", "fusion"):
            continue
        for before, after in zip(tower.blocks, tower.blocks[1:], strict=False):
            assert torch.equal(seen.once(before.module)[1], seen.once(after.module)[0])


def check_inputs(sites: SiteMap, seen: Recorder) -> None:
    """`input` shows what the sublayer's first linear map reads."""
    for sublayer in sites.sublayers():
        first = sublayer.leaves["up" if sublayer.kind == "ffn" else "q"]
        if first.raw and sublayer.post_norm:
            read = seen.once(sublayer.residual)[0]
        elif first.raw:
            norm = sublayer.leaves["norm"].module
            read = seen.once(norm)[1]
            if sublayer.residual is not norm and not sublayer.post_norm:
                read = seen.once(sublayer.residual)[0]
        else:
            read = seen.once(first.module)[0]
        assert torch.equal(seen.once(sublayer.input)[0], read), sublayer.name


def check_leaves(model: nn.Module, sites: SiteMap, seen: Recorder, family: Family) -> None:
    """A called leaf computes its formula; the rows of a raw one change the output."""
    args, kwargs = family.inputs()
    plain = run(model, args, kwargs)
    for leaf in sites.leaves():
        if not leaf.raw:
            # BLIP's last norm is called twice, on all tokens and again on the first.
            for x, y in zip(seen.inputs[leaf.module], seen.outputs[leaf.module], strict=True):
                part = y.chunk(leaf.parts, dim=-1)[leaf.index]
                torch.testing.assert_close(part, _formula(leaf, x), rtol=1e-5, atol=1e-5)
            continue
        if isinstance(leaf.module, nn.Linear):
            assert leaf.module not in seen.outputs, f"{leaf.name} is called: no need to be raw"
        # Softmax does not see what is added to all keys.
        for part in (leaf.weight, None if leaf.role == "k" else leaf.bias):
            if part is None:
                continue
            with perturbed(part):
                changed = run(model, args, kwargs)
            assert not all(map(torch.equal, plain, changed)), f"{leaf.name} is not read"
    assert all(map(torch.equal, plain, run(model, args, kwargs)))


def _formula(leaf: Leaf, x: Tensor) -> Tensor:
    if leaf.kind == "linear":
        assert leaf.weight is not None
        return F.linear(x, leaf.weight, leaf.bias)
    if hasattr(leaf.module, "variance_epsilon"):
        return F.rms_norm(x, (leaf.in_features,), leaf.weight, leaf.module.variance_epsilon)
    return F.layer_norm(x, (leaf.in_features,), leaf.weight, leaf.bias, leaf.module.eps)


@contextlib.contextmanager
def perturbed(part: Tensor) -> Iterator[None]:
    kept = part.detach().clone()
    with torch.no_grad():
        part.add_(torch.randn_like(part))
    try:
        yield
    finally:
        with torch.no_grad():
            part.copy_(kept)


class AttentionCalls(TorchFunctionMode):
    """Shapes of the queries of every `scaled_dot_product_attention`."""

    def __init__(self) -> None:
        super().__init__()
        self.queries: list[torch.Size] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is F.scaled_dot_product_attention:
            self.queries.append(args[0].shape)
        return func(*args, **(kwargs or {}))


def check_attention(model: nn.Module, sites: SiteMap, family: Family) -> None:
    """Within `attention`, keys and values of all heads are attended to exactly once."""
    args, kwargs = family.inputs()
    found = []
    for sublayer in sites.sublayers():
        if sublayer.kind == "ffn":
            continue
        found.append(sublayer.attention is not None)
        if sublayer.attention is None:
            continue
        calls: list[tuple[torch.Size, torch.Size]] = []
        forward = sublayer.attention.forward

        def watched(*args, forward=forward, calls=calls, **kwargs):  # type: ignore[no-untyped-def]
            x = args[0] if args else kwargs["hidden_states"]
            with AttentionCalls() as mode:
                output = forward(*args, **kwargs)
            calls.extend((x.shape, query) for query in mode.queries)
            return output

        sublayer.attention.forward = watched
        try:
            run(model, args, kwargs)
        finally:
            del sublayer.attention.forward
        if not isinstance(sublayer.attention, nn.MultiheadAttention):
            assert len(calls) == 1, sublayer.name
            (batch, length, _), query = calls[0]
            assert query == (batch, query[1], length, sublayer.width // query[1])
    assert all(found) is ("prefix" in family.traits)


def check_prompts(model: nn.Module, sites: SiteMap, family: Family) -> None:
    """Where the tower allows it, a token may be added behind the others of any block."""
    args, kwargs = family.inputs()
    plain = run(model, args, kwargs)
    allowed = [tower for tower in sites.towers.values() if tower.prompts is None]
    assert bool(allowed) is ("prompt" in family.traits)
    for tower in allowed:
        for block in tower.blocks:
            prompt = torch.randn(1, 1, tower.width)
            before = block.module.register_forward_pre_hook(_append(prompt), with_kwargs=True)
            after = block.module.register_forward_hook(_strip)
            prompted = run(model, args, kwargs)
            before.remove()
            after.remove()
            assert [t.shape for t in prompted] == [t.shape for t in plain]
            assert not all(map(torch.equal, plain, prompted)), block.name


def _append(prompt: Tensor):  # type: ignore[no-untyped-def]
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        def longer(x: Tensor) -> Tensor:
            return torch.cat([x, prompt.expand(len(x), -1, -1)], dim=1)

        if args:
            return (longer(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": longer(kwargs["hidden_states"])}

    return hook


def _strip(module: nn.Module, args: tuple, output: Any) -> Any:
    return output[:, :-1] if isinstance(output, Tensor) else (output[0][:, :-1], *output[1:])


def check_example(model: nn.Module, family: Family) -> None:
    """The example reaches every block and gives finite outputs, for 32 bits and for 16."""
    sites, example = describe(model)
    assert example is not None
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        args, kwargs = example(model)
        seen = record(model, args, kwargs)
        for block in sites.blocks():
            seen.once(block.module)
        outputs = run(model, args, kwargs)
        assert outputs
        assert all(tensor.isfinite().all() for tensor in outputs)


def check_family(family: Family) -> None:
    """Everything about one family's sites."""
    model = family.build()
    sites, _ = describe(model)
    check_complete(sites)
    seen = record(model, *family.inputs())
    check_stream(sites, seen)
    check_order(sites, seen)
    check_inputs(sites, seen)
    check_leaves(model, sites, seen, family)
    check_attention(model, sites, family)
    check_prompts(model, sites, family)
    assert ("raw" in family.traits) is any(leaf.raw for leaf in sites.leaves())
    check_example(model, family)
