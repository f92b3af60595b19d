"""Facts about `nano/vit`: one network in both libraries, small, made by its recipe."""

import json

import pytest
import torch
from PIL import Image

from mmadapters.tasks.zoo.pretrain.__main__ import main as pretrain
from mmadapters.zoo import NANO, image_transform, load_nano, nano_config


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_it_is_the_libraries_own_class():
    from timm.models.vision_transformer import VisionTransformer
    from transformers import ViTModel

    assert type(load_nano("nano/vit")) is VisionTransformer
    assert type(load_nano("nano/vit", library="hf")) is ViTModel


def test_both_libraries_give_the_same_tokens(images):
    with torch.inference_mode():
        timm_tokens = load_nano("nano/vit").forward_features(images)
        hf_tokens = load_nano("nano/vit", library="hf")(images).last_hidden_state
    assert timm_tokens.shape == (3, 65, 224)
    torch.testing.assert_close(hf_tokens, timm_tokens, atol=1e-5, rtol=0)


@pytest.mark.parametrize("library", NANO["nano/vit"].libraries)
def test_it_comes_in_fp32_and_eval_mode(library):
    model = load_nano("nano/vit", library=library)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_it_takes_larger_images_and_a_new_head():
    model = load_nano("nano/vit", img_size=96, num_classes=5)
    with torch.inference_mode():
        assert model(torch.randn(2, 3, 96, 96)).shape == (2, 5)


def test_it_is_at_most_10_megabytes_with_its_probe():
    directory = NANO["nano/vit"].directory
    assert sum(file.stat().st_size for file in directory.glob("*.safetensors")) <= 10e6


def test_its_card_claims_what_was_asked_of_it():
    figures = nano_config("nano/vit")["figures"]
    assert figures["linear_probe"]["value"] >= 0.40
    assert figures["linear_probe_random_weights"]["value"] <= 0.10


def test_its_transform_makes_the_input_it_was_trained_on():
    x = image_transform("nano/vit")(Image.new("L", (100, 80), 255))
    assert x.shape == (3, 64, 64)
    image = nano_config("nano/vit")["image"]
    white = [(1 - m) / s for m, s in zip(image["mean"], image["std"], strict=True)]
    torch.testing.assert_close(x[:, 0, 0], torch.tensor(white))


@pytest.mark.parametrize(
    ("name", "library", "message"),
    [("nano/bert", None, "nano/vit"), ("nano/vit", "torchaudio", "timm")],
)
def test_what_does_not_exist_is_refused_with_what_does(name, library, message):
    with pytest.raises(ValueError, match=message):
        load_nano(name, library=library)


def test_its_recipe_makes_a_directory_that_loads(tmp_path, tiny_photos, monkeypatch):
    from mmadapters.tasks.zoo import vit_figures
    from mmadapters.tasks.zoo.pretrain import vit
    from mmadapters.zoo.vit import load

    monkeypatch.setitem(vit.ARCHITECTURE, "depth", 1)
    arguments = ["--steps=2", "--batch-size=8", "--probe-epochs=1", "--device=cpu", "--no-compile"]
    pretrain(["vit", "--data", str(tiny_photos), "--out", str(tmp_path / "vit"), *arguments])
    written = {file.name for file in (tmp_path / "vit").iterdir()}
    assert written == {"model.safetensors", "probe.safetensors", "config.json", "README.md"}
    assert load(tmp_path / "vit", "hf").config.num_hidden_layers == 1
    (figure,) = vit_figures.verify(tmp_path / "vit", tiny_photos)
    assert figure.holds
    assert json.loads((tmp_path / "vit/config.json").read_text())["training"]["steps"] == 2


def test_its_recipe_says_which_folder_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="tiny_imagenet_64"):
        pretrain(["vit", "--data", str(tmp_path), "--out", str(tmp_path / "vit")])
