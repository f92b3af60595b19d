"""Bottlenecks that become channels of the feed-forward part beside which they stand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from families import families, tensors
from families.small import filled, output, randomise, small_vit
from torch import Tensor, nn

from mmadapters import (
    AdapterModel,
    BottleneckConfig,
    ConfigUnion,
    LoRAConfig,
    ParallelPlacement,
    ParBnConfig,
    SeqBnConfig,
    Stack,
    init,
)

BESIDE = ParallelPlacement(input="normed")
FAMILIES = families()
# SwiGLU and T5's gated GELU; a norm inside the feed-forward part, and one behind it.
OTHERS = {"timm-dinov2-swiglu", "timm-eva02", "timm-eva02-packed", "hf-dinov2-swiglu", "hf-t5"}
OTHERS |= {"open_clip-own_attention", "timm-vit-post"}


def beside(**options: Any) -> BottleneckConfig:
    return BottleneckConfig(**{"placement": BESIDE, "size": 4, "activation": "gelu"} | options)


def adapted(encoder: nn.Module, config: Any) -> AdapterModel:
    model = init(encoder)
    model.add_adapter("a", config)
    randomise(model.adapter("a"))
    model.set_active_adapters("a")
    return model.eval()


def outputs(model: nn.Module, name: str) -> list[Tensor]:
    args, kwargs = FAMILIES[name].inputs()
    with torch.no_grad():
        return tensors(model(*args, **kwargs))


def state(model: AdapterModel) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.backbone.state_dict().items()}


def same_state(model: AdapterModel, before: dict[str, Tensor]) -> bool:
    now = model.backbone.state_dict()
    return list(now) == list(before) and all(torch.equal(now[key], before[key]) for key in before)


def sizes(model: AdapterModel) -> list[Any]:
    leaves = [(leaf.out_features, leaf.in_features) for leaf in model.sites.leaves()]
    linears = [m for m in model.backbone.modules() if isinstance(m, nn.Linear)]
    return [leaves, [(m.out_features, m.in_features, m.weight.shape) for m in linears]]


def difference(some: list[Tensor], others: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - OTHERS))
def test_merged_bottleneck_gives_the_same_output_and_reset_the_same_bits(name: str) -> None:
    model = adapted(FAMILIES[name].build(), beside(scale=0.7))
    before, shapes, acting = state(model), sizes(model), outputs(model, name)
    with model.using(None):
        plain = outputs(model, name)
    model.merge_adapter("a")
    assert model.active_adapters is None
    merged = outputs(model, name)
    assert difference(merged, acting) <= 1e-5
    assert difference(merged, plain) > 10 * difference(merged, acting)
    assert sizes(model) != shapes
    model.reset_adapter("a")
    assert same_state(model, before)
    assert sizes(model) == shapes
    assert all(map(torch.equal, outputs(model, name), plain))


@pytest.mark.parametrize("activation", ["gelu_tanh", "quick_gelu", "relu", "silu"])
@pytest.mark.parametrize("name", ["timm-vit", "timm-eva-rope", "hf-wav2vec2", "open_clip-clip"])
def test_another_activation_is_refused_and_changes_nothing(name: str, activation: str) -> None:
    model = adapted(FAMILIES[name].build(), beside(activation=activation))
    before, shapes, acting = state(model), sizes(model), outputs(model, name)
    with pytest.raises(ValueError, match=r"adapter 'a' cannot be merged: .*with its activation"):
        model.merge_adapter("a")
    assert same_state(model, before)
    assert sizes(model) == shapes
    assert all(map(torch.equal, outputs(model, name), acting))


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_feed_forward_parts_of_another_kind_are_refused(name: str) -> None:
    model = adapted(FAMILIES[name].build(), beside())
    before, acting = state(model), outputs(model, name)
    with pytest.raises(ValueError, match=r"cannot be merged: .*(just two maps|two linear maps of)"):
        model.merge_adapter("a")
    assert same_state(model, before)
    assert all(map(torch.equal, outputs(model, name), acting))


@pytest.mark.parametrize(
    "options",
    [{"learn_scale": "channel"}, {"learn_scale": "scalar"}, {"dropout": 0.3}, {"scale": -2.0}],
    ids=lambda options: next(iter(options)),
)
def test_scales_are_folded_in_and_nothing_is_drawn(options: dict[str, Any]) -> None:
    model = adapted(small_vit(), beside(**options))
    acting = output(model)
    model.merge_adapter("a")
    assert (output(model) - acting).abs().max() < 1e-5
    assert torch.equal(output(model.train()), output(model.eval()))


def test_bottleneck_that_is_only_in_some_blocks_widens_those() -> None:
    model = adapted(small_vit(), beside(sites=("vision.blocks.1",)))
    acting, (first, second, *_) = output(model), model.backbone.blocks
    width = first.mlp.fc1.out_features
    model.merge_adapter("a")
    assert (first.mlp.fc1.out_features, second.mlp.fc1.out_features) == (width, width + 4)
    assert (output(model) - acting).abs().max() < 1e-5


def test_merged_encoder_is_the_library_s_own_with_a_wider_feed_forward_part() -> None:
    options = {"img_size": 32, "embed_dim": 32, "num_heads": 2, "depth": 3}
    model = adapted(timm.create_model("vit_tiny_patch16_224", **options), beside(size=8))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        acting = model(images)
        model.merge_adapter("a")
        encoder = model.detach()
        own = timm.create_model("vit_tiny_patch16_224", **options, mlp_ratio=4 + 8 / 32).eval()
        own.load_state_dict(encoder.state_dict())
        assert torch.equal(own(images), encoder(images))
        assert (own(images) - acting).abs().max() < 1e-5


def test_half_precision_is_merged_and_comes_back() -> None:
    model = adapted(small_vit().bfloat16(), beside())
    before = state(model)
    model.merge_adapter("a")
    assert {p.dtype for p in model.backbone.parameters()} == {torch.bfloat16}
    model.reset_adapter("a")
    assert same_state(model, before)


def test_compiled_encoder_runs_with_the_channels() -> None:
    model = adapted(small_vit(), beside())
    acting = output(model)
    compiled = torch.compile(model, backend="aot_eager")
    assert (output(compiled) - acting).abs().max() < 1e-5
    model.merge_adapter("a")
    assert (output(compiled) - acting).abs().max() < 1e-5
    model.reset_adapter("a")
    assert (output(compiled) - acting).abs().max() > 1e-3


def test_union_with_lora_on_other_maps_is_merged() -> None:
    model = adapted(small_vit(), ConfigUnion(LoRAConfig(rank=2, targets=("q", "v")), beside()))
    acting = output(model)
    model.merge_adapter("a")
    assert (output(model) - acting).abs().max() < 1e-5


def test_union_that_changes_the_same_map_is_refused() -> None:
    model = adapted(small_vit(), ConfigUnion(LoRAConfig(rank=2, targets=("up",)), beside()))
    with pytest.raises(ValueError, match=r"both changes vision.blocks.\d.ffn.up and adds channels"):
        model.merge_adapter("a")


def test_adapters_on_the_same_maps_and_merged_channels_keep_each_other_out() -> None:
    model = adapted(small_vit(), beside())
    model.add_adapter("lora", LoRAConfig(rank=2, targets=("down",)))
    with pytest.raises(ValueError, match=r"ffn.down would get more channels, and adapter 'lora'"):
        model.merge_adapter("a")
    model.delete_adapter("lora")
    model.merge_adapter("a")
    merged = output(model)
    with pytest.raises(ValueError, match=r"ffn.down has channels of adapter 'a', which is merged"):
        model.add_adapter("lora", LoRAConfig(rank=2, targets=("down",)))
    assert list(model.adapter_names) == ["a"]
    model.add_adapter("lora", LoRAConfig(rank=2, targets=("q",)))
    assert torch.equal(output(model), merged)


def test_two_adapters_are_merged_one_after_the_other() -> None:
    model = adapted(small_vit(), beside())
    model.add_adapter("b", beside(size=3))
    randomise(model.adapter("b"))
    before = state(model)
    model.set_active_adapters(Stack("a", "b"))
    acting = output(model)
    with pytest.raises(ValueError, match="'b' cannot be merged while 'a' acts before it"):
        model.merge_adapter("b")
    model.merge_adapter("a")
    model.merge_adapter("b")
    assert (output(model) - acting).abs().max() < 1e-5
    model.reset_adapter("b")
    model.reset_adapter("a")
    assert same_state(model, before)


def test_bottleneck_behind_a_sequential_one_is_not_merged_past_it() -> None:
    model = adapted(small_vit(), SeqBnConfig(size=4))
    model.add_adapter("b", beside())
    randomise(model.adapter("b"))
    model.set_active_adapters(Stack("b", "a"))
    acting = output(model)
    model.merge_adapter("b")
    assert (output(model) - acting).abs().max() < 1e-5


def test_merged_encoder_is_copied_with_its_channels() -> None:
    model = adapted(small_vit(), beside())
    model.merge_adapter("a")
    merged, twin = output(model), copy.deepcopy(model)
    model.reset_adapter("a")
    assert torch.equal(output(twin), merged)
    twin.reset_adapter("a")
    assert torch.equal(output(twin), output(model))


@pytest.mark.parametrize(
    "config",
    [
        ParBnConfig(size=4),
        beside(norm="before"),
        beside(norm="after"),
        beside(placement=ParallelPlacement(at=("attn", "ffn"), input="normed")),
    ],
    ids=["reads the residual", "norm before", "norm after", "beside attention"],
)
def test_other_bottlenecks_do_not_merge(config: BottleneckConfig) -> None:
    model = adapted(small_vit(), config)
    with pytest.raises(ValueError, match="no weight equals it"):
        model.merge_adapter("a")


def test_adapters_of_before_act_as_ever_beside_merged_channels() -> None:
    model = filled("bottleneck")
    model.add_adapter("a", beside())
    randomise(model.adapter("a"))
    model.set_active_adapters(Stack("a", "bottleneck"))
    acting = output(model)
    model.merge_adapter("a")
    assert model.active_adapters == Stack("bottleneck")
    assert (output(model) - acting).abs().max() < 1e-5


# The config of a transformers model


@pytest.mark.parametrize("name", ["hf-vit", "hf-clip", "hf-wav2vec2", "hf-blip-vqa", "hf-bert"])
def test_a_widened_model_is_saved_with_a_true_config(name: str, tmp_path: Path) -> None:
    encoder = FAMILIES[name].build()
    encoder.save_pretrained(tmp_path / "bare")  # which itself changes the config
    before = encoder.config.to_dict()
    model = adapted(encoder, beside())
    wanted = outputs(model, name)
    model.merge_adapter("a")
    model.backbone.save_pretrained(tmp_path)
    again = type(encoder).from_pretrained(tmp_path).eval()
    assert difference(outputs(again, name), wanted) < 1e-4
    model.reset_adapter("a")
    assert encoder.config.to_dict() == before


def test_widths_that_no_config_describes_are_not_saved(tmp_path: Path) -> None:
    encoder = FAMILIES["hf-vit"].build()
    before = encoder.config.to_dict()
    model = adapted(encoder, beside(sites=["vision.blocks.0.*"]))
    model.merge_adapter("a")
    assert encoder.config.to_dict() == before
    for saving in (encoder, copy.deepcopy(encoder)):
        with pytest.raises(ValueError, match="several widths, and its config has one"):
            saving.save_pretrained(tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    model.reset_adapter("a")
    encoder.save_pretrained(tmp_path / "bare")
    assert (
        difference(
            outputs(type(encoder).from_pretrained(tmp_path / "bare"), "hf-vit"),
            outputs(encoder.eval(), "hf-vit"),
        )
        == 0
    )
