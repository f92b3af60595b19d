"""Where adapters go in image-text encoders, and that names mean the same in every library."""

import pytest
import torch
import transformers
from families import Family
from families.twins import TWINS, Twin
from families.vision_language import CLIP_FAMILIES
from injection.checks import check_family
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

from mmadapters.sites.tables import describe


@pytest.mark.parametrize("family", CLIP_FAMILIES, ids=lambda family: family.name)
def test_sites_are_what_the_model_computes(family: Family) -> None:
    check_family(family)


@pytest.mark.parametrize("twin", TWINS, ids=lambda twin: f"{twin.source}={twin.target}")
def test_twins_have_equal_names_and_features(twin: Twin) -> None:
    source, target = twin.pair()
    # open_clip's own text tower ends in a bare parameter, which is no place for an adapter.
    names, own = ([*describe(model)[0].names()] for model in (source, target))
    bare = "text.embedding" in names and "text.embedding" not in own
    assert own == [name for name in names if not (bare and name == "text.embedding")]
    with torch.no_grad():
        theirs, mine = twin.source_features(source), twin.target_features(target)
    for one, other in zip(theirs, mine, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_image_tower_that_is_no_transformer_is_refused_in_one_sentence() -> None:
    vision = CLIPVisionCfg(layers=(1, 1, 1, 1), width=8, image_size=32)
    text = CLIPTextCfg(context_length=8, vocab_size=64, width=32, heads=2, layers=1)
    with pytest.raises(ValueError, match="is a ModifiedResNet"):
        describe(CLIP(32, vision, text))


def test_part_of_a_tower_is_refused_in_one_sentence() -> None:
    config = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.CLIPVisionModel(config)
    encoder = next(m for m in model.modules() if type(m).__name__ == "CLIPEncoder")
    with pytest.raises(ValueError, match="part of a tower"):
        describe(encoder)
