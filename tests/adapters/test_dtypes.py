"""Encoders in half precision, whole or in part: adapters go in, and files go between dtypes."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import open_clip
import pytest
import torch
from families.small import output, randomise, small_vit
from torch import nn

from mmadapters import AdapterModel, BottleneckConfig, LoRAConfig, init

CLIP = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 32,
        "layers": 2,
        "width": 32,
        "patch_size": 16,
        "head_width": 16,
    },
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("configs")
    (folder / "small-clip-of-dtypes.json").write_text(json.dumps(CLIP))
    open_clip.add_model_config(folder)
    return "small-clip-of-dtypes"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "pure_bf16", "pure_fp16"])
@pytest.mark.parametrize("config", [BottleneckConfig(size=4), LoRAConfig(rank=2)])
def test_open_clip_of_every_precision_takes_adapters(
    precision: str, config: BottleneckConfig | LoRAConfig, registered: str
) -> None:
    """bf16 and fp16 leave norms and embeddings in float32, pure_… leaves nothing."""
    torch.manual_seed(0)
    model = init(open_clip.create_model(registered, precision=precision, pretrained_hf=False))
    dtype = model.visual.conv1.weight.dtype
    pixels = torch.randn(2, 3, 32, 32).to(dtype)
    tokens = torch.ones(2, 8, dtype=torch.long)
    with torch.no_grad():
        bare = [model.encode_image(pixels), model.encode_text(tokens)]
        model.add_adapter("a", config)
        randomise(model.adapter("a"))
        model.set_active_adapters("a")
        acting = [model.encode_image(pixels), model.encode_text(tokens)]
        with model.using(None):
            off = [model.encode_image(pixels), model.encode_text(tokens)]
    assert all(map(torch.equal, off, bare))
    assert not any(map(torch.equal, acting, bare))
    assert [y.dtype for y in acting] == [y.dtype for y in bare]


def adapted(vit: nn.Module) -> AdapterModel:
    model = init(vit)
    model.add_adapter("pets", BottleneckConfig(size=2))
    randomise(model.adapter("pets"))
    model.set_active_adapters("pets")
    return model


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("saved_in_half", [False, True])
def test_a_file_goes_between_float32_and_half_precision(
    half: torch.dtype, saved_in_half: bool, tmp_path: Path
) -> None:
    whole, rounded = small_vit(), small_vit().to(half)
    source, target = (rounded, whole) if saved_in_half else (whole, rounded)
    model = adapted(source)
    model.save_adapter(tmp_path / "pets", "pets")
    other = init(target)
    other.load_adapter(tmp_path / "pets")
    other.set_active_adapters("pets")
    assert other.active_adapters is not None


def test_other_weights_in_half_precision_are_still_refused(tmp_path: Path) -> None:
    adapted(small_vit()).save_adapter(tmp_path / "pets", "pets")
    other = small_vit()
    with torch.no_grad():
        for parameter in other.parameters():
            # A hundredth, as light fine-tuning changes weights.
            parameter.mul_(1 + 0.01 * torch.randn_like(parameter))
    for encoder in (other, copy.deepcopy(other).bfloat16()):
        with pytest.raises(ValueError, match="with other weights in tower 'vision'"):
            init(encoder).load_adapter(tmp_path / "pets")


def test_a_file_without_a_sample_names_the_dtype(tmp_path: Path) -> None:
    """Files of earlier versions have the hash of the weights alone."""
    adapted(small_vit()).save_adapter(tmp_path / "pets", "pets")
    file = tmp_path / "pets/adapter.json"
    data = json.loads(file.read_text())
    del data["checksum"]
    for tower in data["backbone"]["towers"].values():
        del tower["sample"], tower["dtype"]
    file.write_text(json.dumps(data))
    init(small_vit()).load_adapter(tmp_path / "pets")
    model = init(small_vit().bfloat16())
    with pytest.raises(ValueError, match=r"weights in float32 \(here they are in bfloat16\), or"):
        model.load_adapter(tmp_path / "pets")
    model.load_adapter(tmp_path / "pets", allow_different_weights=True)


def test_an_adapter_in_half_precision_gives_almost_the_same(tmp_path: Path) -> None:
    model = adapted(small_vit())
    model.save_adapter(tmp_path / "pets", "pets")
    other = init(small_vit().bfloat16())
    other.load_adapter(tmp_path / "pets")
    with torch.no_grad():
        bare = output(other).float()
        other.set_active_adapters("pets")
        wanted, got = output(model), output(other).float()
    assert (got - wanted).norm() < 0.1 * (bare - wanted).norm()
