"""Several adapters in one batch: every sample gets what it would get alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from families import Family
from families.small import randomise
from injection.composing import (
    ADAPTERS,
    FUSE,
    NAMES,
    ROUTES,
    batch,
    each_family,
    graph_rows,
    held,
    routed,
    rows,
)
from injection.matrix import FAMILIES, Trace, bare, distance, equal, loss_of, same_state, state
from torch import Tensor

import mmadapters
from mmadapters import (
    AdapterModel,
    Average,
    BatchSplit,
    Fuse,
    Parallel,
    PromptConfig,
    Route,
    Split,
    Stack,
)


@pytest.fixture
def model(name: str) -> Iterator[AdapterModel]:
    """Shared by tests, so none may change its adapters; nothing is active after each."""
    yield held(name)
    held(name).set_active_adapters(None)


PAIRS = [(name, route) for name in NAMES for route in routed(name)]
each_route = pytest.mark.parametrize(("name", "route"), PAIRS)


def alone(
    model: AdapterModel, family: Family, members: Sequence[Any], samples: Sequence[int]
) -> list[list[Tensor]]:
    """Every sample through the model by itself, with its own member acting."""
    found = []
    for member, sample in zip(members, samples, strict=True):
        with model.using(member):
            found.append(rows(model, family, batch(family, [sample])))
    return found


def assert_each_sample_is_as_alone(
    together: list[Tensor], singles: list[list[Tensor]], tolerance: float = 1e-10
) -> None:
    for index, single in enumerate(singles):
        assert distance([out[index : index + 1] for out in together], single) <= tolerance
    # Different members on one sample must differ, or nothing is shown.
    assert any(distance(a, b) > 1e-3 for a in singles for b in singles)


@each_route
def test_route_gives_every_sample_what_its_adapter_gives_alone(
    name: str, route: str, model: AdapterModel
) -> None:
    family = FAMILIES[name]
    for members in (ROUTES[route], ROUTES[route][::-1]):
        samples = [0, 1, 1, 0, 1, 0][: len(members)]
        singles = alone(model, family, members, samples)
        model.set_active_adapters(Route(members))
        together = rows(model, family, batch(family, samples))
        assert_each_sample_is_as_alone(together, singles)


@each_route
def test_batch_split_gives_every_stretch_what_its_adapter_gives_alone(
    name: str, route: str, model: AdapterModel
) -> None:
    family = FAMILIES[name]
    members = list(dict.fromkeys(ROUTES[route]))[:3]
    sizes = (2, 1, 2)[: len(members)]
    samples = [0, 1, 1, 0, 1][: sum(sizes)]
    owners = [member for member, size in zip(members, sizes, strict=True) for _ in range(size)]
    singles = alone(model, family, owners, samples)
    with model.using(BatchSplit(*members, batch_sizes=sizes)):
        together = rows(model, family, batch(family, samples))
    assert_each_sample_is_as_alone(together, singles)


@each_route
def test_samples_routed_to_base_are_the_bare_encoders(
    name: str, route: str, model: AdapterModel
) -> None:
    family, members = FAMILIES[name], ROUTES[route]
    samples = [0, 1, 1, 0, 1, 0][: len(members)]
    single = copy.deepcopy(model).float()
    args, kwargs = batch(family, samples)
    inputs = (tuple(as_float(a) for a in args), {k: as_float(v) for k, v in kwargs.items()})
    expected = rows(bare(family).requires_grad_(False), family, inputs)
    with single.using(Route(members)):
        together = rows(single, family, inputs)
    # nn.MultiheadAttention is computed in another way for a part of its batch's weights.
    explicit = route == "prefixes" or (name == "open_clip-clip" and route not in BRANCH_ROUTES)
    for index, member in enumerate(members):
        if member in (None, "base"):
            own, right = ([out[index] for out in outs] for outs in (together, expected))
            assert distance(own, right) <= 1e-6 if explicit else equal(own, right)


BRANCH_ROUTES = ("sizes", "placements", "fusions")


def as_float(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


@each_family
def test_routed_training_gives_each_adapter_the_gradient_of_its_own_samples(name: str) -> None:
    family, model = FAMILIES[name], copy.deepcopy(held(name))
    route = "mixture" if "mixture" in routed(name) else "fusions"
    members, samples = ROUTES[route], [0, 1, 1, 0, 1, 0][: len(ROUTES[route])]

    def gradients() -> dict[str, Tensor]:
        found = {
            key: p.grad.clone()
            for key, p in model.adapters.named_parameters()
            if p.grad is not None
        }
        model.zero_grad()
        return found

    def loss(outputs: list[Tensor], index: int) -> Tensor:
        return loss_of([out for out in outputs if out.requires_grad], seed=index).double()

    model.train_adapter(Route(members))
    model.eval()
    for index, (member, sample) in enumerate(zip(members, samples, strict=True)):
        if member != "base":
            with model.using(member):
                loss(graph_rows(model, family, batch(family, [sample])), index).backward()
    expected = gradients()
    together = graph_rows(model, family, batch(family, samples))
    kept = [index for index, member in enumerate(members) if member != "base"]
    sum(loss([out[i : i + 1] for out in together], i) for i in kept).backward()  # type: ignore[union-attr]
    found = gradients()
    assert found.keys() == expected.keys()
    assert {key.split(".")[0] for key in found} == set(Route(members).names())
    scale = max(float(grad.abs().max()) for grad in expected.values())
    for key, grad in expected.items():
        # The loss is summed up in float32.
        assert (found[key] - grad).abs().max() <= 1e-6 * scale, key


@each_family
def test_wrong_length_of_the_batch_is_named_with_its_site(name: str, model: AdapterModel) -> None:
    family = FAMILIES[name]
    site = next(site for site, _ in model.adapter("small").entries())
    for setup in (Route(["small", "base", "small"]), BatchSplit("small", None, batch_sizes=(2, 1))):
        message = (
            rf"{type(setup).__name__} deals out 3 samples, but 4 reached {site.split('.')[0]}\."
        )
        with model.using(setup), pytest.raises(ValueError, match=message):
            rows(model, family, batch(family, [0, 1, 1, 0]))


@each_family
def test_unknown_names_and_missing_fusions_raise_and_change_nothing(
    name: str, model: AdapterModel
) -> None:
    model.set_active_adapters("small")
    for setup in (
        Route(["small", "smal"]),
        Average("smal", "seq"),
        Stack("seq", Fuse("smal", "small")),
    ):
        with pytest.raises(ValueError, match=r"no adapter is called 'smal'; did you mean 'small'"):
            model.set_active_adapters(setup)
    with pytest.raises(ValueError, match=r"no AdapterFusion of 'seq,par': call add_adapter_fusion"):
        model.set_active_adapters(Route([Fuse("seq", "par"), "base"]))
    assert model.active_adapters == Stack("small")


def test_encoder_that_reads_weights_itself_refuses_to_deal_them_out() -> None:
    model = held("timm-eva")
    for setup in (
        Route(["lora", "base"]),
        BatchSplit("ia3", "small", batch_sizes=(1, 1)),
        Split("lora4", "base", splits=(2,)),
        Parallel("dora", "small"),
    ):
        kind = type(setup).__name__
        with pytest.raises(
            ValueError, match=rf"{kind} cannot act at vision.*Eva reads this weight"
        ):
            model.set_active_adapters(setup)
    assert model.active_adapters is None
    model.set_active_adapters(Average("lora", "base"))
    model.set_active_adapters(None)


def test_prompts_and_mixed_prefixes_are_refused_by_name() -> None:
    model = copy.deepcopy(held("timm-vit"))
    model.add_adapter("words", PromptConfig(length=2))
    for setup in (Route(["words", "base"]), Average("words", "small"), Parallel("words", "small")):
        with pytest.raises(ValueError, match=r"cannot hold the prompts of 'words'.*use Stack"):
            model.set_active_adapters(setup)
    for setup in (Average("prefix", "small"), Split("small", "prefix", splits=(2,))):
        with pytest.raises(ValueError, match=r"cannot hold the prefix of 'prefix'"):
            model.set_active_adapters(setup)


@each_route
def test_switched_off_composition_leaves_output_bitwise_equal(
    name: str, route: str, model: AdapterModel
) -> None:
    family = FAMILIES[name]
    inputs = batch(family, [0, 1])
    expected = rows(bare(family).double().requires_grad_(False), family, inputs)
    model.set_active_adapters(Route(ROUTES[route]))
    assert equal_with(model, None, family, inputs, expected)
    model.set_active_adapters(None)
    assert equal(rows(model, family, inputs), expected)


def equal_with(
    model: AdapterModel, setup: Any, family: Family, inputs: tuple, expected: list[Tensor]
) -> bool:
    with model.using(setup):
        return equal(rows(model, family, inputs), expected)


@each_family
def test_copied_and_pickled_models_go_on_with_their_composition(
    name: str, model: AdapterModel
) -> None:
    family, inputs = FAMILIES[name], batch(FAMILIES[name], [0, 1, 1])
    for setup in (Route([FUSE, "base", "small"]), FUSE, Split(FUSE, "base", splits=(1,))):
        model.set_active_adapters(setup)
        if isinstance(setup, Split) and "clip" in name:
            continue
        expected = rows(model, family, inputs)
        twin = copy.deepcopy(model)
        # torch pickles no module with a parametrized weight, as wav2vec2 has one.
        for other in [twin] if "wav2vec2" in name else [twin, pickle.loads(pickle.dumps(model))]:
            assert other.active_adapters == setup
            assert equal(rows(other, family, inputs), expected)
            randomise(other.fusions)
            assert not equal(rows(other, family, inputs), expected)
        assert equal(rows(model, family, inputs), expected)


@each_family
def test_detach_leaves_nothing_of_a_composition(name: str) -> None:
    family = FAMILIES[name]
    backbone = bare(family).double()
    trace, weights = Trace.of(backbone), state(backbone)
    model = mmadapters.init(backbone)
    for adapter in ("small", "seq"):
        model.add_adapter(adapter, ADAPTERS[adapter])
    model.add_adapter_fusion(["small", "seq"])
    if "clip" not in name:
        model.set_active_adapters(Parallel("small", "base"))
    model.set_active_adapters(Route([Fuse("small", "seq"), "base"]))
    model.train_adapter_fusion(["small", "seq"])
    encoder = model.detach()
    assert Trace.of(encoder) == trace
    assert same_state(encoder, weights)
