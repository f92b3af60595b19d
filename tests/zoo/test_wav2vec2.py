"""nano/wav2vec2: one set of weights in two libraries, and a card whose figures hold."""

import argparse
import copy
import functools
import shutil
from pathlib import Path

import pytest
import torch
from timing import ratio

from mmadapters.tasks.zoo import wav2vec2_figures
from mmadapters.zoo import NANO, load_nano, wav2vec2
from mmadapters.zoo.files import read_config, read_weights, write_weights

DIRECTORY = NANO["nano/wav2vec2"].directory
SENTENCES = 24


@pytest.fixture(scope="module")
def ctc() -> torch.nn.Module:
    return wav2vec2.load_ctc(DIRECTORY)


@pytest.fixture
def waveforms() -> list[torch.Tensor]:
    return [0.1 * torch.randn(length) for length in (16_000, 12_345, 6_400)]


def padded(waveforms: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(B, T) waveforms, (B, T) mask and (B,) lengths, in samples."""
    lengths = torch.tensor([len(waveform) for waveform in waveforms])
    x = torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True)
    return x, torch.arange(x.shape[1]) < lengths[:, None], lengths


@torch.inference_mode()
def test_both_libraries_give_the_same_features(waveforms: list[torch.Tensor]) -> None:
    hf, torchaudio = (load_nano("nano/wav2vec2", library=name) for name in ("hf", "torchaudio"))
    x, mask, lengths = padded(waveforms)
    ours = hf(x, attention_mask=mask).last_hidden_state
    theirs, frames = torchaudio(x, lengths)
    assert theirs.shape == ours.shape
    for a, b, count in zip(ours, theirs, frames, strict=True):
        assert (a[:count] - b[:count]).abs().max() <= 1e-5
    assert (hf(x).last_hidden_state - torchaudio(x)[0]).abs().max() <= 1e-5


@torch.inference_mode()
def test_torchaudios_aux_is_the_ctc_head(
    ctc: torch.nn.Module, waveforms: list[torch.Tensor]
) -> None:
    x, mask, lengths = padded(waveforms)
    ours = ctc(x, attention_mask=mask).logits
    theirs, frames = wav2vec2.to_torchaudio(ctc)(x, lengths)
    for a, b, count in zip(ours, theirs, frames, strict=True):
        assert (a[:count] - b[:count]).abs().max() <= 1e-5


@torch.inference_mode()
def test_padded_in_a_batch_equals_alone(
    ctc: torch.nn.Module, waveforms: list[torch.Tensor]
) -> None:
    x, mask, _ = padded(waveforms)
    together = ctc(x, attention_mask=mask).logits
    for row, waveform in zip(together, waveforms, strict=True):
        alone = ctc(waveform[None]).logits[0]
        assert (row[: len(alone)] - alone).abs().max() <= 1e-4


def test_classes_are_the_libraries_own_and_ready_for_adapters() -> None:
    from torchaudio.models import Wav2Vec2Model as Torchaudio
    from transformers import Wav2Vec2Model

    hf = load_nano("nano/wav2vec2")
    assert type(hf) is Wav2Vec2Model
    assert type(load_nano("nano/wav2vec2", library="torchaudio")) is Torchaudio
    assert not hf.training
    assert not hf.config.apply_spec_augment
    assert hf.config.layerdrop == 0
    with pytest.raises(ValueError, match="open_clip"):
        load_nano("nano/wav2vec2", library="open_clip")


def test_fields_of_the_config_can_be_replaced() -> None:
    eager = load_nano("nano/wav2vec2", attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"


@pytest.mark.parametrize("library", ["hf", "torchaudio"])
def test_loading_takes_as_long_as_25_copies(library: str, ctc: torch.nn.Module) -> None:
    """That is a second where a copy takes 40 ms."""
    model = load_nano("nano/wav2vec2", library=library)  # the library's own import does not count
    load = functools.partial(load_nano, "nano/wav2vec2", library=library)
    assert ratio(load, lambda: copy.deepcopy(model), repeats=3) < 25


def test_ships_in_at_most_10_mb_of_fp16() -> None:
    from safetensors import safe_open

    path = DIRECTORY / "model.safetensors"
    assert path.stat().st_size <= 10_000_000
    with safe_open(path, "pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F16"}  # noqa: SIM118


def test_decoding_merges_repeats_and_drops_blanks() -> None:
    v = wav2vec2.VOCABULARY
    frames = [0, v["s"], v["s"], 0, v["e"], 0, v["e"], v["|"], v["|"], 0, v["|"], v["i"], v["'"]]
    assert wav2vec2.decode(frames) == "see i'"
    assert wav2vec2.decode([]) == ""


def test_card_states_every_figure() -> None:
    config = read_config(DIRECTORY)
    card = (DIRECTORY / "README.md").read_text("utf-8")
    for figure in config["figures"].values():
        assert f"{100 * figure['value']:.1f} %" in card


def test_headline_holds_on_a_small_sample() -> None:
    pytest.importorskip("espeakng_loader", reason="speech synthesis is the optional extra")
    (figure,) = wav2vec2_figures.verify(DIRECTORY, sentences=SENTENCES)
    assert figure.holds is True


def test_verify_fails_on_tampered_weights(tmp_path: Path) -> None:
    pytest.importorskip("espeakng_loader", reason="speech synthesis is the optional extra")
    shutil.copy(DIRECTORY / "config.json", tmp_path)
    weights = read_weights(DIRECTORY)
    weights["lm_head.weight"] = weights["lm_head.weight"].flip(0)
    write_weights(weights, tmp_path)
    (figure,) = wav2vec2_figures.verify(tmp_path, sentences=8)
    assert figure.holds is False


def test_verify_without_the_extra_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmadapters.tasks.data.synthetic import speech

    def missing(*_: object, **__: object) -> None:
        raise ImportError("pip install mmadapters[speech]")

    monkeypatch.setattr(speech, "held_out_variants", missing)
    (figure,) = wav2vec2_figures.verify(DIRECTORY, sentences=2)
    assert figure.holds is None
    assert "mmadapters[speech]" in figure.note


def test_a_truncated_file_is_an_error(tmp_path: Path) -> None:
    shutil.copy(DIRECTORY / "config.json", tmp_path)
    whole = (DIRECTORY / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Exception, match=r"(?i)safetensor|header|incomplete|invalid"):
        wav2vec2.load_ctc(tmp_path)


def test_recipe_trains_and_writes_what_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("espeakng_loader", reason="speech synthesis is the optional extra")
    from mmadapters.tasks.zoo.pretrain import wav2vec2 as recipe
    from mmadapters.tasks.zoo.pretrain import wav2vec2_card

    # The same code on narrow layers.
    small = {"conv_dim": [8] * 7, "hidden_size": 16, "num_hidden_layers": 2}
    monkeypatch.setattr(
        recipe, "ARCHITECTURE", recipe.ARCHITECTURE | small | {"intermediate_size": 16}
    )
    monkeypatch.setattr(recipe, "CURVE_SENTENCES", 4)
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    recipe.add_arguments(parser)
    options = "--stages train --steps 3 --batch 2 --hours 0.01 --first-hours 0.01 --workers 1"
    command = [*options.split(), "--device", "cpu", "--evaluations", "1", "--out", str(tmp_path)]
    recipe.run(parser.parse_args(command))
    assert wav2vec2.load_ctc(tmp_path).config.hidden_size == 16
    assert read_config(tmp_path)["training"]["curve"][-1]["step"] == 3
    wav2vec2_card.write(tmp_path, count=2)
    assert "en-gb-scotland" in (tmp_path / "README.md").read_text("utf-8")
