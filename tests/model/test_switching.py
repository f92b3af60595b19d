"""Going from one adapter to another costs next to nothing, and is safe between threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families.small import output, randomise, small_vit
from injection.matrix import FAMILIES, bare, distance, equal, run
from timing import ratio
from torch import Tensor

import mmadapters
from mmadapters import (
    AdapterModel,
    Average,
    DoubleSeqBnConfig,
    Fuse,
    IA3Config,
    LoRAConfig,
    MethodConfig,
    Parallel,
    PrefixConfig,
    Route,
    SeqBnConfig,
    Split,
    SSFConfig,
    Stack,
    init,
)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def two(config: MethodConfig, **options: Any) -> AdapterModel:
    """A small vision transformer with random adapters a and b of one config."""
    model = init(small_vit(**options))
    for name in ("a", "b"):
        model.add_adapter(name, config)
        randomise(model.adapter(name))
    return model


def test_switching_between_adapters_of_24_sites_takes_a_fiftieth_of_a_forward_pass() -> None:
    model = two(DoubleSeqBnConfig(size=4), depth=12)
    assert len(dict(model.adapter("a").entries())) == 24
    setups: list[Any] = ["a", "b", Route(["a", "b"]), Average("a", "b"), None]
    outputs = []
    for setup in setups:  # Plans are made once.
        model.set_active_adapters(setup)
        outputs.append(output(model))
    assert all(not torch.equal(outputs[0], other) for other in outputs[1:])

    def switch() -> None:
        for setup in setups:
            model.set_active_adapters(setup)

    def use() -> None:
        for setup in setups:
            with model.using(setup):
                pass

    # A tenth of a millisecond where a pass over the two images takes five.
    for act in (switch, use):
        each = ratio(act, lambda: output(model), repeats=50) / len(setups)
        assert each <= 1 / 50


METHODS = {
    "double_seq_bn": DoubleSeqBnConfig(size=4),
    "lora": LoRAConfig(rank=2, targets=("q", "v", "up")),
    "ia3": IA3Config(targets=("k", "v", "down")),
    "ssf": SSFConfig(),
    "prefix": PrefixConfig(length=2),
}


class Counting:
    """The eager backend of torch.compile, counting what it is given."""

    def __init__(self) -> None:
        self.compiled = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        self.compiled += 1
        return graph.forward


@pytest.mark.parametrize("name", ["timm-vit", "hf-vit", "hf-bert"])
@pytest.mark.parametrize("method", METHODS)
def test_compiled_model_switches_between_adapters_of_one_shape_without_compiling_anew(
    name: str, method: str
) -> None:
    family = FAMILIES[name]
    model = mmadapters.init(bare(family))
    for adapter in ("a", "b"):
        model.add_adapter(adapter, METHODS[method])
        randomise(model.adapter(adapter))
    expected = {}
    for adapter in ("a", "b"):
        with model.using(adapter):
            expected[adapter] = run(model, family)
    assert distance(expected["a"], expected["b"]) > 1e-3
    backend = Counting()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for adapter in "abab":
        model.set_active_adapters(adapter)
        assert distance(run(compiled, family), expected[adapter]) <= 1e-6
    assert backend.compiled == 1
    model.set_active_adapters(None)
    assert distance(run(compiled, family), expected["a"]) > 1e-3
    assert backend.compiled == 2


@pytest.mark.parametrize(
    "setups",
    [
        (Fuse("a", "b"), Fuse("b", "a")),
        (Average("a", "b", weights=(1, 3)), Average("b", "a", weights=(1, 3))),
        (Stack("a", "b"), Stack("b", "a")),
        (Route(["a", "b"]), Route(["b", "a"])),
        (Route(["a", "base"]), Route(["b", "base"])),
        (Split("a", "b", splits=(1,)), Split("b", "a", splits=(1,))),
        (Parallel("a", "b"), Parallel("b", "a")),
    ],
    ids=lambda setups: type(setups[0]).__name__,
)
def test_compiled_model_follows_every_composition(setups: tuple[Any, Any]) -> None:
    model = two(SeqBnConfig(size=4))
    for members in (["a", "b"], ["b", "a"]):
        model.add_adapter_fusion(members)
    randomise(model.fusions)
    expected = []
    for setup in setups:
        with model.using(setup):
            expected.append(output(model))
    assert not torch.allclose(*expected, atol=1e-4)
    backend = Counting()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for _ in range(2):
        for setup, right in zip(setups, expected, strict=True):
            model.set_active_adapters(setup)
            assert torch.allclose(output(compiled), right, atol=1e-6)
    assert backend.compiled <= 2


@pytest.mark.parametrize("name", ["timm-vit", "open_clip-clip", "hf-wav2vec2", "hf-blip-retrieval"])
def test_two_threads_with_their_own_compositions_never_mix(name: str) -> None:
    family = FAMILIES[name]
    model = mmadapters.init(bare(family))
    for adapter, config in (
        ("a", SeqBnConfig(size=4)),
        ("b", SeqBnConfig(size=6)),
        ("c", LoRAConfig(rank=2, targets=("q", "up"))),
    ):
        model.add_adapter(adapter, config)
        randomise(model.adapter(adapter), 0.1)
    model.add_adapter_fusion(["a", "b"])
    randomise(model.fusions)
    setups: list[tuple[Any, ...]] = [
        (Route(["a", "c"]), Fuse("a", "b"), "c"),
        (Route(["c", "base"]), Average("b", "c"), None),
    ]
    expected = {}
    for setup in (*setups[0], *setups[1]):
        with model.using(setup):
            expected[setup] = run(model, family)
    model.set_active_adapters("b")
    outside = run(model, family)
    start = threading.Barrier(2)
    wrong: list[object] = []
    rounds = 24

    def serve(mine: tuple[Any, ...]) -> None:
        try:
            start.wait(timeout=60)
            for index in range(rounds):
                setup = mine[index % len(mine)]
                with model.using(setup), model.recorded_fusion() as record:
                    if not equal(run(model, family), expected[setup]):
                        wrong.append(setup)
                    if bool(record) is not isinstance(setup, Fuse):
                        wrong.append("record")
            if not equal(run(model, family), outside):
                wrong.append("outside")
        except Exception as error:  # Told to the main thread, which fails on it.
            wrong.append(error)

    threads = [threading.Thread(target=serve, args=(mine,)) for mine in setups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


def test_adapter_of_a_megabyte_is_loaded_in_the_time_of_a_forward_pass(tmp_path: Path) -> None:
    model = two(DoubleSeqBnConfig(size=28), depth=12, embed_dim=192)
    model.save_adapter(tmp_path / "a", "a")
    assert 1e6 < (tmp_path / "a" / "adapter.safetensors").stat().st_size < 1.2e6
    model.set_active_adapters("a")
    names = iter(range(100))
    # 20 milliseconds where a pass over the two images takes 15.
    assert (
        ratio(
            lambda: model.load_adapter(tmp_path / "a", f"{next(names)}"),
            lambda: output(model),
            repeats=15,
            after=lambda: model.delete_adapter(model.adapter_names[-1]),
        )
        <= 20 / 15
    )


def test_loading_leaves_the_random_state(tmp_path: Path) -> None:
    model = two(DoubleSeqBnConfig(size=4))
    model.save_adapter(tmp_path / "a", "a")
    before = torch.get_rng_state()
    model.load_adapter(tmp_path / "a", "again")
    assert torch.equal(torch.get_rng_state(), before)
