"""Every image-text encoder of open_clip and transformers behind one interface, adapters acting."""

from __future__ import annotations

import pickle

import open_clip
import pytest
import torch
from families import Family
from families.small import randomise
from families.vision_language import CLIP_FAMILIES, END
from torch import Tensor
from torch.nn import functional as F

from mmadapters import AdapterModel, PromptConfig, SeqBnConfig, init, load_backbone
from mmadapters.tasks.config.schema import BackboneConfig
from mmadapters.tasks.encoders.clip import ClipTowers, load_tokenizer, text_limits, tokenizer
from mmadapters.zoo import NANO

BOTH = [f for f in CLIP_FAMILIES if not f.name.endswith(("-vision", "-text", "-projected"))]
PARTS = [f for f in CLIP_FAMILIES if f not in BOTH]
family = pytest.mark.parametrize("family", BOTH, ids=lambda f: f.name)


def inputs(family: Family) -> tuple[Tensor, Tensor]:
    args, kwargs = family.inputs()
    return args or (kwargs["pixel_values"], kwargs["input_ids"])


def adapted(family: Family) -> ClipTowers:
    model = init(family.build())
    model.add_adapter("a", SeqBnConfig(size=4))
    randomise(model.adapter("a"))
    return ClipTowers(model)


@family
def test_embeddings_are_those_of_the_librarys_own_forward(family: Family) -> None:
    towers = ClipTowers(init(family.build()))
    pixels, tokens = inputs(family)
    backbone = towers.encoder.backbone
    if family.name.startswith("hf"):
        output = backbone(input_ids=tokens, pixel_values=pixels)
        image, text = output.image_embeds, output.text_embeds
    else:
        output = backbone(pixels, tokens)
        output = list(output.values()) if isinstance(output, dict) else output
        image, text = output[:2]
    torch.testing.assert_close(F.normalize(towers.images(pixels), dim=-1), image)
    torch.testing.assert_close(F.normalize(towers.texts(tokens), dim=-1), text)
    assert towers.width == image.shape[1] == text.shape[1]


@family
def test_embeddings_are_not_normalised(family: Family) -> None:
    towers = ClipTowers(init(family.build()))
    pixels, tokens = inputs(family)
    for embedding in (towers.images(pixels), towers.texts(tokens)):
        assert not torch.allclose(embedding.norm(dim=-1), torch.ones(2), atol=1e-3)


def _project(backbone: torch.nn.Module, state: Tensor) -> Tensor:
    """A pooled token state of the text tower into the shared space, as the library would."""
    if hasattr(backbone, "get_text_features"):
        if backbone.config.model_type == "siglip":
            return backbone.text_model.get_submodule(_head(backbone.text_model))(state)
        return backbone.text_projection(state)
    holder = backbone if hasattr(backbone, "text_projection") else backbone.text
    projection = holder.proj if hasattr(holder, "proj") else holder.text_projection
    return projection(state) if isinstance(projection, torch.nn.Module) else state @ projection


def _head(text_model: torch.nn.Module) -> str:
    return next(name for name, _ in text_model.named_modules() if name.endswith("head"))


@family
def test_the_pooled_token_state_projected_is_the_texts_embedding(family: Family) -> None:
    if family.name == "open_clip-coca":
        pytest.skip("pools a class token of its own, which is no text token")
    towers = adapted(family)
    _, tokens = inputs(family)
    states, mask = towers.text_tokens(tokens)
    assert states.shape == (*tokens.shape, towers.text_width)
    if family.name == "open_clip-bert":
        pooled = (states * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
    else:
        pooled = states[:, -1]  # where the end stands
    expected = towers.texts(tokens)
    torch.testing.assert_close(_project(towers.encoder.backbone, pooled), expected)


def test_cocas_text_states_are_those_that_its_text_tower_returns_normed() -> None:
    coca = next(f for f in BOTH if f.name == "open_clip-coca")
    towers = adapted(coca)
    _, tokens = inputs(coca)
    text = towers.encoder.backbone.text
    states, _ = towers.text_tokens(tokens)
    torch.testing.assert_close(states, text.ln_final(text(tokens)[1]))


@family
def test_the_pooled_image_state_is_the_images_embedding(family: Family) -> None:
    towers = adapted(family)
    pixels, _ = inputs(family)
    states = towers.image_tokens(pixels)
    assert states.shape[::2] == (2, towers.image_width)
    backbone = towers.encoder.backbone
    if family.name == "hf-siglip":
        vision = backbone.vision_model
        pooled = getattr(vision, "vision_model", vision).head(states)
    elif family.name == "hf-clip":
        pooled = backbone.visual_projection(states[:, 0])
    elif family.name == "open_clip-coca":
        # Pooled by attention, then normed: the states are what the pooler reads.
        visual = backbone.visual
        pooled = visual.ln_post(visual.attn_pool(states))[:, 0] @ visual.proj
    elif family.name == "open_clip-timm_tower":
        pooled = backbone.visual.head(states[:, 0])
    else:
        pooled = states[:, 0] @ backbone.visual.proj
    torch.testing.assert_close(pooled, towers.images(pixels))


@family
def test_adapters_act_in_embeddings_and_states_and_receive_gradients(family: Family) -> None:
    towers = adapted(family)
    pixels, tokens = inputs(family)
    model = towers.encoder

    def everything() -> list[Tensor]:
        return [
            *(towers.images(pixels), towers.texts(tokens)),
            *(towers.image_tokens(pixels), towers.text_tokens(tokens)[0]),
        ]

    frozen = everything()
    model.train_adapter("a")
    for before, after in zip(frozen, everything(), strict=True):
        assert not torch.allclose(before, after, atol=1e-4)
        model.zero_grad()
        after.square().sum().backward()
        gradients = [p.grad for p in model.adapter("a").parameters() if p.grad is not None]
        assert any(gradient.abs().max() > 0 for gradient in gradients)
    assert not any(block.module._forward_hooks for block in _untouched(model))


def _untouched(model: AdapterModel) -> list:
    """The last block of each tower that has no prompt: where states are taken from."""
    return [model.sites.towers[name].blocks[-1] for name in ("vision", "text")]


@pytest.mark.parametrize("name", ["open_clip-clip", "hf-clip", "open_clip-bert"])
def test_prompts_are_no_image_tokens(name: str) -> None:
    family = next(f for f in BOTH if f.name == name)
    model = init(family.build())
    model.add_adapter("p", PromptConfig(length=3, sites=("vision",)))
    pixels, _ = inputs(family)
    towers = ClipTowers(model)
    plain = towers.image_tokens(pixels)
    model.set_active_adapters("p")
    prompted = towers.image_tokens(pixels)
    assert prompted.shape == plain.shape
    assert not torch.allclose(prompted, plain, atol=1e-5)


MASKS = {
    # One text that ends early: its end, or the first of its padding where that ends it.
    "hf-clip": ([5, 6, END, 0, 0, 0, 0, 0], 3),
    "hf-siglip": ([5, 6, 7, 1, 1, 1, 1, 1], 4),
    "open_clip-clip": ([5, 6, END, 0, 0, 0, 0, 0], 3),
    "open_clip-custom_text": ([5, 6, END, 0, 0, 0, 0, 0], 3),
    "open_clip-own_attention": ([5, 6, END, 0, 0, 0, 0, 0], 3),
    "open_clip-timm_tower": ([5, 6, END, 0, 0, 0, 0, 0], 3),
    "open_clip-bert": ([5, 6, 7, 9, 0, 0, 0, 0], 4),
    "open_clip-coca": ([5, 6, END, 0, 0, 0, 0, 0], 3),
}


@family
def test_padding_is_masked_out(family: Family) -> None:
    ids, length = MASKS[family.name]
    full = torch.tensor([5, 6, 7, 8, 9, 10, 11, END])
    _, mask = ClipTowers(init(family.build())).text_tokens(torch.stack([torch.tensor(ids), full]))
    assert mask.sum(dim=1).tolist() == [length, 8]
    assert mask[0, :length].all()


@pytest.mark.parametrize("name", ["hf-clip", "open_clip-bert"])  # open_clip's own take whole texts
def test_a_padded_text_is_the_text(name: str) -> None:
    family = next(f for f in BOTH if f.name == name)
    ids, length = MASKS[name]
    towers = adapted(family)
    towers.encoder.set_active_adapters("a")
    padded = torch.tensor([ids])
    short = padded[:, :length]
    torch.testing.assert_close(towers.texts(padded), towers.texts(short))
    states, mask = towers.text_tokens(padded)
    torch.testing.assert_close(states[mask], towers.text_tokens(short)[0][0])


@pytest.mark.parametrize("family", PARTS, ids=lambda f: f.name)
def test_one_tower_alone_is_refused(family: Family) -> None:
    with pytest.raises(ValueError, match="no image-text encoder"):
        ClipTowers(init(family.build()))


def test_blip_is_refused() -> None:
    from families.blip import hf_blip_retrieval

    with pytest.raises(ValueError, match="BlipForImageTextRetrieval"):
        ClipTowers(init(hf_blip_retrieval()))


def test_temperature_and_bias_are_the_encoders() -> None:
    names = {f.name: ClipTowers(init(f.build())) for f in BOTH}
    assert names["hf-siglip"].logit_bias is names["hf-siglip"].encoder.backbone.logit_bias
    assert names["open_clip-clip"].logit_bias is None
    for towers in names.values():
        assert towers.logit_scale is towers.encoder.backbone.logit_scale


CAPTION = "a large red star above a small blue ring"


@pytest.fixture(scope="module")
def nano() -> torch.nn.Module:
    return load_backbone("nano/clip")


def test_nano_clips_tokenizer_is_found_by_its_name(nano: torch.nn.Module) -> None:
    tokens = tokenizer(BackboneConfig(name="nano/clip"), nano)
    ids = tokens([CAPTION, "a star"])
    assert ids.shape == (2, 48)
    assert ids.dtype == torch.int64
    assert ids.argmax(dim=1).tolist() == [tokens.count(CAPTION) - 1, tokens.count("a star") - 1]
    again = pickle.loads(pickle.dumps(tokens))
    assert torch.equal(again([CAPTION, "a star"]), ids)


def test_a_processor_of_transformers_gives_the_same_ids(nano: torch.nn.Module) -> None:
    folder = str(NANO["nano/clip"].directory)
    theirs = tokenizer(
        BackboneConfig(name="hf/clip", processor=folder), load_backbone("nano/clip", library="hf")
    )
    ours = tokenizer(BackboneConfig(name="nano/clip"), nano)
    assert torch.equal(theirs([CAPTION]), ours([CAPTION]))
    assert theirs.count(CAPTION) == ours.count(CAPTION)


def test_a_long_text_is_cut_and_keeps_its_end(nano: torch.nn.Module) -> None:
    text = " ".join([CAPTION] * 9)
    for config in (
        BackboneConfig(name="nano/clip"),
        BackboneConfig(name="nano/clip", processor=str(NANO["nano/clip"].directory)),
    ):
        tokens = tokenizer(config, nano)
        ids = tokens([text])
        assert tokens.count(text) > ids.shape[1] == 48
        assert ids.argmax(dim=1).tolist() == [47]


def test_open_clips_tokenizer_is_found_by_the_models_name() -> None:
    config = BackboneConfig(name="open_clip/ViT-B-32")
    tokens = load_tokenizer(config, context_length=77, vocabulary=49408)
    assert torch.equal(tokens([CAPTION]), open_clip.tokenize([CAPTION]))
    assert tokens.count(CAPTION) == int((tokens([CAPTION]) != 0).sum())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BackboneConfig(name="hf/clip"), "set backbone.processor"),
        (BackboneConfig(name="nano/clip", processor="no/such/folder/here"), "no tokenizer"),
        (BackboneConfig(name="open_clip/ViT-B-32"), "49408 tokens and the encoder only 1024"),
    ],
)
def test_a_tokenizer_that_is_not_there_or_does_not_fit_is_one_sentence(
    config: BackboneConfig, message: str, nano: torch.nn.Module
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        tokenizer(config, nano)
    assert "\n" not in str(error.value)


@family
def test_limits_of_the_text_are_those_of_the_encoder(family: Family) -> None:
    limits = text_limits(family.build())
    length = 16 if family.name == "open_clip-bert" else 8
    assert limits == {"context_length": length, "vocabulary": 64}
