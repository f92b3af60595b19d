"""Nothing below the first adapted block records a graph: training costs no more than it must."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families import Family, tensors
from injection.matrix import FAMILIES, adapted, bare, loss_of, towers
from torch import Tensor, nn

import mmadapters
from mmadapters import AdapterModel, BottleneckConfig, ConfigUnion, LoRAConfig


def upper(tower: str) -> ConfigUnion:
    """LoRA and a bottleneck in every block of a tower but the first."""
    sites = (f"{tower}.blocks.[1-9]*",)
    return ConfigUnion(LoRAConfig(rank=2, sites=sites), BottleneckConfig(size=4, sites=sites))


def results_before(model: AdapterModel, block: nn.Module, inputs: tuple) -> list[tuple[str, bool]]:
    """Every module of the encoder that gave something before `block` was entered, in the order of
    running, and whether that was part of a graph; empty if the block was never entered."""
    before: list[tuple[str, bool]] = []
    entered = False

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal entered
        if not entered:
            given = [*tensors(args), *tensors(kwargs)]
            before.append(("input of the block", any(t.requires_grad for t in given)))
        entered = True

    def leave(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            if not entered:
                before.append((name, any(t.requires_grad for t in tensors(output))))

        return hook

    handles = [block.register_forward_pre_hook(enter, with_kwargs=True)]
    for name, module in model.backbone.named_modules():
        if module is not model.backbone:
            handles.append(module.register_forward_hook(leave(name)))
    try:
        args, kwargs = inputs
        outputs = tensors(model(*args, **kwargs))
    finally:
        for handle in handles:
            handle.remove()
    if entered:
        assert any(output.requires_grad for output in outputs)
    return before if entered else []


@pytest.mark.parametrize("train_trunk", [False, True], ids=["trunk-in-eval", "trunk-in-train"])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_nothing_below_the_first_adapted_block_builds_a_graph(
    family: Family, train_trunk: bool
) -> None:
    for tower in towers(family):
        model = mmadapters.init(bare(family), train_trunk=train_trunk)
        model.add_adapter("a", upper(tower))
        model.train_adapter("a")
        block = model.sites.towers[tower].blocks[1].module
        before: list[tuple[str, bool]] = []
        while not before:  # LayerDrop leaves a block out now and then.
            before = results_before(model, block, family.inputs())
        assert len(before) > 5
        assert [name for name, in_graph in before if in_graph] == []


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_fewer_adapted_blocks_build_a_smaller_graph(family: Family) -> None:
    sizes = {}
    for pattern in ("*.blocks.*", "*.blocks.1"):
        model = adapted(family, BottleneckConfig(size=4, sites=(pattern,)))
        model.adapter("a").requires_grad_(True)
        args, kwargs = family.inputs()
        loss = loss_of(t for t in tensors(model(*args, **kwargs)) if t.requires_grad)
        sizes[pattern] = sum(1 for _ in nodes(loss))
    assert 0 < sizes["*.blocks.1"] < sizes["*.blocks.*"]


def nodes(loss: Tensor) -> Iterator[Any]:
    """Every node of the graph behind a tensor."""
    seen: set[Any] = set()
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting.extend(after for after, _ in node.next_functions)


@pytest.mark.parametrize(
    "name", ["hf-wav2vec2", "hf-wav2vec2-stable", "hf-hubert", "hf-wavlm"], ids=str
)
def test_speech_front_end_builds_a_graph_again_once_detached(name: str) -> None:
    model = mmadapters.init(bare(FAMILIES[name]), train_trunk=True)
    model.add_adapter("a", BottleneckConfig(size=4))
    encoder = model.detach().train()
    front = next(m for n, m in encoder.named_modules() if n.endswith("feature_extractor"))
    assert front(torch.randn(1, 4800)).requires_grad
