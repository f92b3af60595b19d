"""One name for an encoder of any library, with random, downloaded or local weights."""

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from mmadapters.backbones.load import load_backbone, read_weights

WIDTH = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
SPEECH = {
    **WIDTH,
    "conv_dim": (16,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
BLIP = {
    "text_config": {**WIDTH, "encoder_hidden_size": 32, "vocab_size": 64},
    "vision_config": {**WIDTH, "image_size": 32, "patch_size": 8},
}
WHISPER = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "max_source_positions": 12,
}
TORCHAUDIO = {
    "encoder_embed_dim": 32,
    "encoder_num_layers": 2,
    "encoder_num_heads": 2,
    "encoder_ff_interm_features": 48,
}
OPEN_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "layers": 2, "width": 64},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "layers": 2, "width": 64, "heads": 2},
}
TIMM = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2}
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "timm/vit_tiny_patch16_224": ("VisionTransformer", TIMM),
    "hf/vit": ("ViTModel", WIDTH),
    "hf/wav2vec2": ("Wav2Vec2Model", SPEECH),
    "hf/hubert-ctc": ("HubertForCTC", SPEECH),
    "hf/whisper-encoder": ("WhisperEncoder", WHISPER),
    "hf/bert": ("BertModel", {**WIDTH, "vocab_size": 64}),
    "hf/t5-encoder": ("T5EncoderModel", {"d_model": 32, "num_layers": 2, "vocab_size": 64}),
    "hf/blip-vqa": ("BlipForQuestionAnswering", BLIP),
    "open_clip/ViT-B-32": ("CLIP", OPEN_CLIP),
    "torchaudio/WAV2VEC2_BASE": ("Wav2Vec2Model", TORCHAUDIO),
    "torchaudio/HUBERT_LARGE": ("_Wav2Vec2Model", TORCHAUDIO),
}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing cached, the hub's own offline switch on (its retries take half a minute), and every
    other client sent to a port where nobody listens."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


def build(name: str, **kwargs: Any) -> nn.Module:
    return load_backbone(name, **SMALL[name][1], **kwargs)


def same(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize("name", SMALL)
def test_name_gives_the_class_of_its_library(name: str, no_network: None) -> None:
    model = build(name)
    assert type(model).__name__ == SMALL[name][0]
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_local_file_gives_the_same_weights(name: str, suffix: str, tmp_path: Path) -> None:
    model = build(name)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save(model.state_dict(), path)
    else:
        save_model(model, path)
    torch.manual_seed(1)
    assert same(build(name, weights=path), model)
    assert not same(build(name), model)


@pytest.mark.parametrize("size", [518, 98])
def test_real_vit_file_fits_any_image_size(size: int, shared_dir: Path) -> None:
    path = shared_dir / "weights" / "vit_small_patch14_focus.safetensors"
    model = load_backbone("timm/vit_small_patch14_dinov2.lvd142m", weights=path, img_size=size)
    assert model.pos_embed.shape == (1, (size // 14) ** 2 + 1, 384)
    weight = read_weights(path)["blocks.3.attn.qkv.weight"].float()
    assert torch.equal(model.blocks[3].attn.qkv.weight, weight)


def test_real_whisper_file_fits_the_encoder(shared_dir: Path) -> None:
    path = shared_dir / "weights" / "whisper_tiny_en_encoder.safetensors"
    size = {"d_model": 384, "encoder_layers": 4, "encoder_ffn_dim": 1536}
    model = load_backbone("hf/whisper-encoder", weights=path, encoder_attention_heads=6, **size)
    state = read_weights(path)
    assert all(torch.equal(model.state_dict()[key], t.float()) for key, t in state.items())


@pytest.mark.parametrize(
    "name",
    [
        "timm/vit_tiny_patch16_224",
        "hf/google/vit-base-patch16-224",
        "open_clip/ViT-B-32",
        "torchaudio/WAV2VEC2_BASE",
    ],
)
def test_without_network_pretrained_fails_in_one_sentence(name: str, no_network: None) -> None:
    with pytest.raises(RuntimeError, match="could not be reached") as caught:
        load_backbone(name, pretrained=True)
    message = str(caught.value)
    assert repr(name) in message
    assert "weights=" in message
    assert "\n" not in message
    assert caught.value.__cause__ is not None


def test_local_directory_of_transformers_needs_no_network(tmp_path: Path, no_network: None) -> None:
    model = build("hf/vit")
    model.save_pretrained(tmp_path / "vit")
    loaded = load_backbone(f"hf/{tmp_path / 'vit'}", pretrained=True)
    assert same(loaded, model)
    assert not same(load_backbone(f"hf/{tmp_path / 'vit'}"), model)
    assert (
        load_backbone(f"hf/{tmp_path / 'vit'}", num_hidden_layers=1).config.num_hidden_layers == 1
    )


def test_checkpoint_of_blip_in_a_directory_keeps_its_task(tmp_path: Path) -> None:
    model = build("hf/blip-vqa")
    model.save_pretrained(tmp_path / "blip")
    loaded = load_backbone(f"hf/{tmp_path / 'blip'}", pretrained=True)
    assert type(loaded).__name__ == "BlipForQuestionAnswering"
    assert same(loaded, model)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("tim/vit_tiny_patch16_224", "timm"),
        ("timm/vit_tny_patch16_224", "vit_tiny_patch16_224"),
        ("timm/vit_tiny_patch16_224.augreg_in22k_ft_in1k", "augreg_in21k_ft_in1k"),
        ("hf/wav2vec", "wav2vec2"),
        ("open_clip/ViT-B32", "ViT-B-32"),
        ("torchaudio/WAV2VEC_BASE", "WAV2VEC2_BASE"),
        ("nano/vitt", "nano/vit"),
    ],
)
def test_unknown_name_is_refused_with_the_nearest(
    name: str, nearest: str, no_network: None
) -> None:
    with pytest.raises(ValueError, match=f"did you mean '.*{nearest}'"):
        load_backbone(name)


@pytest.mark.parametrize(
    ("name", "options", "nearest"),
    [
        ("hf/vit", {"hiden_size": 32}, "hidden_size"),
        ("torchaudio/wav2vec2_base", {"encoder_dropot": 0.0}, "encoder_dropout"),
        ("torchaudio/WAV2VEC2_BASE", {"encoder_num_layer": 2}, "encoder_num_layers"),
    ],
)
def test_unknown_override_is_refused_with_the_nearest(
    name: str, options: dict[str, Any], nearest: str
) -> None:
    with pytest.raises(ValueError, match=f"did you mean '{nearest}'"):
        load_backbone(name, **options)


@pytest.mark.parametrize("name", ["hf/vit", "torchaudio/wav2vec2_base"])
def test_architecture_has_no_weights_of_its_own(name: str) -> None:
    with pytest.raises(ValueError, match="without weights"):
        load_backbone(name, pretrained=True)


def test_unknown_tag_of_open_clip_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'laion2b_s34b_b79k'"):
        load_backbone("open_clip/ViT-B-32", pretrained="laion2b_s34b_b79")


def test_pretrained_and_weights_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not both"):
        load_backbone("hf/vit", pretrained=True, weights=tmp_path / "weights.pt")


@pytest.mark.parametrize("name", ["timm/vit_tiny_patch16_224", "hf/vit", "open_clip/ViT-B-32"])
def test_file_that_does_not_fit_is_refused_with_names_and_counts(name: str, tmp_path: Path) -> None:
    state = build(name).state_dict()
    keys = [key for key in state if key.endswith("bias")]
    state["stranger"] = torch.zeros(1)
    for key in keys[:5]:
        del state[key]
    state[keys[6]] = torch.zeros(7)
    save_file({key: tensor.clone() for key, tensor in state.items()}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="does not fit") as caught:
        build(name, weights=tmp_path / "w.safetensors")
    message = str(caught.value)
    assert "5 missing (" in message
    assert "1 unexpected (stranger)" in message
    assert f"1 of another shape ({keys[6]}" in message
    assert "\n" not in message


class Bomb:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("exploded"),)


def test_pickle_is_refused_and_not_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.bin").write_bytes(pickle.dumps(Bomb()))
    torch.save({"weight": Bomb()}, tmp_path / "zipped.pt")
    for name in ("plain.bin", "zipped.pt"):
        with pytest.raises(ValueError, match="be read safely"):
            load_backbone("hf/vit", weights=tmp_path / name, **WIDTH)
    assert not (tmp_path / "exploded").exists()


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    save_file({"weight": torch.zeros(64)}, whole)
    files = {
        "truncated.safetensors": whole.read_bytes()[:-8],
        "text.pt": b"no tensors here",
        "empty.safetensors": b"",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="read safely"):
            read_weights(tmp_path / name)
    with pytest.raises(ValueError, match="no weight file"):
        read_weights(tmp_path / "absent.safetensors")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="no state dict"):
        read_weights(tmp_path / "list.pt")
    save_file({"weight": torch.tensor([float("nan")])}, tmp_path / "nan.safetensors")
    with pytest.raises(ValueError, match="NaN in weight"):
        read_weights(tmp_path / "nan.safetensors")


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_weights_are_taken_out_of_a_training_checkpoint(key: str, tmp_path: Path) -> None:
    model = build("hf/vit")
    torch.save({"epoch": 3, key: model.state_dict()}, tmp_path / "checkpoint.pt")
    assert same(build("hf/vit", weights=tmp_path / "checkpoint.pt"), model)


def test_file_of_a_wrapped_bundle_loads_with_or_without_the_wrapper(tmp_path: Path) -> None:
    model = build("torchaudio/HUBERT_LARGE")
    for part, name in ((model, "wrapped.pt"), (model.model, "inner.pt")):
        torch.save(part.state_dict(), tmp_path / name)
        assert same(build("torchaudio/HUBERT_LARGE", weights=tmp_path / name), model)


def test_attention_implementation_of_transformers_can_be_chosen() -> None:
    assert build("hf/vit").config._attn_implementation == "sdpa"
    assert build("hf/vit", attn_implementation="eager").config._attn_implementation == "eager"


def test_shipped_encoder_comes_with_its_weights() -> None:
    from mmadapters.zoo import NANO

    if not (NANO["nano/vit"].directory / "model.safetensors").is_file():
        pytest.skip("this checkout has no weights of nano/vit")
    assert same(load_backbone("nano/vit"), load_backbone("nano/vit"))


def test_libraries_are_imported_when_asked_for() -> None:
    program = (
        "import sys, mmadapters.backbones.load\n"
        "found = {'timm', 'transformers', 'open_clip', 'torchaudio'} & set(sys.modules)\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
