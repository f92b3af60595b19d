"""A job in a language of MMS: encoder, head and characters are those of the language."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families.mms import characters, write_mms
from safetensors.torch import load_file

from mmadapters.tasks import artifact
from mmadapters.tasks.asr.head import own_head, own_vocabulary
from mmadapters.tasks.config.schema import BackboneConfig


@pytest.fixture(scope="module")
def mms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mms(tmp_path_factory.mktemp("mms"))


@pytest.mark.parametrize("language", ["fra", "deu"])
def test_options_of_a_job_choose_the_language(language: str, mms: Path) -> None:
    named = BackboneConfig(name=f"hf/{mms}", pretrained=True, options={"target_lang": language})
    encoder = artifact.make_backbone(named)
    file = load_file(mms / f"adapter.{language}.safetensors")
    name = "encoder.layers.0.adapter_layer.linear_1.bias"
    assert torch.equal(encoder.get_parameter(name), file[f"wav2vec2.{name}"])
    assert torch.equal(own_head(named, encoder).weight, file["lm_head.weight"])
    assert own_vocabulary(named, encoder).tokens == tuple(characters(language))


def test_a_tokenizer_without_the_language_is_named(mms: Path) -> None:
    (mms / "adapter.ita.safetensors").write_bytes((mms / "adapter.fra.safetensors").read_bytes())
    named = BackboneConfig(name=f"hf/{mms}", pretrained=True, options={"target_lang": "ita"})
    with pytest.raises(ValueError, match=r"backbone\.processor: .* has no characters of 'ita'"):
        own_vocabulary(named, artifact.make_backbone(named))
