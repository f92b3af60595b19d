"""The code that users read runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmadapters import AdapterModel, init

ROOT = Path(__file__).resolve().parents[1]


def blocks(path: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), flags=re.DOTALL)


def test_api_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, several = blocks("README.md")
    names = {"x": torch.randn(1, 3, 224, 224)}
    exec(code, names)
    assert isinstance(names["model"], AdapterModel)
    assert (tmp_path / "out/pets/adapter.safetensors").is_file()
    with torch.no_grad():
        assert torch.equal(names["backbone"](names["x"]), names["y0"].detach())
    model = init(names["backbone"])
    for name in ("fr", "de"):
        model.add_adapter(name, "double_seq_bn")
    exec(several, {"model": model})
    assert model.adapter_names == ("fr", "de", "both")
    assert model.fusion_names == ("fr,de",)


def test_methods_of_the_docs_can_be_written() -> None:
    examples = blocks("docs/methods.md")
    assert examples
    for code in examples:
        exec(code, {})


def test_frozen_part_of_the_docs_is_computed_once() -> None:
    names: dict[str, Any] = {}
    exec(blocks("docs/speed.md")[0], names)
    assert str(names["trunk"].towers) in (ROOT / "docs/speed.md").read_text()
    assert names["trunk"].skipped == {}
    assert torch.allclose(names["logits"], names["model"](names["images"]), atol=1e-5)


def test_hand_written_sites_of_the_docs_fit_a_transformer_encoder() -> None:
    (code,) = blocks("docs/encoders.md")
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=True)
    names = {"torch": torch, "encoder": nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)}
    exec("import mmadapters\n" + code, names)
    model = names["model"]
    assert isinstance(model, AdapterModel)
    x = torch.randn(2, 16, 64)
    for method in ("double_seq_bn", "lora", "prefix"):
        model.add_adapter(method, method)
        for parameter in model.adapter(method).parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        with torch.no_grad():
            bare: Tensor = model(x)
            with model.using(method):
                assert not torch.allclose(model(x), bare, atol=1e-3)


@pytest.mark.parametrize("number", range(4), ids=["own", "transformers", "accelerate", "lightning"])
def test_training_loops_of_the_docs_run(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = blocks("docs/training.md")[number]
    if "import lightning" in code:
        pytest.importorskip("lightning", reason="Lightning is not installed")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"folder": str(tmp_path / "run")}
    exec(code, names)
    if "losses" in names:
        assert names["losses"][-1] < names["losses"][0]
    elif isinstance(names.get("model"), AdapterModel):
        assert not any(key.startswith("backbone.b") for key in names["model"].state_dict())
        assert any((tmp_path / "run").rglob("*.safetensors"))
    else:
        (checkpoint,) = (tmp_path / "run").rglob("*.ckpt")
        state = torch.load(checkpoint, weights_only=True)["state_dict"]
        assert "model._extra_state" in state
        assert not any(key.startswith("model.backbone.") for key in state)
