"""Whether an encoder is the one that an adapter was made for: all that its states depend on."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers
from families import Family, families, seeded
from families.small import small_vit
from families.speech import SMALL, STABLE
from torch import Tensor, nn

from mmadapters import AdapterModel, BitFitConfig, LoRAConfig, init
from mmadapters.adapters.dependence import tensors_behind

CONFIG = LoRAConfig(rank=2)


def saved(backbone: nn.Module, folder: Path) -> Path:
    model = init(backbone)
    model.add_adapter("a", CONFIG)
    model.save_adapter(folder / "a", "a")
    return folder / "a"


def loads(backbone: nn.Module, folder: Path) -> AdapterModel:
    """A model that loaded the adapter without a warning."""
    model = init(backbone)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_adapter(folder)
    return model


def moved(backbone: nn.Module, name: str) -> nn.Module:
    with torch.no_grad():
        dict(backbone.named_parameters())[name].add_(0.5)
    return backbone


def like(target: nn.Module, source: nn.Module) -> nn.Module:
    """The target with the source's values wherever name and shape are the same."""
    there = target.state_dict()
    values = {
        name: tensor
        for name, tensor in source.state_dict().items()
        if name in there and there[name].shape == tensor.shape
    }
    target.load_state_dict(values, strict=False)
    return target


@pytest.mark.parametrize("family", list(families().values()), ids=list(families()))
@torch.no_grad()
def test_tensors_behind_a_tower_are_those_that_change_its_states(family: Family) -> None:
    """Each parameter is moved in turn, and the states of the last block are looked at."""
    backbone = family.build().eval()
    args, kwargs = family.inputs()
    model = init(backbone)
    towers = model.sites.towers
    behind = tensors_behind(backbone, towers, lambda: backbone(*args, **kwargs))
    states: dict[str, list[Tensor]] = {}
    for name, tower in towers.items():
        tower.blocks[-1].module.register_forward_hook(
            lambda module, args, output, name=name: states.setdefault(name, []).append(
                (output if isinstance(output, Tensor) else output[0]).clone()
            )
        )

    def run() -> dict[str, list[Tensor]]:
        states.clear()
        backbone(*args, **kwargs)
        return dict(states)

    before = run()
    assert all(behind.values())
    for name, parameter in backbone.named_parameters():
        kept = parameter.clone()
        parameter.add_(torch.randn(parameter.shape))
        after = run()
        parameter.copy_(kept)
        for tower in towers:
            changed = any(map(lambda a, b: not torch.equal(a, b), before[tower], after[tower]))
            # A bias of the keys moves nothing but rounding, and is found all the same.
            if changed:
                assert name in behind[tower], f"{name} changes tower {tower}"


def mms(**options: Any) -> nn.Module:
    """A wav2vec2 with a language adapter in each block, as MMS has."""
    config = transformers.Wav2Vec2Config(
        **{**SMALL, **STABLE, "layerdrop": 0.0, "adapter_attn_dim": 4, **options}
    )
    return seeded(lambda: transformers.Wav2Vec2ForCTC(config))


SPEECH = "wav2vec2."


@pytest.mark.parametrize(
    ("tensor", "part"),
    [
        ("encoder.layers.0.adapter_layer.linear_1.weight", r"encoder.layers.\*.adapter_layer"),
        ("feature_extractor.conv_layers.3.conv.weight", r"feature_extractor.conv_layers.\*.conv"),
        ("feature_projection.projection.weight", "feature_projection.projection"),
        ("encoder.pos_conv_embed.conv.bias", "encoder.pos_conv_embed"),
        ("encoder.layers.1.attention.v_proj.bias", r"encoder.layers.\*.attention"),
        ("encoder.layers.1.feed_forward.output_dense.bias", r"encoder.layers.\*.feed_forward"),
    ],
)
def test_another_part_of_a_speech_encoder_is_refused_by_name(
    tensor: str, part: str, tmp_path: Path
) -> None:
    folder = saved(mms(), tmp_path)
    model = init(moved(mms(), SPEECH + tensor))
    with pytest.raises(ValueError, match=rf"with another {part} in tower 'audio'; load the same"):
        model.load_adapter(folder)
    assert model.adapter_names == ()
    model.load_adapter(folder, allow_different_weights=True)


def test_another_size_of_the_front_end_is_refused(tmp_path: Path) -> None:
    folder = saved(mms(), tmp_path)
    model = init(like(mms(conv_dim=(16,) * 5 + (24,) * 2), mms()))
    with pytest.raises(ValueError, match="with another feature_"):
        model.load_adapter(folder)


def test_heads_are_no_part_of_it(tmp_path: Path) -> None:
    folder = saved(mms(), tmp_path)
    loads(moved(like(mms(vocab_size=19), mms()), "lm_head.weight"), folder)
    loads(mms().wav2vec2, folder)
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    whole = seeded(lambda: transformers.ViTForImageClassification(config))
    folder = saved(whole, tmp_path / "vit")
    bare = seeded(lambda: transformers.ViTModel(config), seed=1)  # with a pooler of its own
    loads(like(bare, whole.vit), folder)


def test_a_bias_of_a_vit_is_part_of_it(tmp_path: Path) -> None:
    folder = saved(small_vit(), tmp_path)
    with pytest.raises(ValueError, match=r"with another blocks.\*.attn in tower 'vision'"):
        init(moved(small_vit(), "blocks.0.attn.qkv.bias")).load_adapter(folder)
    with pytest.raises(ValueError, match="with another pos_embed in tower 'vision'"):
        init(moved(small_vit(), "pos_embed")).load_adapter(folder)
    with pytest.raises(ValueError, match=r"with another vision\.norm in tower 'vision'"):
        init(moved(small_vit(), "norm.bias")).load_adapter(folder)
    loads(moved(small_vit(), "head.weight"), folder)


def test_resized_positions_load_with_a_warning(tmp_path: Path) -> None:
    folder = saved(small_vit(), tmp_path)
    model = init(like(small_vit(img_size=48), small_vit()))
    with pytest.warns(UserWarning, match="pos_embed of tower 'vision'"):
        model.load_adapter(folder)


def test_a_file_without_parts_loads_with_one_warning(tmp_path: Path) -> None:
    folder = saved(mms(), tmp_path)
    description = json.loads((folder / "adapter.json").read_text())
    for tower in description["backbone"]["towers"].values():
        del tower["parts"]
    del description["checksum"]
    (folder / "adapter.json").write_text(json.dumps(description))
    model = init(mms())
    with pytest.warns(UserWarning, match="all of tower 'audio' but the weights") as caught:
        model.load_adapter(folder)
    assert len(caught) == 1


def test_parts_that_were_trained_beside_an_adapter_are_not_compared(tmp_path: Path) -> None:
    model = init(small_vit())
    model.add_adapter("a", CONFIG)
    model.backbone.patch_embed.requires_grad_(True)
    moved(model.backbone, "patch_embed.proj.weight")
    model.save_adapter(tmp_path / "a", "a")
    loads(small_vit(), tmp_path / "a")
    model.save_pretrained(tmp_path / "all")
    again = AdapterModel.from_pretrained(tmp_path / "all", small_vit())
    assert torch.equal(again.patch_embed.proj.weight, model.patch_embed.proj.weight)


def test_blocks_that_were_trained_come_back_before_they_are_compared(tmp_path: Path) -> None:
    model = init(small_vit())
    model.add_adapter("a", CONFIG)
    model.backbone.blocks[1].requires_grad_(True)
    moved(model.backbone, "blocks.1.mlp.fc1.weight")
    model.save_pretrained(tmp_path / "all")
    again = AdapterModel.from_pretrained(tmp_path / "all", small_vit())
    assert torch.equal(again.blocks[1].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight)
    other = small_vit()
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with torch.no_grad():
        other.blocks[0].mlp.fc1.weight.add_(1)
    before["blocks.0.mlp.fc1.weight"] += 1
    with pytest.raises(ValueError, match="with other weights in tower 'vision'"):
        AdapterModel.from_pretrained(tmp_path / "all", other)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_an_adapter_of_biases_leaves_the_identity_alone(tmp_path: Path) -> None:
    model = init(small_vit())
    before = model.identity()
    model.add_adapter("a", BitFitConfig())
    model.set_active_adapters("a")
    with torch.no_grad():
        for parameter in model.adapter("a").parameters():
            parameter.add_(1)
    model.save_adapter(tmp_path / "a", "a")
    loads(small_vit(), tmp_path / "a")
    assert model.store.identity(anew=True) == before


@pytest.mark.parametrize("half", ["bf16", "fp16"])
def test_files_go_between_float32_and_open_clips_half_precision(half: str, tmp_path: Path) -> None:
    """open_clip keeps norms and some embeddings in float32 there."""
    config = {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 32,
            "layers": 2,
            "width": 32,
            "head_width": 16,
            "patch_size": 8,
        },
        "text_cfg": {"context_length": 8, "vocab_size": 32, "width": 32, "heads": 2, "layers": 2},
    }
    open_clip.factory._MODEL_CONFIGS["mmadapters-small"] = config

    def clip(precision: str, seed: int = 0) -> nn.Module:
        full = seeded(lambda: open_clip.create_model("mmadapters-small"), seed)
        model = open_clip.create_model("mmadapters-small", precision=precision)
        model.load_state_dict(full.state_dict())
        return model

    full = saved(clip("fp32"), tmp_path / "full")
    there = loads(clip(half), full)
    assert there.adapter_names == ("a",)
    lower = saved(clip(half), tmp_path / "half")
    loads(clip("fp32"), lower)
    with pytest.raises(ValueError, match="with other weights"):
        init(clip(half, seed=1)).load_adapter(full)


@torch.no_grad()
def test_finding_the_parts_leaves_the_encoder_as_it_was(tmp_path: Path) -> None:
    backbone = mms().train()
    modes = [module.training for module in backbone.modules()]
    wanted = [parameter.requires_grad for parameter in backbone.parameters()]
    state = torch.get_rng_state()
    args = (torch.zeros(1, 4800),)
    tensors_behind(backbone, init(mms()).sites.towers, lambda: backbone(*args))
    assert [module.training for module in backbone.modules()] == modes
    assert [parameter.requires_grad for parameter in backbone.parameters()] == wanted
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in backbone.parameters())
