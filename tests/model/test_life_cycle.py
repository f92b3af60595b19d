"""The verbs of an `AdapterModel`, on a small vision transformer of timm."""

from __future__ import annotations

import re
import threading
from typing import Any

import pytest
import torch
from families.small import CONFIGS, filled, hooks, output, randomise, small_vit
from families.vision import images
from torch import Tensor, nn

from mmadapters import (
    AdapterModel,
    AdaptFormerConfig,
    BottleneckConfig,
    CompacterConfig,
    ConfigUnion,
    IA3Config,
    LoRAConfig,
    PrefixConfig,
    PromptConfig,
    SeqBnConfig,
    SSFConfig,
    Stack,
    UniPELTConfig,
    init,
)


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_init_freezes_the_encoder_and_changes_nothing_else() -> None:
    vit = small_vit().train()
    keys = list(vit.state_dict())
    expected = output(small_vit())
    model = init(vit)
    assert model.backbone is vit
    assert not trainable(model)
    assert not vit.training
    assert hooks(vit) == 0
    assert list(vit.state_dict()) == keys
    assert torch.equal(output(model), expected)
    assert model.adapter_names == ()
    assert model.active_adapters is None


def test_fresh_adapter_is_idle_and_frozen() -> None:
    model = init(small_vit())
    expected = output(model)
    model.add_adapter("pets", SeqBnConfig())
    assert model.adapter_names == ("pets",)
    assert model.active_adapters is None
    assert not trainable(model)
    assert torch.equal(output(model), expected)
    model.set_active_adapters("pets")
    assert torch.equal(output(model), expected)


@pytest.mark.parametrize("name", ["pets", "a b", "x-1_2", "train", "double", "0", "a@b+c"])
def test_any_plain_name_will_do(name: str) -> None:
    model = init(small_vit())
    model.add_adapter(name, LoRAConfig(rank=2))
    model.train_adapter(name)
    assert model.adapter_names == (name,)
    assert all(key.startswith(f"adapters.{name}.") for key in trainable(model))
    model.delete_adapter(name)
    assert model.adapter_names == ()


@pytest.mark.parametrize(
    "name", ["", "a/b", "a\\b", "../a", "a.b", ".a", "a\nb", "é", "-a", " ", 3, None], ids=repr
)
def test_name_that_cannot_be_a_folder_is_refused(name: Any) -> None:
    model = init(small_vit())
    with pytest.raises(ValueError, match=r"cannot name an adapter: use letters"):
        model.add_adapter(name, LoRAConfig())
    assert model.adapter_names == ()
    assert hooks(model.backbone) == 0


def test_config_may_be_a_name() -> None:
    model = init(small_vit())
    model.add_adapter("a", "ia3")
    assert model.adapter("a").config == IA3Config()


def test_failed_addition_leaves_the_model_as_it_was() -> None:
    model = filled("lora")
    model.set_active_adapters("lora")
    before, count, keys = output(model), hooks(model.backbone), list(model.state_dict())
    for name, config, message in (
        ("lora", SeqBnConfig(), "an adapter called 'lora' is here already"),
        ("new", SeqBnConfig(reduction_factor=100), "reduction_factor 100"),
        ("new", "lorra", "no method is called 'lorra'; did you mean 'lora'"),
        ("new", LoRAConfig, "config must be a method's config or name, not <class"),
        ("new", {"method": "lora"}, "config must be a method's config or name"),
        ("new", SeqBnConfig(sites=("vison",)), "no site of VisionTransformer matches 'vison'"),
        (
            "new",
            ConfigUnion(LoRAConfig(), LoRAConfig(targets=("gate",))),
            "has no linear map 'gate'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            model.add_adapter(name, config)  # type: ignore[arg-type]
    assert model.adapter_names == ("lora",)
    assert hooks(model.backbone) == count
    assert list(model.state_dict()) == keys
    assert torch.equal(output(model), before)


def test_addition_that_the_self_check_stops_leaves_the_model_as_it_was() -> None:
    model = init(small_vit(), example_inputs=(torch.randn(1, 3, 64, 64),))
    before = output(model)
    with pytest.raises(AssertionError):
        model.add_adapter("new", SeqBnConfig())
    assert model.adapter_names == ()
    assert hooks(model.backbone) == 0
    assert torch.equal(output(model), before)
    assert not trainable(model)


def test_self_check_draws_nothing_from_the_random_state() -> None:
    def drawn(model: AdapterModel) -> Tensor:
        torch.manual_seed(1)
        model.add_adapter("b", LoRAConfig(rank=2))
        return torch.rand(4)

    checked_before = filled("lora")
    assert torch.equal(drawn(checked_before), drawn(init(small_vit())))


def test_several_adapters_are_held_and_each_acts_alone() -> None:
    model = filled("bottleneck", "lora", "ssf")
    assert model.adapter_names == ("bottleneck", "lora", "ssf")
    outputs = []
    for name in (None, *model.adapter_names):
        model.set_active_adapters(name)
        outputs.append(output(model))
    alone = []
    for name in CONFIGS:
        single = init(small_vit())
        single.add_adapter(name, CONFIGS[name])
        single.adapter(name).load_state_dict(model.adapter(name).state_dict())
        single.set_active_adapters(name)
        alone.append(output(single))
    assert all(torch.equal(a, b) for a, b in zip(outputs[1:], alone, strict=True))
    assert not any(torch.equal(a, b) for i, a in enumerate(outputs) for b in outputs[:i])


@pytest.mark.parametrize(
    ("setup", "expected"),
    [
        (None, None),
        ("lora", Stack("lora")),
        (("lora", "ssf"), Stack("lora", "ssf")),
        (["ssf", "lora"], Stack("ssf", "lora")),
        (Stack("ssf"), Stack("ssf")),
        (Stack(Stack("lora", "ssf"), "bottleneck"), Stack(Stack("lora", "ssf"), "bottleneck")),
    ],
    ids=repr,
)
def test_active_adapters_are_what_was_set(setup: Any, expected: Any) -> None:
    model = filled("bottleneck", "lora", "ssf")
    model.set_active_adapters(setup)
    assert model.active_adapters == expected
    model.set_active_adapters(None)
    with model.using(setup):
        assert model.active_adapters == expected
    assert model.active_adapters is None


def test_nested_stack_acts_as_the_flat_one() -> None:
    model = filled("bottleneck", "lora", "ssf")
    model.set_active_adapters(Stack("ssf", "lora", "bottleneck"))
    flat = output(model)
    model.set_active_adapters(Stack(Stack("ssf", "lora"), Stack("bottleneck")))
    assert torch.equal(output(model), flat)


@pytest.mark.parametrize(
    "verb",
    ["set_active_adapters", "train_adapter", "using", "delete_adapter", "merge_adapter",
     "reset_adapter", "adapter"],
)  # fmt: skip
def test_wrong_name_raises_with_the_nearest_and_changes_nothing(verb: str) -> None:
    model = filled("bottleneck", "lora")
    model.train_adapter("lora")
    before, grads, count = output(model), trainable(model), hooks(model.backbone)
    message = "no adapter is called 'lorra'; did you mean 'lora'.; there are 'bottleneck', 'lora'"
    call: Any = model.using("lorra").__enter__ if verb == "using" else getattr(model, verb)
    with pytest.raises(ValueError, match=message):
        call(*() if verb == "using" else ("lorra",))
    assert model.active_adapters == Stack("lora")
    assert trainable(model) == grads
    assert hooks(model.backbone) == count
    assert torch.equal(output(model), before)


def test_stack_with_one_wrong_name_changes_nothing() -> None:
    model = filled("lora")
    model.train_adapter("lora")
    with pytest.raises(ValueError, match="no adapter is called 'ssf'"):
        model.train_adapter(Stack("lora", "ssf"))
    assert model.active_adapters == Stack("lora")
    assert len(trainable(model)) == 2 * 2 * 2


def test_wrong_name_with_no_adapter_at_all_says_so() -> None:
    with pytest.raises(ValueError, match="no adapter is called 'pets'; there are none yet"):
        init(small_vit()).set_active_adapters("pets")


def test_train_adapter_makes_exactly_its_own_parameters_trainable() -> None:
    model = filled("bottleneck", "lora")
    model.train_adapter("bottleneck")
    own = {f"adapters.bottleneck.{n}" for n, _ in model.adapter("bottleneck").named_parameters()}
    assert trainable(model) == own
    model.train_adapter(Stack("bottleneck", "lora"))
    both = own | {f"adapters.lora.{n}" for n, _ in model.adapter("lora").named_parameters()}
    assert trainable(model) == both
    model.train_adapter("lora")
    assert trainable(model) == both - own
    assert model.active_adapters == Stack("lora")
    model.train_adapter(None)
    assert trainable(model) == set()
    assert model.active_adapters is None


def test_training_mode_reaches_adapters_and_the_trunk_only_on_request() -> None:
    model = filled("lora")
    assert not model.training
    model.train_adapter("lora")
    assert model.training
    assert all(module.training for module in model.adapter("lora").modules())
    assert not any(module.training for module in model.backbone.modules())
    model.eval()
    assert not any(module.training for module in model.modules())

    trunk = init(small_vit(), train_trunk=True)
    assert not trunk.backbone.training
    trunk.add_adapter("a", LoRAConfig(rank=2))
    trunk.train_adapter("a")
    assert all(module.training for module in trunk.backbone.modules())
    trunk.eval()
    assert not any(module.training for module in trunk.backbone.modules())


def test_adapter_added_in_train_mode_is_in_train_mode() -> None:
    model = init(small_vit())
    model.train()
    model.add_adapter("a", AdaptFormerConfig(size=4))
    assert all(module.training for module in model.adapter("a").modules())
    assert not any(module.training for module in model.backbone.modules())


def test_dropout_of_a_trunk_in_train_mode_acts() -> None:
    model = init(small_vit(proj_drop_rate=0.5), train_trunk=True)
    model.train()
    assert not torch.equal(output(model), output(model))
    still = init(small_vit(proj_drop_rate=0.5))
    still.train()
    assert torch.equal(output(still), output(still))


def test_using_nests_and_gives_back_what_acted_before() -> None:
    model = filled("bottleneck", "lora")
    model.set_active_adapters("lora")
    lora = output(model)
    with model.using(None):
        plain = output(model)
        with model.using("bottleneck") as inner:
            assert inner is model
            bottleneck = output(model)
            with model.using("lora"):
                assert torch.equal(output(model), lora)
            assert torch.equal(output(model), bottleneck)
            assert model.active_adapters == Stack("bottleneck")
        assert torch.equal(output(model), plain)
        assert model.active_adapters is None
    assert torch.equal(output(model), lora)
    assert model.active_adapters == Stack("lora")
    assert not torch.equal(lora, plain)
    assert not torch.equal(lora, bottleneck)


def test_using_gives_back_what_acted_before_also_after_an_exception() -> None:
    model = filled("lora")
    model.set_active_adapters("lora")
    before = output(model)
    with pytest.raises(KeyError), model.using(None):
        raise KeyError
    assert torch.equal(output(model), before)
    assert model.active_adapters == Stack("lora")


def test_setting_adapters_inside_using_takes_effect_behind_it() -> None:
    model = filled("bottleneck", "lora")
    model.set_active_adapters("bottleneck")
    bottleneck = output(model)
    model.set_active_adapters("lora")
    lora = output(model)
    with model.using("lora"):
        model.set_active_adapters("bottleneck")
        assert torch.equal(output(model), lora)
    assert torch.equal(output(model), bottleneck)


def test_adding_inside_using_leaves_it_in_place() -> None:
    model = filled("lora")
    with model.using("lora"):
        before = output(model)
        model.add_adapter("bottleneck", SeqBnConfig(size=4))
        assert model.active_adapters == Stack("lora")
        assert torch.equal(output(model), before)


def test_threads_use_one_model_each_with_its_own_adapter() -> None:
    model = filled("bottleneck", "lora", "ssf")
    setups: list[Any] = [None, "bottleneck", "lora", "ssf", Stack("lora", "ssf")]
    expected = []
    for setup in setups:
        model.set_active_adapters(setup)
        expected.append(output(model))
    model.set_active_adapters(None)
    together = threading.Barrier(len(setups))
    wrong: list[Any] = []

    def work(setup: Any, right: Tensor) -> None:
        together.wait()
        for _ in range(6):
            with model.using(setup):
                got = output(model)
            if not torch.equal(got, right) or not torch.equal(output(model), expected[0]):
                wrong.append(setup)

    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(setups, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert model.active_adapters is None


def test_deleted_adapter_takes_its_hooks_along_and_leaves_those_of_others() -> None:
    model = filled("lora")
    lora_hooks = hooks(model.backbone)
    model.set_active_adapters("lora")
    lora = output(model)
    model.add_adapter("bottleneck", SeqBnConfig(size=4))
    assert hooks(model.backbone) > lora_hooks
    model.delete_adapter("bottleneck")
    assert hooks(model.backbone) == lora_hooks
    assert model.adapter_names == ("lora",)
    assert torch.equal(output(model), lora)
    model.delete_adapter("lora")
    assert hooks(model.backbone) == 0


@pytest.mark.parametrize("setup", ["lora", Stack("bottleneck", "lora")])
def test_deleting_an_active_adapter_leaves_nothing_active(setup: Any) -> None:
    model = filled("bottleneck", "lora")
    plain = output(model)
    model.set_active_adapters(setup)
    model.delete_adapter("lora")
    assert model.active_adapters is None
    assert torch.equal(output(model), plain)
    assert model.adapter_names == ("bottleneck",)


def test_deleting_an_adapter_inside_using_leaves_nothing_of_it_acting() -> None:
    model = filled("lora")
    model.add_adapter("other", LoRAConfig(rank=2))
    plain = output(model)
    with model.using("lora"):
        model.delete_adapter("lora")
        assert torch.equal(output(model), plain)
        assert model.active_adapters is None
    assert torch.equal(output(model), plain)


def test_name_is_free_again_after_deletion() -> None:
    model = filled("lora")
    model.delete_adapter("lora")
    model.add_adapter("lora", SeqBnConfig(size=4))
    assert model.adapter("lora").config == SeqBnConfig(size=4)


def test_backbone_keys_and_values_never_change() -> None:
    expected = small_vit().state_dict()
    model = filled("bottleneck", "lora", "ssf")
    for setup in (None, "lora", Stack("bottleneck", "lora", "ssf")):
        model.set_active_adapters(setup)
        state = model.backbone.state_dict()
        assert list(state) == list(expected)
        assert all(torch.equal(state[key], expected[key]) for key in expected)
    inside = {k.removeprefix("backbone.") for k in model.state_dict() if k.startswith("backbone.")}
    assert inside == set(expected)


def test_detach_gives_the_very_encoder_back() -> None:
    vit = small_vit()
    vit.head.requires_grad_(False)
    grads, expected = trainable(vit), output(vit)
    model = init(vit)
    model.add_adapter("a", UniPELTConfig(PrefixConfig(), LoRAConfig(rank=2), SeqBnConfig(size=4)))
    model.add_adapter("b", PromptConfig(length=2))
    model.train_adapter(Stack("a", "b"))
    assert hooks(vit) > 0
    assert not torch.equal(output(model), expected)
    assert model.detach() is vit
    assert hooks(vit) == 0
    assert trainable(vit) == grads
    assert torch.equal(output(vit), expected)


def test_detached_model_refuses_to_go_on_and_the_encoder_can_be_adapted_anew() -> None:
    model = filled("lora")
    vit = model.detach()
    with pytest.raises(ValueError, match=r"was detached from its encoder; call mmadapters\.init"):
        model.add_adapter("new", LoRAConfig())
    assert model.adapter_names == ()
    assert hooks(vit) == 0
    again = init(vit)
    again.add_adapter("new", LoRAConfig(rank=2))
    assert again.adapter_names == ("new",)


def test_model_in_a_model_is_refused() -> None:
    model = init(small_vit())
    with pytest.raises(ValueError, match="is an AdapterModel already: add adapters to it"):
        init(model)


def test_encoder_that_another_model_acts_on_is_refused_until_that_one_lets_go() -> None:
    model = filled("lora")
    with pytest.raises(ValueError, match="another AdapterModel acts on this backbone"):
        init(model.backbone)
    assert init(model.detach()).adapter_names == ()


def test_summary_tells_the_right_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    model = init(small_vit())
    model.add_adapter("pets", BottleneckConfig(size=4))
    model.add_adapter("night owl", LoRAConfig(rank=2))
    model.add_adapter("shared", CompacterConfig(size=4))
    model.train_adapter("pets")
    model.merge_adapter("night owl")
    base = sum(parameter.numel() for parameter in model.backbone.parameters())
    counts = {
        "pets": 4 * (2 * 32 * 4 + 4 + 32),
        "night owl": 2 * 2 * 2 * 2 * 32,
        "shared": 4 * (2 * (32 + 4) + 4 + 32) + 4**3,
    }
    rows = {row.name: row for row in model.adapter_summary()}
    text = capsys.readouterr().out
    assert list(rows) == list(counts)
    assert {name: row.parameters for name, row in rows.items()} == counts
    assert {name: row.sites for name, row in rows.items()} == {
        "pets": 4, "night owl": 4, "shared": 4,
    }  # fmt: skip
    for name, row in rows.items():
        assert row.share == pytest.approx(100 * counts[name] / base)
        line = next(line for line in text.splitlines() if line.startswith(name))
        assert f"{counts[name]:,}" in line
        assert f"{row.share:.2f}" in line
        assert row.method in line
    assert [row.active for row in rows.values()] == [True, False, False]
    assert [row.trainable for row in rows.values()] == [True, False, False]
    assert [row.merged for row in rows.values()] == [False, True, False]
    assert text.startswith(f"VisionTransformer: {base:,} frozen parameters\n")
    assert re.search(r"^pets .* active, trainable$", text, re.MULTILINE)
    assert re.search(r"^night owl .* merged$", text, re.MULTILINE)
    assert re.search(r"^shared .* idle$", text, re.MULTILINE)


def test_summary_of_an_empty_model_is_its_head(capsys: pytest.CaptureFixture[str]) -> None:
    assert init(small_vit()).adapter_summary() == []
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_attributes_and_methods_of_the_encoder_pass_through() -> None:
    model = filled("lora")
    assert model.num_classes == 5
    assert model.patch_embed is model.backbone.patch_embed
    with torch.no_grad():
        plain = model.forward_features(images())
        model.set_active_adapters("lora")
        acting = model.forward_features(images())
        features = model.forward_intermediates(images(), indices=1, intermediates_only=True)
    assert acting.shape == plain.shape == (2, 17, 32)
    assert not torch.equal(acting, plain)
    assert features[0].shape == (2, 32, 4, 4)


def test_attribute_that_nobody_has_is_named() -> None:
    model = filled("lora")
    with pytest.raises(AttributeError, match="forward_featuers"):
        _ = model.forward_featuers
    assert not hasattr(model, "config")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_adapters_are_made_in_the_dtype_of_the_encoder(dtype: torch.dtype) -> None:
    model = init(small_vit().to(dtype))
    model.add_adapter("a", ConfigUnion(SeqBnConfig(norm="before"), LoRAConfig(rank=2), SSFConfig()))
    assert {parameter.dtype for parameter in model.adapter("a").parameters()} == {dtype}
    model.set_active_adapters("a")
    with torch.no_grad():
        assert model(images().to(dtype)).dtype == dtype


@pytest.mark.parametrize("move", ["bfloat16", "half", "double"])
def test_adapters_move_with_the_model(move: str) -> None:
    model = filled("bottleneck", "lora", "ssf")
    model.train_adapter(Stack("bottleneck", "lora", "ssf"))
    before = output(model)
    getattr(model, move)()
    dtype = {"bfloat16": torch.bfloat16, "half": torch.float16, "double": torch.float64}[move]
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    with torch.no_grad():
        after = model(images().to(dtype))
    assert after.dtype == dtype
    assert (after.float() - before).abs().max() < (1e-5 if dtype == torch.float64 else 0.1)
    model.to(torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_adapter_of_a_block_follows_the_dtype_of_that_block() -> None:
    vit = small_vit()
    last = vit.blocks[1].to(torch.bfloat16)
    last.register_forward_pre_hook(lambda module, args: (args[0].bfloat16(),))
    last.register_forward_hook(lambda module, args, result: result.float())
    model = init(vit)
    model.add_adapter(
        "a",
        ConfigUnion(
            SeqBnConfig(size=4),
            LoRAConfig(rank=2),
            SSFConfig(),
            PrefixConfig(length=2),
            CompacterConfig(size=4),
        ),
    )
    found = {
        (site.split(".")[2], parameter.dtype)
        for site, module in model.adapter("a").entries()
        for name, parameter in module.named_parameters()
        if site.startswith("vision.blocks") and "rule" not in name
    }
    assert found == {("0", torch.float32), ("1", torch.bfloat16)}
    randomise(model.adapter("a"))
    plain = output(model)
    model.set_active_adapters("a")
    assert not torch.equal(output(model), plain)


def test_prompts_and_prefixes_leave_the_encoder_trainable_from_outside() -> None:
    """A head of the user's own on top gets its gradient as ever."""
    model = init(small_vit())
    model.add_adapter("a", PromptConfig(length=2))
    model.train_adapter("a")
    head = nn.Linear(5, 2)
    head(model(images())).square().sum().backward()
    assert head.weight.grad is not None
    assert head.weight.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    assert all(parameter.grad is not None for parameter in model.adapter("a").parameters())
