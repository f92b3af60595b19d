"""`save_pretrained`, and assignments through the wrapper, which reach the encoder."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from mmadapters import AdapterModel, BottleneckConfig, Fuse, LoRAConfig, Stack, init
from mmadapters.model import saving


def encoder() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        num_labels=3,
    )
    return transformers.ViTForImageClassification(config).eval()


@pytest.fixture(scope="module")
def bare() -> nn.Module:
    return encoder()


@pytest.fixture
def model(bare: nn.Module) -> AdapterModel:
    model = init(copy.deepcopy(bare))
    model.add_adapter("pets", BottleneckConfig(size=2))
    model.add_adapter("night", LoRAConfig(rank=2))
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.normal_(std=0.3)
    model.set_active_adapters(Stack("pets", "night"))
    return model


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(pixels).logits


def test_what_is_saved_comes_back_and_acts(
    model: AdapterModel, bare: nn.Module, pixels: torch.Tensor, tmp_path: Path
) -> None:
    model.add_adapter("day", BottleneckConfig(size=2))
    model.add_adapter_fusion(Fuse("pets", "day"))
    model.save_pretrained(tmp_path / "saved")
    inside = {path.name for path in (tmp_path / "saved").iterdir()}
    assert inside == {"adapters.json", "README.md", "pets", "night", "day", "fusions"}
    again = AdapterModel.from_pretrained(tmp_path / "saved", copy.deepcopy(bare))
    assert again.adapter_names == ("pets", "night", "day")
    assert again.fusion_names == model.fusion_names
    assert again.active_adapters == model.active_adapters
    assert torch.equal(logits(again, pixels), logits(model, pixels))
    assert not torch.equal(logits(again, pixels), logits(bare, pixels))
    # The whole of it takes the place of an older one.
    model.delete_adapter("night")
    model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved/night").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_the_card_has_what_a_hub_reads(model: AdapterModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved/README.md").read_text()
    assert card.startswith("---\nlibrary_name: mmadapters\n")
    assert "| night | lora |" in card
    assert "AdapterModel.from_pretrained" in card


def test_load_adapter_takes_the_only_adapter(
    model: AdapterModel, bare: nn.Module, pixels: torch.Tensor, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "two")
    other = init(copy.deepcopy(bare))
    with pytest.raises(ValueError, match=r"holds the adapters pets, night: load one .*two/pets"):
        other.load_adapter(tmp_path / "two")
    assert other.adapter_names == ()
    other.load_adapter(tmp_path / "two/pets")
    other.save_pretrained(tmp_path / "one")
    other.load_adapter(tmp_path / "one", "again")
    with model.using("pets"), other.using("again"):
        assert torch.equal(logits(other, pixels), logits(model, pixels))


def test_a_new_classifier_reaches_the_encoder_is_trained_and_saved(
    model: AdapterModel, bare: nn.Module, pixels: torch.Tensor, tmp_path: Path
) -> None:
    model.classifier = nn.Linear(16, 5)
    assert model.backbone.classifier is model.classifier
    model.train_adapter("pets")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {n for n in trained if not n.startswith("adapters.pets")} == {
        "backbone.classifier.weight",
        "backbone.classifier.bias",
    }
    model(pixels).logits.sum().backward()
    assert model.classifier.weight.grad is not None
    model.eval()
    model.set_active_adapters("pets")
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"classifier.bias of shape \(5,\), and the enc"):
        AdapterModel.from_pretrained(tmp_path / "saved", copy.deepcopy(bare))
    other = copy.deepcopy(bare)
    other.classifier = nn.Linear(16, 5)
    again = AdapterModel.from_pretrained(tmp_path / "saved", other)
    assert torch.equal(logits(again, pixels), logits(model, pixels))
    assert model.detach().classifier.out_features == 5


def test_statistics_of_new_modules_are_saved_and_what_was_loaded_is_saved_again(
    model: AdapterModel, bare: nn.Module, pixels: torch.Tensor, tmp_path: Path
) -> None:
    def head() -> nn.Module:
        return nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 3))

    model.classifier = head()
    model.train()
    model(pixels)  # moves the running statistics
    model.eval()
    model.classifier.requires_grad_(False)
    expected, source = logits(model, pixels), tmp_path / "first"
    model.save_pretrained(source)
    for name in ("second", "third"):
        backbone = copy.deepcopy(bare)
        backbone.classifier = head()
        again = AdapterModel.from_pretrained(source, backbone).eval()
        assert torch.equal(logits(again, pixels), expected)
        source = tmp_path / name
        again.save_pretrained(source)


def test_configs_and_buffers_are_the_encoders(model: AdapterModel) -> None:
    config = transformers.ViTConfig()
    model.config = config
    assert model.backbone.config is config
    model.num_labels = 7
    assert model.backbone.num_labels == 7
    del model.num_labels
    assert not hasattr(model.backbone, "num_labels")
    model.of_the_user = 3  # the encoder has no such attribute
    assert not hasattr(model.backbone, "of_the_user")
    assert model.training is False


def test_blocks_are_not_replaced_under_adapters(model: AdapterModel, pixels: torch.Tensor) -> None:
    before = logits(model, pixels)
    with pytest.raises(ValueError, match="vit holds blocks that adapters may act on"):
        model.vit = nn.Identity()
    with pytest.raises(ValueError, match="vit holds blocks"):
        del model.vit
    assert torch.equal(logits(model, pixels), before)


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("push_to_hub", "save_pretrained"),
        ("set_adapter", "set_active_adapters"),
        ("disable_adapters", "set_active_adapters"),
        ("enable_adapters", "set_active_adapters"),
        ("get_adapter_state_dict", "save_adapter"),
        ("enable_peft_hotswap", "set_active_adapters"),
    ],
)
def test_methods_that_would_pass_adapters_by_name_another(
    name: str, instead: str, model: AdapterModel
) -> None:
    assert hasattr(model.backbone, name)
    with pytest.raises(ValueError, match=f"{name} is not for an adapted encoder: .*{instead}"):
        getattr(model, name)("x")


def test_heads_are_not_pruned_under_adapters(model: AdapterModel) -> None:
    """transformers 5 no longer has the method, and then the model has none either."""
    there = hasattr(model.backbone, "prune_heads")
    with pytest.raises(ValueError if there else AttributeError, match="prune"):
        model.prune_heads({0: [1]})
    assert not hasattr(model, "save_nothing")


def test_data_parallel_is_refused_before_it_runs(model: AdapterModel) -> None:
    with pytest.raises(RuntimeError, match=r"DataParallel cannot run .*torchrun"):
        model._replicate_for_data_parallel()
    assert model.backbone._replicate_for_data_parallel() is not None


@pytest.fixture
def saved(model: AdapterModel, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 9}, "has format 9; this version reads 1"),
        ({"adapters": ["../pets"]}, "is damaged"),
        ({"adapters": "pets"}, "is damaged"),
        ({"adapters": ["pets", "gone"]}, "gone"),
        ({"fusions": ["pets,night"]}, "fusions/0"),
    ],
)
def test_a_damaged_directory_loads_nothing(
    change: dict, message: str, saved: Path, bare: nn.Module
) -> None:
    index = json.loads((saved / "adapters.json").read_text())
    (saved / "adapters.json").write_text(json.dumps({**index, **change}))
    backbone = copy.deepcopy(bare)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        AdapterModel.from_pretrained(saved, backbone)
    assert "\n" not in str(caught.value)
    init(backbone)  # it was given back without hooks


def test_a_directory_that_is_written_meanwhile_is_read_in_one_state(
    saved: Path, model: AdapterModel, bare: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, calls = saving.load, iter(range(9))

    def written_between(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 1:  # between the first adapter and the second
            with torch.no_grad():
                for parameter in model.adapters.parameters():
                    parameter.add_(1)
            model.save_pretrained(saved)
        return load(*args, **kwargs)

    monkeypatch.setattr(saving, "load", written_between)
    again = AdapterModel.from_pretrained(saved, copy.deepcopy(bare))
    for name in ("pets", "night"):
        tensors = again.adapter(name).tensors()
        assert all(torch.equal(t, tensors[k]) for k, t in model.adapter(name).tensors().items())


def test_what_is_not_ours_is_not_replaced(model: AdapterModel, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds thesis.tex, which save_pretrained did not write"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="there is no adapter to save"):
        init(encoder()).save_pretrained(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="not a directory of save_pretrained"):
        AdapterModel.from_pretrained(tmp_path, encoder())
    model.set_active_adapters(None)
    model.merge_adapter("night")
    with pytest.raises(ValueError, match="'night' is merged into the encoder"):
        model.save_pretrained(tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
