"""Facts about `nano/clip`: one network and one tokenizer in both libraries, small, its recipe."""

import pytest
import torch

from mmadapters.tasks.data.synthetic.scenes import PRETRAINING, UNSEEN, describe, make_scene
from mmadapters.tasks.zoo.pretrain.__main__ import main as pretrain
from mmadapters.zoo import NANO, image_transform, load_nano, load_tokenizer, nano_config

TEXTS = [
    "a photo of a goldfish",
    "a large red star above a small blue circle",
    "Zwölf ÄPFEL & 🍎, nothing it was trained on",
    "",
    "a small green ring at the top left and " * 20,
]


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tokens():
    return load_tokenizer("nano/clip")(TEXTS)


def test_it_is_the_libraries_own_class():
    from open_clip import CLIP
    from transformers import CLIPModel

    assert type(load_nano("nano/clip")) is CLIP
    assert type(load_nano("nano/clip", library="hf")) is CLIPModel


def test_both_libraries_give_the_same_vectors_and_logits(images, tokens):
    ours, theirs = load_nano("nano/clip"), load_nano("nano/clip", library="hf")
    with torch.inference_mode():
        image = ours.encode_image(images, normalize=True)
        text = ours.encode_text(tokens, normalize=True)
        logits = ours.logit_scale.exp() * image @ text.T
        output = theirs(input_ids=tokens, pixel_values=images)
    torch.testing.assert_close(output.image_embeds, image, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.text_embeds, text, atol=1e-5, rtol=0)
    # logits are cosines times a scale of up to 100, and so is their error
    torch.testing.assert_close(output.logits_per_image, logits, atol=1e-3, rtol=0)


def test_padding_after_the_end_changes_nothing_in_hf(tokens):
    model = load_nano("nano/clip", library="hf")
    short = load_tokenizer("nano/clip", library="hf")(TEXTS[0], return_tensors="pt")
    with torch.inference_mode():
        padded = model(input_ids=tokens[:1], pixel_values=torch.zeros(1, 3, 64, 64)).text_embeds
        bare = model(input_ids=short.input_ids, pixel_values=torch.zeros(1, 3, 64, 64)).text_embeds
    torch.testing.assert_close(bare, padded, atol=1e-5, rtol=0)


def test_both_tokenizers_give_the_same_ids(tokens):
    hf = load_tokenizer("nano/clip", library="hf")
    ids = hf(TEXTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(ids, tokens)


def test_every_text_ends_in_the_highest_id(tokens):
    hf = load_tokenizer("nano/clip", library="hf")
    assert tokens.shape == (len(TEXTS), 48)
    assert hf.eos_token_id == len(hf) - 1
    assert (tokens.amax(dim=1) == hf.eos_token_id).all()
    assert ((tokens == hf.eos_token_id).sum(dim=1) == 1).all()


def test_any_text_comes_back_from_its_ids_in_lower_case():
    hf = load_tokenizer("nano/clip", library="hf")
    for text in TEXTS[:4]:
        back = hf.decode(hf(text).input_ids, skip_special_tokens=True)
        assert back.strip() == text.lower().strip()


@pytest.mark.parametrize("vocabulary", [PRETRAINING, UNSEEN], ids=["pretraining", "unseen"])
def test_captions_of_scenes_fit_the_context(vocabulary):
    hf = load_tokenizer("nano/clip", library="hf")
    captions = [describe(make_scene(seed, vocabulary), vocabulary) for seed in range(500)]
    cut = [len(ids) > 48 for ids in hf(captions).input_ids]
    # a word that it has no token for takes several; where they are too many, the caption is cut
    assert sum(cut) <= (0 if vocabulary is PRETRAINING else 0.1 * len(cut))


@pytest.mark.parametrize("library", NANO["nano/clip"].libraries)
def test_it_comes_in_fp32_and_eval_mode(library):
    model = load_nano("nano/clip", library=library)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_it_is_at_most_12_megabytes():
    directory = NANO["nano/clip"].directory
    assert sum(file.stat().st_size for file in directory.iterdir()) <= 12e6


def test_its_card_claims_what_was_asked_of_it():
    figures = nano_config("nano/clip")["figures"]
    assert figures["scene_recall"]["value"] >= 0.60
    assert figures["zero_shot"]["value"] >= 0.20


def test_only_what_reads_text_has_a_tokenizer():
    with pytest.raises(ValueError, match="no tokenizer"):
        load_tokenizer("nano/vit")
    assert callable(image_transform("nano/clip"))


def test_its_recipe_makes_a_directory_that_loads(tmp_path, tiny_photos, monkeypatch):
    from mmadapters.tasks.zoo import clip_figures
    from mmadapters.tasks.zoo.pretrain import clip
    from mmadapters.zoo.clip import load

    monkeypatch.setattr(clip_figures, "GALLERY", 20)
    monkeypatch.setattr(clip, "TOKENIZER_SCENES", 200)
    monkeypatch.setitem(clip.VISION, "layers", 1)
    monkeypatch.setitem(clip.TEXT, "layers", 1)
    arguments = ["--steps=2", "--batch-size=4", "--scene-batch-size=4", "--scenes=8"]
    arguments += ["--device=cpu", "--no-compile"]
    out = tmp_path / "clip"
    pretrain(["clip", "--data", str(tiny_photos), "--out", str(out), *arguments])
    assert {file.name for file in out.iterdir()} == {
        *("model.safetensors", "config.json", "README.md"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    assert load(out, "hf").config.vision_config.num_hidden_layers == 1
    assert all(figure.holds for figure in clip_figures.verify(out, tiny_photos))


def test_vision_starts_from_the_vit():
    """Where `ln_pre` is left out, the start is exactly the ViT's tokens."""
    from mmadapters.tasks.zoo.pretrain.clip import EMBED_DIM, TEXT, VISION, start_vision
    from mmadapters.zoo.clip import build
    from mmadapters.zoo.files import read_weights

    vit = load_nano("nano/vit")
    clip = build(embed_dim=EMBED_DIM, vision_cfg=VISION, text_cfg=TEXT | {"vocab_size": 512})
    start_vision(clip.visual, read_weights(NANO["nano/vit"].directory))
    clip.visual.ln_pre = torch.nn.Identity()
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = vit.forward_features(x)[:, 0] @ clip.visual.proj
        torch.testing.assert_close(clip.visual(x), expected, atol=1e-3, rtol=1e-3)
