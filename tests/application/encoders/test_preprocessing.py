"""Pictures as encoders want them, against the libraries' own transforms."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import timm.data
import torch
import transformers
from families.small import small_vit
from PIL import Image

from mmadapters import load_backbone
from mmadapters.tasks.config.schema import BackboneConfig
from mmadapters.tasks.encoders.vision import image_preprocessing, normalised, to_tensor
from mmadapters.zoo import image_transform


def picture(width: int, height: int) -> Image.Image:
    """Smooth colours with noise on them, so that filters and crops make a difference."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 / width, y * 255 / height, (x + y) % 256], axis=-1)
    return Image.fromarray(
        np.clip(pixels + rng.normal(0, 30, pixels.shape), 0, 255).astype("uint8")
    )


PICTURES = [picture(90, 61), picture(40, 200), picture(64, 64)]


def of(name: str, backbone: Any = None, **config: Any) -> dict[str, Any]:
    backbone = load_backbone(name, **config.get("options", {})) if backbone is None else backbone
    found = image_preprocessing(BackboneConfig(name=name, **config), backbone)
    assert json.loads(json.dumps(found)) == found
    return found


@pytest.mark.parametrize("name", ["nano/vit", "nano/clip"])
@pytest.mark.parametrize("library", [None, "hf"])
def test_nano_encoders_get_what_they_were_trained_on(name: str, library: str | None) -> None:
    how = of(name, options={} if library is None else {"library": library})
    for image in PICTURES:
        torch.testing.assert_close(to_tensor(image, how), image_transform(name)(image))


def test_a_nano_encoder_of_another_size_gets_pictures_of_that_size() -> None:
    how = of("nano/vit", options={"img_size": 96})
    assert to_tensor(PICTURES[0], how).shape == (3, 96, 96)


@pytest.mark.parametrize(
    "name",
    [
        "test_vit.r160_in1k",  # crop_pct 0.95
        "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
        "vit_base_patch16_siglip_224.webli",  # squashes
        "vit_small_patch14_dinov2.lvd142m",
    ],
)
def test_timm_models_get_what_timm_gives_them(name: str) -> None:
    cfg = timm.get_pretrained_cfg(name)
    model = small_vit(img_size=cfg.input_size[1], patch_size=cfg.input_size[1] // 2)
    model.pretrained_cfg = dataclasses.asdict(cfg)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    how = of(f"timm/{name}", model)
    for image in PICTURES:
        torch.testing.assert_close(to_tensor(image, how), transform(image))


def test_a_timm_model_built_for_another_size_gets_pictures_of_that_size() -> None:
    model = timm.create_model("test_vit", img_size=(64, 96))
    how = of("timm/test_vit", model)
    assert (how["height"], how["width"]) == (64, 96)
    assert to_tensor(PICTURES[0], how).shape == (3, 64, 96)


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
def test_open_clip_models_get_what_open_clip_gives_them(mode: Any) -> None:
    model = open_clip.create_model(
        "ViT-B-32", pretrained=None, force_preprocess_cfg={"resize_mode": mode}, device="meta"
    )
    settings = open_clip.transform.PreprocessCfg(**model.visual.preprocess_cfg)
    transform = open_clip.transform.image_transform_v2(settings, is_train=False)
    how = of("open_clip/ViT-B-32", model)
    for image in PICTURES:
        torch.testing.assert_close(to_tensor(image, how), transform(image))


PROCESSORS = {
    "vit": transformers.ViTImageProcessor(size={"height": 32, "width": 32}),
    "clip": transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ),
    "siglip": transformers.SiglipImageProcessor(size={"height": 32, "width": 48}),
    "dinov2": transformers.BitImageProcessor(
        size={"shortest_edge": 40},
        crop_size={"height": 32, "width": 32},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ),
    "blip": transformers.BlipImageProcessor(size={"height": 32, "width": 32}),
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_transformers_models_get_what_their_processor_gives_them(kind: str, tmp_path: Path) -> None:
    processor = PROCESSORS[kind]
    processor.save_pretrained(tmp_path)
    backbone = load_backbone("hf/vit", num_hidden_layers=1, image_size=32)
    how = of("hf/vit", backbone, processor=str(tmp_path))
    # Sizes that leave an even margin: of an odd one, libraries cut the odd pixel on either side.
    for image in (picture(96, 64), picture(40, 200), picture(64, 64)):
        expected = torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"][0])
        found = to_tensor(image, how)
        assert found.shape == expected.shape
        # Some processors resize tensors, whose bicubic filter overshoots before it is rounded.
        assert (found - expected).abs().mean() < 0.02
        assert torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1] > 0.999


def test_a_folder_of_transformers_brings_its_own_processor(tmp_path: Path) -> None:
    backbone = load_backbone(
        "hf/vit", num_hidden_layers=1, image_size=32, hidden_size=24, num_attention_heads=2
    )
    backbone.save_pretrained(tmp_path)
    name = f"hf/{tmp_path}"
    assert of(name, backbone)["mean"] == [0.5, 0.5, 0.5]
    transformers.ViTImageProcessor(
        image_mean=[0.1, 0.2, 0.3], size={"height": 32, "width": 32}
    ).save_pretrained(tmp_path)
    assert of(name, backbone)["mean"] == [0.1, 0.2, 0.3]


@pytest.mark.parametrize(
    ("kind", "mean", "resize"),
    [
        ("vit", 0.5, "squash"),
        ("dinov2", 0.485, "shortest"),
        ("dinov2_with_registers", 0.485, "shortest"),
        ("dinov3_vit", 0.485, "squash"),
        ("clip", 0.48145466, "shortest"),
        ("clip_vision_model", 0.48145466, "shortest"),
        ("siglip", 0.5, "squash"),
        ("blip", 0.48145466, "squash"),
        ("beit", 0.5, "squash"),
        ("deit", 0.485, "shortest"),
    ],
)
def test_a_bare_type_of_transformers_gets_what_is_usual_for_it(
    kind: str, mean: float, resize: str
) -> None:
    config = transformers.CONFIG_MAPPING[kind]()
    holder = torch.nn.Module()
    holder.config = config  # type: ignore[assignment]
    how = of(f"hf/{kind}", holder)
    assert how["mean"][0] == mean
    assert how["resize"] == resize
    assert how["height"] == getattr(config, "vision_config", config).image_size


def test_a_picture_or_a_tensor_is_normalised_as_it_is() -> None:
    how = of("nano/vit")
    expected = (np.asarray(PICTURES[0]) / 255 - how["mean"]) / how["std"]
    expected = torch.from_numpy(expected).permute(2, 0, 1).float()
    torch.testing.assert_close(normalised(PICTURES[0], how), expected)
    pixels = torch.from_numpy(np.array(PICTURES[0])).permute(2, 0, 1)
    torch.testing.assert_close(normalised(pixels, how), expected)
    torch.testing.assert_close(normalised(pixels / 255, how), expected)


def test_grey_and_transparent_pictures_become_three_channels() -> None:
    how = of("nano/vit")
    assert to_tensor(PICTURES[0].convert("L"), how, 24).shape == (3, 24, 24)
    assert to_tensor(PICTURES[0].convert("RGBA"), how, (16, 24)).shape == (3, 16, 24)


def test_what_cannot_be_prepared_is_said_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nano/wav2vec2 reads no images"):
        of("nano/wav2vec2")
    backbone = load_backbone("hf/vit", num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"the image processor of '.*' cannot be loaded: "):
        of("hf/vit", backbone, processor=str(tmp_path))
    with pytest.raises(ValueError, match="Wav2Vec2Model reads no images"):
        of("hf/wav2vec2", load_backbone("nano/wav2vec2"))
