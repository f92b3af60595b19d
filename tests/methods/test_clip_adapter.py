"""CLIP-Adapter against its formula in NumPy, and against the authors' module."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families.vision import images
from families.vision_language import tokens
from injection.matrix import FAMILIES, bare
from torch import Tensor, nn

from mmadapters import AdapterModel, CLIPAdapterConfig, init

from .reference import Array

# How the image's and the text's embedding are asked for, before they are made of unit length.
EMBED = {
    "hf-clip": (
        lambda model: pooled(model.get_image_features(pixel_values=images())),
        lambda model: pooled(model.get_text_features(input_ids=tokens())),
    ),
    "open_clip-custom_text": (
        lambda model: model.encode_image(images()),
        lambda model: model.encode_text(tokens()),
    ),
}


def pooled(output: Any) -> Tensor:
    """transformers 4 gives the features themselves."""
    return output if isinstance(output, Tensor) else output.pooler_output


def adapted(name: str, config: CLIPAdapterConfig) -> AdapterModel:
    torch.manual_seed(2)
    model = init(bare(FAMILIES[name]))
    model.add_adapter("a", config)
    model.set_active_adapters("a")
    return model


def formula(model: AdapterModel, site: str, f: Array, ratio: float) -> Array:
    module: Any = dict(model.adapter("a").entries())[site]
    down, up = (map_.weight.detach().double().numpy() for map_ in (module.down, module.up))
    hidden = np.maximum(f @ down.T, 0)
    return ratio * np.maximum(hidden @ up.T, 0) + (1 - ratio) * f


@torch.no_grad()
@pytest.mark.parametrize("ratio", [0.2, 0.6, 1.0])
@pytest.mark.parametrize("name", EMBED)
def test_embeddings_are_mixed_with_what_the_bottleneck_makes_of_them(
    name: str, ratio: float
) -> None:
    config = CLIPAdapterConfig(ratio=ratio, towers=("vision", "text"))
    model = adapted(name, config)
    for tower, embed in zip(("vision", "text"), EMBED[name], strict=True):
        given = embed(model).double().numpy()
        with model.using(None):
            plain = embed(model).double().numpy()
        expected = formula(model, f"{tower}.embedding", plain, ratio)
        np.testing.assert_allclose(given, expected, atol=1e-5)
        assert np.abs(given - plain).max() > 1e-2


@torch.no_grad()
def test_default_is_the_authors_module_with_their_ratio_on_the_image_alone() -> None:
    model = adapted("hf-clip", CLIPAdapterConfig())
    ((site, module),) = model.adapter("a").entries()
    assert site == "vision.embedding"
    # gaopengcuhk/CLIP-Adapter: c_in, reduction 4, no biases, a ReLU behind each map, ratio 0.2.
    theirs = nn.Sequential(
        nn.Linear(32, 8, bias=False), nn.ReLU(), nn.Linear(8, 32, bias=False), nn.ReLU()
    )
    own: Any = module
    theirs[0].load_state_dict(own.down.state_dict())
    theirs[2].load_state_dict(own.up.state_dict())
    image, text = EMBED["hf-clip"]
    with model.using(None):
        plain, words = image(model), text(model)
    torch.testing.assert_close(image(model), 0.2 * theirs(plain) + 0.8 * plain)
    assert torch.equal(text(model), words)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CLIPAdapterConfig(ratio=0.0), "ratio must be above 0 and at most 1, not 0.0"),
        (lambda: CLIPAdapterConfig(ratio=1.5), "ratio must be above 0 and at most 1, not 1.5"),
        (lambda: CLIPAdapterConfig(ratio=float("nan")), "ratio must be a finite number"),
        (lambda: CLIPAdapterConfig(reduction_factor=0), "reduction_factor must be a whole number"),
        (lambda: CLIPAdapterConfig(towers="vision"), r"e.g. towers=\('vision',\)"),  # type: ignore[arg-type]
        (lambda: CLIPAdapterConfig(towers=()), "towers is empty"),
    ],
)
def test_bad_options_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        (
            "open_clip-clip",
            CLIPAdapterConfig(towers=("vision", "text")),
            "cannot enter tower 'text' of CLIP: open_clip multiplies its text's embedding by a "
            "bare parameter.*build a CustomTextCLIP",
        ),
        (
            "hf-clip-vision",
            CLIPAdapterConfig(),
            "cannot enter tower 'vision' of CLIPVisionModel: it ends before the projection",
        ),
        (
            "hf-blip-retrieval",
            CLIPAdapterConfig(),
            "it passes its projections without use_itm_head only",
        ),
        ("timm-vit", CLIPAdapterConfig(), "gives no embedding into a space shared with another"),
        (
            "hf-bert",
            CLIPAdapterConfig(),
            "embedding of tower 'vision', which BertModel lacks; it has text",
        ),
        (
            "hf-clip",
            CLIPAdapterConfig(sites=("*.ffn",)),
            r"no embedding of towers=\('vision',\) lies under sites=\('\*.ffn',\); clip_adapter "
            "acts at vision.embedding",
        ),
        (
            "hf-clip",
            CLIPAdapterConfig(sites=("vision.embeding",)),
            "did you mean 'vision.embedding'",
        ),
        (
            "hf-clip",
            CLIPAdapterConfig(reduction_factor=64),
            "reduction_factor=64 leaves nothing of the 32 numbers at vision.embedding",
        ),
    ],
)
def test_places_that_it_cannot_act_at_are_refused(
    name: str, config: CLIPAdapterConfig, message: str
) -> None:
    model = init(bare(FAMILIES[name]))
    with pytest.raises(ValueError, match=message) as error:
        model.add_adapter("a", config)
    assert "\n" not in str(error.value)
    assert model.adapter_names == ()
