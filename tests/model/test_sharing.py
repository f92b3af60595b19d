"""Adapters of several tasks that share all, nothing, or one of their two projections."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from families import Family, tensors
from families.small import hooks, output, randomise, small_vit
from injection.matrix import FAMILIES, METHODS, bare, config_for, equal, loss_of, refusal, run
from torch import Tensor, nn

import mmadapters
from mmadapters import (
    AdapterModel,
    Average,
    CompacterConfig,
    ConfigUnion,
    DoRAConfig,
    DoubleSeqBnConfig,
    Fuse,
    LoRAConfig,
    MethodConfig,
    Parallel,
    Route,
    SeqBnConfig,
    Stack,
    init,
)
from mmadapters.model.sharing import HALVES, half_parameters, shared_with, sharing_of

TASKS = ("vqa", "retrieval", "caption")
WHOLE = {"conformer_adapter", "fact", "fact-tk", "ia3", "ssf", "bitfit", "l_adapter", "mam"}
WHOLE |= {"l_adapter-replacing", "prefix", "prefix-reparametrised", "prompt", "prompt-shallow"}
WHOLE |= {"union-of-weights", "unipelt", "ladder", "uniadapter", "mma", "cross_modal"}
WHOLE |= {"gated_cross_attention", "gated_cross_attention-ffn"}
WHOLE |= {"clip_adapter", "clip_adapter-both"}
ENCODERS = ("timm-vit", "timm-eva", "hf-clip", "open_clip-clip", "hf-wav2vec2", "hf-blip-vqa")
PAIRS = [
    (FAMILIES[name], method)
    for name in ENCODERS
    for method in METHODS
    if refusal(FAMILIES[name], method) is None
    and (name in ("timm-vit", "hf-wav2vec2") or method in ("seq_bn", "compacter", "lora", "union"))
]


def pair_id(pair: tuple[Family, str]) -> str:
    return f"{pair[0].name}-{pair[1]}"


halved = pytest.mark.parametrize("half", HALVES)
every_way = pytest.mark.parametrize("sharing", ["single", "multiple", *HALVES])
some = pytest.mark.parametrize(
    "config",
    [
        DoubleSeqBnConfig(size=4),
        SeqBnConfig(size=4, norm="after", learn_scale="channel"),
        CompacterConfig(reduction_factor=4),
        LoRAConfig(rank=2),
        DoRAConfig(rank=2),
        ConfigUnion(LoRAConfig(rank=2), SeqBnConfig(size=4)),
    ],
    ids=lambda config: config.method,
)


def group(
    sharing: Any, config: MethodConfig | None = None, names: tuple[str, ...] = TASKS
) -> AdapterModel:
    """A small ViT with random adapters."""
    model = init(small_vit())
    model.add_adapters(names, config or DoubleSeqBnConfig(size=4), sharing=sharing)
    randomise(model.adapters)
    return model


def ids(module: nn.Module) -> set[int]:
    return {id(parameter) for parameter in module.parameters()}


def outputs(model: AdapterModel) -> dict[str, Tensor]:
    found = {}
    for name in model.adapter_names:
        with model.using(name):
            found[name] = output(model)
    return found


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def ways(model: AdapterModel) -> set[str]:
    """What any two adapters of a model share."""
    held = [model.adapter(name) for name in model.adapter_names]
    return {sharing_of(a, b) for i, a in enumerate(held) for b in held[:i]}


@pytest.mark.parametrize("pair", PAIRS, ids=pair_id)
def test_each_method_shares_what_it_can_and_refuses_halves_that_it_has_not(
    pair: tuple[Family, str],
) -> None:
    family, method = pair
    model = mmadapters.init(bare(family))
    config = config_for(family, method)
    model.add_adapters(["a", "b"], config, sharing="single")
    assert ids(model.adapter("a")) == ids(model.adapter("b"))
    before = model.adapter_names
    for half in HALVES:
        names = [f"{half}{number}" for number in range(2)]
        if method in WHOLE:
            with pytest.raises(ValueError, match=r"has no down- and up-projection; use sharing"):
                model.add_adapters(names, config, sharing=half)
            assert model.adapter_names == before
            continue
        model.add_adapters(names, config, sharing=half)
        one, other = (model.adapter(name) for name in names)
        own = {id(p) for p in half_parameters(one, half).values()}
        assert ids(one) & ids(other) == own
        assert own != ids(one)
        randomise(one)
        found = []
        for name in names:
            with model.using(name):
                found.append(run(model, family))
        assert not equal(*found)
        randomise(other)
        with model.using(names[0]):
            assert not equal(run(model, family), found[0])


@every_way
@some
def test_a_fresh_group_changes_nothing_and_is_frozen(sharing: Any, config: MethodConfig) -> None:
    model = init(small_vit())
    expected = output(model)
    model.add_adapters(TASKS, config, sharing=sharing)
    assert model.active_adapters is None
    assert not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(found, expected) for found in outputs(model).values())


@every_way
@some
def test_parameters_are_counted_once(sharing: Any, config: MethodConfig) -> None:
    model = group(sharing, config)
    alone = sum(p.numel() for p in model.adapter("vqa").parameters())
    half = 0
    if sharing in HALVES:
        half = sum(
            {
                id(p): p.numel() for p in half_parameters(model.adapter("vqa"), sharing).values()
            }.values()
        )
    shared = {"single": alone, "multiple": 0}.get(sharing, half)
    total = sum(p.numel() for p in model.adapters.parameters())
    assert total == 3 * alone - 2 * shared
    assert ways(model) == {sharing}


def test_the_summary_says_who_shares_and_the_total(capsys: pytest.CaptureFixture[str]) -> None:
    model = group("half_down")
    rows = model.adapter_summary()
    assert [row.shares for row in rows] == [TASKS[1:], (TASKS[0], TASKS[2]), TASKS[:2]]
    total = sum(p.numel() for p in model.adapters.parameters())
    assert total < sum(row.parameters for row in rows)
    assert f"{total:,} parameters in all adapters" in capsys.readouterr().out
    group("multiple").adapter_summary()
    assert "counted once" not in capsys.readouterr().out


@halved
@some
def test_the_gradient_of_a_shared_half_is_the_sum_of_the_tasks_gradients(
    half: Any, config: MethodConfig
) -> None:
    model = group(half, config).double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)

    def loss(model: AdapterModel, name: str) -> Tensor:
        with model.using(name):
            return loss_of(tensors(model(x)), seed=TASKS.index(name))

    # The same adapters, none of which shares anything.
    apart = init(small_vit())
    apart.add_adapters(TASKS, config)
    apart.double()
    for name in TASKS:
        apart.adapter(name).load(model.adapter(name).tensors(), name)
        apart.adapter(name).requires_grad_(True)
        model.adapter(name).requires_grad_(True)
        loss(model, name).backward()
        loss(apart, name).backward()
    for name in TASKS:
        own = {id(p) for p in half_parameters(model.adapter(name), half).values()}
        for key, parameter in model.adapter(name).named_parameters():
            found = [apart.adapter(n).get_parameter(key).grad for n in TASKS]
            assert parameter.grad is not None
            expected = sum(found) if id(parameter) in own else found[TASKS.index(name)]  # type: ignore[arg-type]
            torch.testing.assert_close(parameter.grad, expected)


@halved
def test_training_one_moves_the_others_through_the_shared_half_alone(half: Any) -> None:
    model = group(half)
    before = {n: {k: t.clone() for k, t in model.adapter(n).tensors().items()} for n in TASKS}
    model.train_adapter("vqa")
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == ids(model.adapter("vqa"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    loss_of(tensors(model(torch.randn(2, 3, 32, 32)))).backward()
    optimizer.step()
    for name in TASKS:
        moved = {
            key
            for key, t in model.adapter(name).tensors().items()
            if not torch.equal(t, before[name][key])
        }
        wanted = "down" if half == "half_down" else "up"
        keys = (
            set(before[name]) if name == "vqa" else {k for k in before[name] if f"/{wanted}." in k}
        )
        assert moved == keys
    model.train_adapter("retrieval")
    assert {id(p) for p in model.parameters() if p.requires_grad} == ids(model.adapter("retrieval"))


def test_single_is_one_adapter_under_several_names() -> None:
    model = group("single")
    one = init(small_vit())
    one.add_adapter("vqa", DoubleSeqBnConfig(size=4))
    one.adapter("vqa").load(model.adapter("vqa").tensors(), "a")
    expected = outputs(one)["vqa"]
    assert all(torch.equal(found, expected) for found in outputs(model).values())


def test_a_group_may_have_configs_that_differ_where_nothing_is_shared() -> None:
    model = init(small_vit())
    configs: Any = {
        "vqa": DoubleSeqBnConfig(size=4, dropout=0.1),
        "retrieval": DoubleSeqBnConfig(size=4, learn_scale="channel"),
    }
    model.add_adapters(configs, sharing="half_up")
    assert model.adapter("retrieval").config == configs["retrieval"]
    assert ways(model) == {"half_up"}


@pytest.mark.parametrize(
    ("sharing", "config", "words"),
    [
        ("half_down", DoubleSeqBnConfig(size=8), "is \\(8, 32\\) in one and \\(4, 32\\)"),
        ("half_up", SeqBnConfig(size=4), "is in one of them alone; give them the same sites"),
        ("half_up", LoRAConfig(rank=4), "is in one of them alone"),
        ("single", DoubleSeqBnConfig(size=4, dropout=0.5), "have different configs"),
        ("half", DoubleSeqBnConfig(size=4), "sharing must be one of 'single'"),
    ],
)
def test_what_cannot_be_shared_is_refused_and_nothing_is_added(
    sharing: Any, config: MethodConfig, words: str
) -> None:
    model = init(small_vit())
    with pytest.raises(ValueError, match=words):
        model.add_adapters({"a": DoubleSeqBnConfig(size=4), "b": config}, sharing=sharing)
    assert model.adapter_names == ()
    assert hooks(model.backbone) == 0


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "names is a list of names"),
        ("vqa", "names is a list of names"),
        (["a", "a"], "two adapters are to be called 'a'"),
        (["a", "there"], "an adapter called 'there' is here already"),
        (["a", "b/c"], "cannot name an adapter"),
    ],
)
def test_bad_names_add_nothing(names: Any, words: str) -> None:
    model = group("multiple", names=("there",))
    with pytest.raises(ValueError, match=words):
        model.add_adapters(names, "double_seq_bn", sharing="half_down")
    assert model.adapter_names == ("there",)
    with pytest.raises(ValueError, match="give one config for all"):
        model.add_adapters(["x", "y"])


@pytest.mark.parametrize("sharing", ["single", *HALVES])
def test_a_further_task_joins_a_group_with_what_it_has_learned(sharing: Any) -> None:
    model = group(sharing, names=("vqa", "retrieval"))
    before = outputs(model)
    model.add_adapters(["caption"], share_with="retrieval")
    after = outputs(model)
    assert torch.equal(after["vqa"], before["vqa"])
    assert torch.equal(after["retrieval"], before["retrieval"])
    assert ways(model) == {sharing}
    assert model.adapter("caption").config == model.adapter("vqa").config
    if sharing == "half_down":
        assert torch.equal(after["caption"], output(init(small_vit())))
    with pytest.raises(ValueError, match=f"shares {sharing} with '.*', and a group shares one"):
        model.add_adapters(["x"], share_with="vqa", sharing="multiple")
    assert "x" not in model.adapter_names


def test_joining_one_that_shares_nothing_asks_what_is_to_be_shared() -> None:
    model = group("multiple", names=("vqa",))
    with pytest.raises(ValueError, match="shares nothing yet: say what"):
        model.add_adapters(["x"], share_with="vqa")
    model.add_adapters(["x"], share_with="vqa", sharing="half_down")
    assert shared_with(model.store, "vqa") == ("x",)
    with pytest.raises(ValueError, match="no adapter is called 'vqaa'"):
        model.add_adapters(["y"], share_with="vqaa")


@every_way
@some
def test_each_file_stands_alone_and_a_group_is_shared_again_when_loaded(
    sharing: Any, config: MethodConfig, tmp_path: Path
) -> None:
    model = group(sharing, config)
    expected = outputs(model)
    for name in TASKS:
        model.save_adapter(tmp_path / name, name)
        alone = init(small_vit())
        alone.load_adapter(tmp_path / name)
        assert torch.equal(outputs(alone)[name], expected[name])
    again = init(small_vit())
    for name in TASKS:
        again.load_adapter(tmp_path / name)
    assert ways(again) == {"multiple"}
    if sharing != "multiple":
        again.share_adapters(TASKS, sharing)
    assert ways(again) == {sharing}
    assert same(outputs(again), expected)


@pytest.mark.parametrize("sharing", ["single", *HALVES])
def test_what_differs_is_not_shared(sharing: Any) -> None:
    model = group("multiple")
    before = outputs(model)
    with pytest.raises(ValueError, match=r"differs between them, so they were not trained as one"):
        model.share_adapters(TASKS, sharing)
    assert ways(model) == {"multiple"}
    assert same(outputs(model), before)


def test_a_group_shares_one_thing() -> None:
    model = group("half_down", names=("a", "b"))
    model.add_adapters(["c"], DoubleSeqBnConfig(size=4))
    with pytest.raises(ValueError, match="'a' shares half_down with 'b' already"):
        model.share_adapters(["a", "c"], "half_down")
    with pytest.raises(ValueError, match="'a' shares half_down with 'b' already"):
        model.share_adapters(["a", "b"], "half_up")
    with pytest.raises(ValueError, match="at least two adapters"):
        model.share_adapters(["a"], "half_up")
    with pytest.raises(ValueError, match="sharing must be one of 'single', 'half_down', 'half_up'"):
        model.share_adapters(["a", "c"], "multiple")  # type: ignore[arg-type]


@pytest.mark.parametrize("sharing", ["single", *HALVES])
@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: model.to("cpu"),
    ],
    ids=["deepcopy", "pickle", "device"],
)
def test_copies_share_as_the_model_does(sharing: Any, change: Any) -> None:
    model = group(sharing)
    expected = outputs(model)
    found = change(model)
    assert ways(found) == {sharing}
    assert same(outputs(found), expected)


@pytest.mark.parametrize("sharing", ["single", *HALVES])
def test_other_dtypes_keep_sharing(sharing: Any) -> None:
    model = group(sharing)
    held = ids(model.adapters)
    model.to(torch.bfloat16)
    assert ways(model) == {sharing}
    assert ids(model.adapters) == held
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(torch.isfinite(found).all() for found in outputs(model).values())


@every_way
def test_a_state_dict_goes_into_a_group_of_the_same_sharing(sharing: Any) -> None:
    model, other = group(sharing), group(sharing)
    randomise(other.adapters)
    other.load_state_dict(model.state_dict())
    assert ways(other) == {sharing}
    assert same(outputs(other), outputs(model))


@pytest.mark.parametrize("sharing", ["single", *HALVES])
def test_deleting_one_leaves_the_others(sharing: Any) -> None:
    model = group(sharing)
    expected = outputs(model)
    model.set_active_adapters("vqa")
    model.delete_adapter("vqa")
    del expected["vqa"]
    assert same(outputs(model), expected)
    assert ways(model) == {sharing}


@pytest.mark.parametrize("sharing", ["single", *HALVES])
def test_an_average_stands_alone(sharing: Any) -> None:
    model = group(sharing, LoRAConfig(rank=2))
    expected = outputs(model)
    model.average_adapter("copy", ["vqa"])
    assert torch.equal(outputs(model)["copy"], expected["vqa"])
    assert shared_with(model.store, "copy") == ()
    randomise(model.adapter("copy"))
    del (found := outputs(model))["copy"]
    assert same(found, expected)


@pytest.mark.parametrize("sharing", ["single", *HALVES])
def test_merging_one_leaves_the_others_as_they_are(sharing: Any) -> None:
    model = group(sharing, LoRAConfig(rank=2))
    expected = outputs(model)
    model.merge_adapter("vqa")
    torch.testing.assert_close(output(model), expected["vqa"], atol=1e-5, rtol=1e-4)
    model.reset_adapter("vqa")
    assert same(outputs(model), expected)


@pytest.mark.parametrize("sharing", ["single", *HALVES])
@pytest.mark.parametrize(
    "setup",
    [
        Stack("vqa", "retrieval"),
        Average("vqa", "retrieval", weights=(3, 1)),
        Route(["retrieval", "caption"]),
        Parallel("vqa", "caption"),
        Fuse("vqa", "caption"),
    ],
    ids=lambda setup: type(setup).__name__,
)
def test_compositions_act_as_of_adapters_that_share_nothing(sharing: Any, setup: Any) -> None:
    model, apart = group(sharing), group("multiple")
    for name in TASKS:
        apart.adapter(name).load(model.adapter(name).tensors(), name)
    if isinstance(setup, Fuse):
        for one in (model, apart):
            torch.manual_seed(1)
            one.add_adapter_fusion(setup)
    with model.using(setup), apart.using(setup):
        assert torch.equal(output(model), output(apart))
