"""Adapters under what torch does to a model: compile, export, autocast, threads, processes."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from families import Family, tensors
from forked import fork_server
from injection import two_processes
from injection.matrix import (
    FAMILIES,
    METHODS,
    adapted,
    bare_outputs,
    config_for,
    distance,
    equal,
    loss_of,
    refusal,
    run,
    train,
)
from torch import Tensor

import mmadapters
from mmadapters import AdapterModel, BottleneckConfig, Stack

FEW = [FAMILIES[name] for name in ("timm-vit", "hf-vit", "open_clip-clip", "hf-wav2vec2-stable")]
PAIRS = [
    (family, method)
    for family in FEW
    for method in ("bottleneck-after", "lora", "prefix", "prompt")
    if refusal(family, method) is None
]
# Compiling takes seconds: every method in one family, and elsewhere what is read inside.
COMPILED = [
    pair
    for pair in PAIRS
    if pair[0].name == "timm-vit"
    or (pair[0].name, pair[1])
    in {("hf-vit", "prefix"), ("open_clip-clip", "lora"), ("open_clip-clip", "prefix")}
]
each_pair = pytest.mark.parametrize(
    ("family", "method"), PAIRS, ids=[f"{family.name}-{method}" for family, method in PAIRS]
)
each_family = pytest.mark.parametrize("family", FEW, ids=lambda family: family.name)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def trained(family: Family, method: str) -> AdapterModel:
    model = adapted(family, config_for(family, method))
    train(model, family.inputs(), steps=2)
    model.adapter("a").requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("family", "method"), COMPILED, ids=[f"{family.name}-{method}" for family, method in COMPILED]
)
def test_compiled_model_gives_the_same_and_follows_every_change(
    family: Family, method: str
) -> None:
    model = trained(family, method)
    model.add_adapter("later", METHODS["par_bn"])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    active = run(model, family)
    assert distance(run(compiled, family), active) <= 1e-6
    model.set_active_adapters(None)
    assert distance(run(compiled, family), bare_outputs(family)) <= 1e-6
    model.set_active_adapters("a")
    assert distance(run(compiled, family), active) <= 1e-6
    with model.using(None):
        assert distance(run(compiled, family), bare_outputs(family)) <= 1e-6


@each_family
def test_adapter_added_after_compiling_acts(family: Family) -> None:
    model = mmadapters.init(copy.deepcopy(trained(family, "lora").detach()))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    before = run(compiled, family)
    assert distance(before, bare_outputs(family)) <= 1e-6
    for method in ("bottleneck", "lora"):
        model.add_adapter(method, METHODS[method])
        with torch.no_grad():
            for parameter in model.adapter(method).parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.set_active_adapters(method)
        after = run(compiled, family)
        assert distance(after, before) > 1e-3
        assert distance(after, run(model, family)) <= 1e-6
        model.delete_adapter(method)
        assert distance(run(compiled, family), before) <= 1e-6


@pytest.mark.parametrize("copied", ["made apart", "deepcopied", "pickled"])
def test_models_compiled_one_after_another_each_have_their_own_adapters(copied: str) -> None:
    family = FAMILIES["timm-vit"]
    last = adapted(family, BottleneckConfig(size=4, sites=("vision.blocks.1",)))
    torch.compile(last, fullgraph=True, backend="eager")(*family.inputs()[0])
    if copied == "made apart":
        other = mmadapters.init(family.build())
    else:
        other = copy.deepcopy(last) if copied == "deepcopied" else pickle.loads(pickle.dumps(last))
        other.delete_adapter("a")
    other.add_adapter("a", BottleneckConfig(size=4))
    other.train_adapter("a")
    with torch.no_grad():
        for parameter in other.adapter("a").parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    compiled = torch.compile(other, fullgraph=True, backend="eager")
    args, kwargs = family.inputs()
    found, wanted = tensors(compiled(*args, **kwargs)), tensors(other(*args, **kwargs))
    assert distance(found, wanted) <= 1e-6
    loss_of(t for t in found if t.requires_grad).backward()
    assert all(parameter.grad is not None for parameter in other.adapter("a").parameters())


def test_model_compiled_by_inductor_gives_the_same() -> None:
    family = FAMILIES["timm-vit"]
    model = trained(family, "lora")
    compiled = torch.compile(model, fullgraph=True)
    assert distance(run(compiled, family), run(model, family)) <= 1e-5


@pytest.mark.parametrize("name", ["timm-vit", "open_clip-clip"])
def test_compiled_training_step_gives_the_same_gradients(name: str) -> None:
    family = FAMILIES[name]
    model = adapted(family, METHODS["union"])
    train(model, family.inputs(), steps=1)
    model.adapter("a").requires_grad_(True)
    args, kwargs = family.inputs()
    gradients = []
    for module in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        loss_of(t for t in tensors(module(*args, **kwargs)) if t.requires_grad).backward()
        gradients.append([p.grad for p in model.adapter("a").parameters()])
    assert distance(gradients[1], gradients[0]) <= 1e-4


@each_pair
def test_exported_model_gives_the_same(family: Family, method: str) -> None:
    model = trained(family, method)
    args, kwargs = family.inputs()
    with torch.no_grad():
        program = torch.export.export(model, args, kwargs, strict=False)
        exported = tensors(program.module()(*args, **kwargs))
    assert distance(exported, run(model, family)) <= 1e-5
    assert distance(exported, bare_outputs(family)) > 1e-4


@pytest.mark.parametrize(
    ("family", "method"),
    [
        pytest.param(family, method, id=f"{family.name}-{method}")
        for family in FEW
        for method in METHODS
        if METHODS[method].identity is True and refusal(family, method) is None
    ],
)
def test_fresh_adapter_under_autocast_leaves_output_bitwise_equal(
    family: Family, method: str
) -> None:
    model = adapted(family, config_for(family, method))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fresh = run(model, family)
        with model.using(None):
            assert equal(fresh, run(model, family))


@each_pair
def test_training_under_autocast_reaches_every_parameter(family: Family, method: str) -> None:
    model = adapted(family, config_for(family, method))
    model.train_adapter("a")
    optimizer = torch.optim.Adam(model.adapter("a").parameters(), lr=1e-2)
    args, kwargs = family.inputs()
    reached: set[str] = set()
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = tensors(model(*args, **kwargs))
        loss_of(output for output in outputs if output.requires_grad).backward()
        optimizer.step()
        for parameter, p in model.named_parameters():
            if p.grad is not None and p.grad.ne(0).any():
                reached.add(parameter)
    assert reached == {f"adapters.a.{name}" for name, _ in model.adapter("a").named_parameters()}


@each_family
def test_several_adapters_are_held_at_once_and_stack_in_order(family: Family) -> None:
    model = mmadapters.init(copy.deepcopy(trained(family, "lora").detach()))
    alone: dict[str, list[Tensor]] = {}
    for name, method in (("one", "bottleneck-after"), ("two", "lora"), ("three", "adaptformer")):
        model.add_adapter(name, METHODS[method])
        with torch.no_grad():
            for parameter in model.adapter(name).parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.set_active_adapters(name)
        alone[name] = run(model, family)
        assert distance(alone[name], bare_outputs(family)) > 1e-4
    for name, output in alone.items():
        with model.using(name):
            assert equal(run(model, family), output)
    model.set_active_adapters(Stack("one", "three"))
    forth = run(model, family)
    model.set_active_adapters(["three", "one"])
    assert distance(run(model, family), forth) > 1e-5


def test_stack_applies_each_adapter_to_what_the_one_before_left() -> None:
    family = FAMILIES["timm-vit"]
    model = mmadapters.init(copy.deepcopy(trained(family, "lora").detach()))
    config = mmadapters.BottleneckConfig(size=4, sites=("vision.blocks.1.ffn",))
    for name in ("first", "second"):
        model.add_adapter(name, config)
        with torch.no_grad():
            for parameter in model.adapter(name).parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    branches: list[Tensor] = []
    handle = model.backbone.blocks[1].drop_path2.register_forward_hook(
        lambda _, __, output: branches.append(output)
    )
    with model.using(None):
        run(model, family)
    with model.using(["first", "second"]):
        run(model, family)
    handle.remove()
    x, stacked = branches
    for name in ("first", "second"):
        ((_, part),) = model.adapter(name).entries()
        x = x + part.up(torch.relu(part.down(x)))
    torch.testing.assert_close(stacked, x.detach(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("method", ["lora", "bottleneck-after", "prefix"])
@each_family
def test_threads_use_different_adapters_at_once_and_never_mix(family: Family, method: str) -> None:
    model = trained(family, method)
    model.add_adapter("b", config_for(family, method))
    with torch.no_grad():
        for parameter in model.adapter("b").parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    expected = {}
    for name in ("a", "b", None):
        with model.using(name):
            expected[name] = run(model, family)
    model.set_active_adapters("b")
    start = threading.Barrier(4)
    wrong: list[object] = []

    def hammer(setups: tuple[str | None, ...]) -> None:
        try:
            start.wait(timeout=60)
            for round_ in range(12):
                setup = setups[round_ % len(setups)]
                with model.using(setup):
                    if not equal(run(model, family), expected[setup]):
                        wrong.append(setup)
                if not equal(run(model, family), expected["b"]):
                    wrong.append("outside")
        except Exception as error:  # Told to the main thread, which fails on it.
            wrong.append(error)

    threads = [
        threading.Thread(target=hammer, args=(setups,))
        for setups in (("a",), ("b",), (None,), ("a", None, "b"))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


def test_copies_of_a_model_are_independent_in_what_acts() -> None:
    family = FAMILIES["open_clip-clip"]
    model = trained(family, "lora")
    twin = copy.deepcopy(model)
    twin.set_active_adapters(None)
    assert equal(run(twin, family), bare_outputs(family))
    assert not equal(run(model, family), bare_outputs(family))
    with twin.using("a"):
        assert equal(run(twin, family), run(model, family))


def test_two_processes_give_the_gradients_of_one(tmp_path: Path) -> None:
    x = torch.randn(4, 5, two_processes.WIDTH)
    model = two_processes.small_model()
    expected = two_processes.gradients(model, model.adapter("a"), x)
    address = (tmp_path / "store").as_uri()
    fork_server()
    start = partial(mp.start_processes, nprocs=2, start_method="forkserver")
    start(two_processes.worker, args=(address, x, tmp_path))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert list(found) == list(expected)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)
