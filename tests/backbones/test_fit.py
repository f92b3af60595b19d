"""`weights=`: what fits of a file is loaded, what is left is named, a broken trunk is refused."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import transformers
from families import seeded
from safetensors.torch import save_file
from torch import Tensor

from mmadapters import load_backbone

VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
TIMM = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}
CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "layers": 2, "width": 64},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "layers": 2, "width": 64, "heads": 2},
}
TORCHAUDIO = {
    "encoder_embed_dim": 32,
    "encoder_num_layers": 2,
    "encoder_num_heads": 2,
    "encoder_ff_interm_features": 48,
}


def written(state: dict[str, Tensor], folder: Path) -> Path:
    path = folder / "weights.safetensors"
    save_file({key: tensor.clone().contiguous() for key, tensor in state.items()}, path)
    return path


def classifier(labels: int = 5) -> transformers.ViTForImageClassification:
    config = transformers.ViTConfig(**VIT, num_labels=labels)
    return seeded(lambda: transformers.ViTForImageClassification(config))  # type: ignore[return-value]


def test_googles_file_with_a_classifier_and_no_pooler_is_loaded(tmp_path: Path) -> None:
    model = classifier()
    path = written(model.state_dict(), tmp_path)
    with pytest.warns(UserWarning, match=r"takes from .* what fits") as caught:
        loaded = load_backbone("hf/vit", weights=path, **VIT)
    (warning,) = caught
    assert "2 tensors that it lacks keep random values (pooler.dense.bias" in str(warning.message)
    assert "2 tensors of it have no place in the model and are not used (classifier.bias" in str(
        warning.message
    )
    state = model.vit.state_dict()
    assert all(torch.equal(loaded.state_dict()[key], state[key]) for key in state)
    # As `pretrained` does it.
    model.save_pretrained(tmp_path / "folder")
    theirs = load_backbone(f"hf/{tmp_path / 'folder'}", pretrained=True)
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images).last_hidden_state, theirs(images).last_hidden_state)


@pytest.mark.parametrize(
    ("name", "source", "target", "left"),
    [
        ("timm/vit_tiny_patch16_224", {"num_classes": 7}, {"num_classes": 0}, "head.weight"),
        ("timm/vit_tiny_patch16_224", {"num_classes": 0}, {"num_classes": 7}, "head.weight"),
        ("timm/vit_tiny_patch16_224", {"num_classes": 7}, {"num_classes": 3}, "head.weight"),
        ("torchaudio/WAV2VEC2_BASE", {"aux_num_out": 9}, {"aux_num_out": None}, "aux.weight"),
        ("torchaudio/WAV2VEC2_BASE", {"aux_num_out": None}, {"aux_num_out": 9}, "aux.weight"),
    ],
)
def test_heads_of_a_library_need_not_fit(
    name: str, source: dict, target: dict, left: str, tmp_path: Path
) -> None:
    small = {"torchaudio": TORCHAUDIO, "timm": TIMM}[name.partition("/")[0]]
    model = seeded(lambda: load_backbone(name, **small, **source))
    path = written(model.state_dict(), tmp_path)
    with pytest.warns(UserWarning, match=r"takes from .* what fits") as caught:
        loaded = load_backbone(name, weights=path, **small, **target)
    assert left in str(caught[0].message)
    theirs, mine = model.state_dict(), loaded.state_dict()
    trunk = [key for key in mine if key in theirs and not key.startswith(("head", "aux"))]
    assert len(trunk) > 20
    assert all(torch.equal(mine[key], theirs[key]) for key in trunk)


def test_one_tower_of_a_file_with_two_is_loaded(tmp_path: Path) -> None:
    config = transformers.CLIPConfig(
        text_config={**VIT, "vocab_size": 64, "max_position_embeddings": 8},
        vision_config=VIT,
        projection_dim=16,
    )
    model = seeded(lambda: transformers.CLIPModel(config))
    path = written(model.state_dict(), tmp_path)
    with pytest.warns(UserWarning, match=r"have no place .*text_model"):
        loaded = load_backbone("hf/clip_vision_model", weights=path, **VIT)
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        states = model.vision_model(images).last_hidden_state
        assert torch.equal(loaded(images).last_hidden_state, states)


def test_a_file_that_fits_whole_gives_no_warning(tmp_path: Path) -> None:
    model = seeded(lambda: load_backbone("hf/vit", **VIT))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_backbone("hf/vit", weights=written(model.state_dict(), tmp_path), **VIT)


@pytest.mark.parametrize(
    ("name", "options", "key"),
    [
        ("hf/vit", VIT, "embeddings.cls_token"),
        ("hf/vit", VIT, "layernorm.bias"),
        ("timm/vit_tiny_patch16_224", TIMM, "pos_embed"),
        ("timm/vit_tiny_patch16_224", TIMM, "norm.weight"),
        ("open_clip/ViT-B-32", CLIP, "text_projection"),
        ("open_clip/ViT-B-32", CLIP, "visual.proj"),
        ("torchaudio/WAV2VEC2_BASE", TORCHAUDIO, "feature_extractor.conv_layers.2.conv.weight"),
    ],
)
def test_a_file_without_some_of_the_trunk_is_refused(
    name: str, options: dict, key: str, tmp_path: Path
) -> None:
    state = seeded(lambda: load_backbone(name, **options)).state_dict()
    del state[key]
    with pytest.raises(ValueError, match=rf"does not fit {name}: 1 missing \({key}\)"):
        load_backbone(name, weights=written(state, tmp_path), **options)


def test_another_shape_in_the_trunk_is_refused(tmp_path: Path) -> None:
    path = written(classifier().state_dict(), tmp_path)
    with pytest.raises(ValueError, match="of another shape"):
        load_backbone("hf/vit", weights=path, **{**VIT, "intermediate_size": 40})


def test_a_file_of_a_deeper_encoder_is_refused(tmp_path: Path) -> None:
    path = written(classifier().state_dict(), tmp_path)
    with pytest.raises(ValueError, match="unexpected"):
        load_backbone("hf/vit", weights=path, **{**VIT, "num_hidden_layers": 1})


def test_a_file_of_which_nothing_fits_is_refused(tmp_path: Path) -> None:
    path = written({"a.weight": torch.ones(3)}, tmp_path)
    for name, options in (("hf/vit", VIT), ("timm/vit_tiny_patch16_224", TIMM)):
        with pytest.raises(ValueError, match=r"does not fit .* missing .* 1 unexpected"):
            load_backbone(name, weights=path, **options)


def test_loading_moves_no_random_state(tmp_path: Path) -> None:
    path = written(classifier().state_dict(), tmp_path)
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load_backbone("hf/vit", weights=path, **VIT)
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)
