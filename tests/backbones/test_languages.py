"""`target_lang` of MMS: the adapters of a language, and its head, from a file of its own."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from families.mms import characters, write_mms
from families.speech import waves
from safetensors.torch import load_file, save_file

from mmadapters import load_backbone


@pytest.fixture(scope="module")
def mms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mms(tmp_path_factory.mktemp("mms"))


@pytest.mark.parametrize("language", ["fra", "deu"])
@torch.no_grad()
def test_encoder_has_the_states_of_transformers_in_that_language(language: str, mms: Path) -> None:
    args, _ = waves()
    theirs = transformers.Wav2Vec2ForCTC.from_pretrained(
        mms, target_lang=language, ignore_mismatched_sizes=True
    )
    encoder = load_backbone(f"hf/{mms}", pretrained=True, target_lang=language)
    english = load_backbone(f"hf/{mms}", pretrained=True)
    states = theirs.wav2vec2.eval()(*args).last_hidden_state
    assert torch.equal(encoder(*args).last_hidden_state, states)
    assert not torch.allclose(english(*args).last_hidden_state, states, atol=1e-2)


@torch.no_grad()
def test_a_model_with_a_head_gets_that_of_the_language(mms: Path) -> None:
    from mmadapters.backbones.languages import speak

    model = transformers.Wav2Vec2ForCTC.from_pretrained(mms)
    speak(model, str(mms), "fra")
    theirs = transformers.Wav2Vec2ForCTC.from_pretrained(
        mms, target_lang="fra", ignore_mismatched_sizes=True
    )
    args, _ = waves()
    assert torch.equal(model.eval()(*args).logits, theirs.eval()(*args).logits)
    assert model.config.vocab_size == len(characters("fra"))


def test_a_language_comes_after_local_weights(mms: Path) -> None:
    with pytest.warns(UserWarning, match="no place in the model .*lm_head"):
        model = load_backbone(f"hf/{mms}", weights=mms / "model.safetensors", target_lang="fra")
    file = load_file(mms / "adapter.fra.safetensors")
    name = "encoder.layers.1.adapter_layer.linear_2.weight"
    assert torch.equal(model.get_parameter(name), file[f"wav2vec2.{name}"])


@pytest.mark.parametrize(
    ("language", "message"),
    [
        ("frq", r"has no adapter\.frq\.safetensors; did you mean 'fra'.*files for deu, eng, fra$"),
        ("../fra", r"is a code of a language such as 'fra', not '\.\./fra'"),
        (3, "is a code of a language such as 'fra', not 3"),
    ],
)
def test_a_language_that_is_not_there_is_refused(language: object, message: str, mms: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_backbone(f"hf/{mms}", pretrained=True, target_lang=language)


class Bomb:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("exploded"),)


def test_a_pickle_of_a_language_is_refused_and_not_executed(
    mms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(mms, tmp_path / "mms")
    (folder / "adapter.fra.safetensors").unlink()
    (folder / "adapter.fra.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"has adapter\.fra\.bin, a pickle, which is never loaded"):
        load_backbone(f"hf/{folder}", pretrained=True, target_lang="fra")
    assert not (tmp_path / "exploded").exists()


def test_a_file_of_another_encoder_is_refused(mms: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(mms, tmp_path / "mms")
    tensors = load_file(folder / "adapter.fra.safetensors")
    tensors.pop(next(name for name in tensors if "layers.0.adapter_layer.norm" in name))
    save_file(tensors, folder / "adapter.fra.safetensors")
    with pytest.raises(ValueError, match=r"does not fit .*layers\.0\.adapter_layer\.norm"):
        load_backbone(f"hf/{folder}", pretrained=True, target_lang="fra")


def test_an_encoder_without_languages_is_refused(tmp_path: Path) -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(ValueError, match=r"has no language adapters .*leave target_lang out"):
        load_backbone("hf/vit", target_lang="fra", **small)
