"""Facts about `nano/blip`: transformers' own classes over `nano/vit`, its one file, its"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmadapters
from mmadapters.tasks.encoders.blip import BlipMatcher
from mmadapters.tasks.encoders.blip_captioner import BlipCaptioner
from mmadapters.tasks.encoders.blip_text import BlipTokenizer
from mmadapters.tasks.zoo import blip_figures
from mmadapters.tasks.zoo.pretrain.__main__ import main as pretrain
from mmadapters.tasks.zoo.pretrain.blip_model import LEARNT_BLOCKS, Blip, loss_of
from mmadapters.zoo import NANO, image_transform, load_nano, load_tokenizer, nano_config
from mmadapters.zoo.blip import CLASSES, build
from mmadapters.zoo.files import read_weights

NAMES = ("nano/blip-retrieval", "nano/blip-caption")
TEXTS = ["a photo of a goldfish", "a large red star above a small blue circle", ""]


@pytest.fixture(scope="module")
def trained() -> Blip:
    """The recipe's model with other values everywhere that it trains, and the rest as it was."""
    torch.manual_seed(0)
    model = Blip(nano_config(NAMES[0])["architecture"])
    with torch.no_grad():
        for parameter in {id(p): p for p in model.parameters() if p.requires_grad}.values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, 3, 64, 64), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    tokenizer = load_tokenizer(NAMES[0])
    return tokenizer(TEXTS, padding=True, return_tensors="pt").input_ids


def built(trained: Blip, kind: str) -> nn.Module:
    architecture = nano_config(NAMES[0])["architecture"]
    return build(architecture, trained.tensors(), kind)


def test_they_are_the_librarys_own_classes() -> None:
    import transformers

    assert type(load_nano(NAMES[0])) is transformers.BlipForImageTextRetrieval
    assert type(load_nano(NAMES[1])) is transformers.BlipForConditionalGeneration


@pytest.mark.parametrize("name", NAMES)
def test_lower_vision_blocks_are_those_of_nano_vit(name: str) -> None:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    vit: Any = load_nano("nano/vit")
    blip: Any = load_nano(name)
    depth = len(vit.blocks) - LEARNT_BLOCKS
    entered: list[Tensor] = []
    # Only what enters a block is the same in every version of transformers.
    blip.vision_model.encoder.layers[depth].register_forward_pre_hook(
        lambda module, args, kwargs: entered.append((*args, *kwargs.values())[0]),
        with_kwargs=True,
    )
    with torch.inference_mode():
        blip.vision_model(pixel_values=images)
        expected = vit.blocks[:depth](vit._pos_embed(vit.patch_embed(images)))
    torch.testing.assert_close(entered[0], expected, atol=1e-4, rtol=1e-4)
    upper = [f"vision_model.encoder.layers.{n}." for n in range(depth, len(vit.blocks))]
    weights = read_weights(NANO[name].directory)
    vision = {key for key in weights if key.startswith("vision_model.")}
    assert vision
    assert all(key.startswith((*upper, "vision_model.post_layernorm.")) for key in vision)


def test_the_decoder_shares_all_but_self_attention_with_the_encoder() -> None:
    encoder = dict(load_nano(NAMES[0]).text_encoder.named_parameters())  # type: ignore[union-attr]
    decoder = dict(load_nano(NAMES[1]).text_decoder.bert.named_parameters())  # type: ignore[union-attr]
    assert decoder.keys() == encoder.keys()
    for name, value in decoder.items():
        own = ".attention.self." in name or ".attention.output." in name
        assert torch.equal(value, encoder[name]) is not own, name


def test_what_is_trained_is_what_a_file_gives(
    trained: Blip, pictures: Tensor, tokens: Tensor
) -> None:
    matcher = BlipMatcher(mmadapters.init(built(trained, "retrieval")))
    captioner = BlipCaptioner(mmadapters.init(built(trained, "caption")))
    image = nano_config(NAMES[0])["image"]
    begun, encode = tokens.clone(), tokens.clone()
    begun[:, 0], encode[:, 0] = captioner.tokens.start, captioner.tokens.encode
    with torch.inference_mode():
        states = trained.image_tokens(trained.frozen_states(pictures))
        for backbone in (matcher.backbone, captioner.backbone):
            found = blip_figures.image_tokens(backbone, pictures, image=image)
            torch.testing.assert_close(found, states, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            matcher.texts(tokens), trained.text_proj(trained.encode(tokens)), atol=1e-4, rtol=1e-4
        )
        torch.testing.assert_close(
            matcher.match(states, encode),
            trained.itm_head(trained.encode(encode, states)),
            atol=1e-4,
            rtol=1e-4,
        )
        losses, counts = captioner.losses(states, begun, prompt=1)
        logits = trained.logits(begun[:, :-1], states).log_softmax(dim=-1)
    expected = -logits.gather(2, tokens[:, 1:, None])[..., 0] * (tokens[:, 1:] != 0)
    torch.testing.assert_close(losses, expected.sum(dim=1), atol=1e-3, rtol=1e-4)
    assert counts.tolist() == (tokens[:, 1:] != 0).sum(dim=1).tolist()


def test_loss_is_the_sum_of_its_parts_and_reaches_all_that_is_trained(
    trained: Blip, pictures: Tensor, tokens: Tensor
) -> None:
    """Of two pairs each has but one negative, so nothing is left to chance."""
    trained.zero_grad()
    states, ids = trained.frozen_states(pictures[:2]).detach(), tokens[:2]
    loss = loss_of(trained, states, ids)
    loss.backward()
    for name, parameter in trained.named_parameters():
        assert (parameter.grad is not None) is parameter.requires_grad, name
    images = trained.image_tokens(states)
    begun, encode = ids.clone(), ids.clone()
    begun[:, 0], encode[:, 0] = 1024, 1025
    unit = nn.functional.normalize
    cosines = (
        unit(trained.vision_proj(images[:, 0])) @ unit(trained.text_proj(trained.encode(ids))).T
    )
    scaled = trained.logit_scale.exp() * cosines
    contrast = -(scaled.log_softmax(0).diagonal() + scaled.log_softmax(1).diagonal()).mean() / 2
    matching = torch.stack(
        [
            -trained.itm_head(trained.encode(encode[t][None], images[i][None])).log_softmax(1)[0, m]
            for t, i, m in [(0, 0, 1), (1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 1, 0), (1, 0, 0)]
        ]
    ).mean()
    logits = trained.logits(begun[:, :-1], images).log_softmax(dim=-1)
    right = logits.gather(2, ids[:, 1:, None])[..., 0]
    smooth = 0.9 * right + 0.1 * logits.mean(dim=-1)
    words = -smooth[ids[:, 1:] != 0].mean()
    torch.testing.assert_close(loss, contrast + matching + words, atol=1e-4, rtol=1e-4)


def test_tokens_follow_the_tokenizers() -> None:
    model = mmadapters.init(load_nano(NAMES[1]))
    tokens = BlipCaptioner(model).tokens
    source: Any = load_tokenizer(NAMES[1])
    assert (tokens.pad, tokens.end) == (source.pad_token_id, source.eos_token_id)
    assert (tokens.start, tokens.encode) == (len(source), len(source) + 1)
    tokenizer = BlipTokenizer(source, tokens)
    assert [text.strip() for text in tokenizer.decode(tokenizer.answers(TEXTS))] == TEXTS


def test_it_describes_drawn_scenes() -> None:
    """Of the test seeds: a caption names a colour that is there, most of the time."""
    from mmadapters.tasks.data.synthetic import scenes

    made = [scenes.make_scene(seed, scenes.PRETRAINING) for seed in scenes.TEST_SEEDS[:40]]
    drawn, _ = scenes.render(made, scenes.PRETRAINING, size=64)
    image = nano_config(NAMES[1])["image"]
    model = load_nano(NAMES[1])
    written = blip_figures.describe(model, blip_figures.image_tokens(model, drawn, image=image))
    colours = [
        any(thing.colour in text for thing in scene.things)
        for scene, text in zip(made, written, strict=True)
    ]
    assert sum(colours) > 30


def test_a_picture_becomes_what_it_reads() -> None:
    from PIL import Image

    pixels = image_transform(NAMES[0])(Image.new("L", (80, 120), 128))
    assert pixels.shape == (3, 64, 64)


def test_it_ships_in_at_most_10_mb_of_fp16() -> None:
    from safetensors import safe_open

    path = NANO[NAMES[0]].directory / "model.safetensors"
    assert path.stat().st_size <= 10_000_000
    with safe_open(path, "pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F16"}  # noqa: SIM118


def test_the_recipe_makes_what_is_loaded_and_a_card(
    tiny_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blip_figures, "GALLERY", 20)
    options = ["--steps", "2", "--scenes", "40", "--batch-size", "4", "--scene-batch-size", "8"]
    assert pretrain(["blip", "--data", str(tiny_photos), "--out", str(tmp_path), *options]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert [row["step"] for row in config["training"]["curve"]] == [2]
    assert "{" not in (tmp_path / "README.md").read_text()
    for kind in CLASSES:
        figures = blip_figures.verify(tmp_path, None, kind=kind)
        assert all(figure.holds for figure in figures)
