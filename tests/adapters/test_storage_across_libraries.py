"""Adapter files cross dtypes, libraries and versions: the same weights, the same outputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from families import Family, speech, tensors, twins
from families.small import output, randomise, small_vit
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mmadapters import AdapterModel, ConfigUnion, LoRAConfig, PrefixConfig, SeqBnConfig, init

DATA = Path(__file__).parent / "data"
CONFIG = ConfigUnion(LoRAConfig(rank=2), SeqBnConfig(size=4))


def adapted(vit: nn.Module) -> AdapterModel:
    """A model with one random, active adapter `pets`."""
    model = init(vit)
    model.add_adapter("pets", CONFIG)
    randomise(model.adapter("pets"))
    model.set_active_adapters("pets")
    return model


def rounded_vit(dtype: torch.dtype) -> nn.Module:
    """Weights that bfloat16 holds exactly, in `dtype`."""
    return small_vit().to(torch.bfloat16).to(dtype)


def test_adapter_of_a_bfloat16_encoder_loads_exactly_into_its_float32_twin(tmp_path: Path) -> None:
    half = adapted(rounded_vit(torch.bfloat16))
    half.save_adapter(tmp_path / "pets", "pets")
    assert {t.dtype for t in load_file(tmp_path / "pets" / "adapter.safetensors").values()} == {
        torch.bfloat16
    }
    full = init(rounded_vit(torch.float32))
    full.load_adapter(tmp_path / "pets")
    full.set_active_adapters("pets")
    for mine, theirs in zip(
        full.adapter("pets").parameters(), half.adapter("pets").parameters(), strict=True
    ):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, theirs.float())
    assert (output(full) - output(half).float()).abs().max() < 0.1


def test_adapter_of_a_float32_encoder_loads_rounded_into_its_bfloat16_twin(tmp_path: Path) -> None:
    full = adapted(rounded_vit(torch.float32))
    full.save_adapter(tmp_path / "pets", "pets")
    half = init(rounded_vit(torch.bfloat16))
    half.load_adapter(tmp_path / "pets")
    for mine, theirs in zip(
        half.adapter("pets").parameters(), full.adapter("pets").parameters(), strict=True
    ):
        assert mine.dtype == torch.bfloat16
        assert torch.equal(mine, theirs.bfloat16())


TWIN_CONFIG = ConfigUnion(
    LoRAConfig(rank=2, targets=("q", "k", "v", "o", "up", "down")),
    SeqBnConfig(size=4),
    PrefixConfig(length=2),
)


@pytest.mark.parametrize("direction", ["forth", "back"])
@pytest.mark.parametrize("twin", twins.TWINS, ids=lambda twin: f"{twin.source}-{twin.target}")
def test_adapter_loads_on_the_same_weights_in_another_library(
    twin: twins.Twin, direction: str, tmp_path: Path
) -> None:
    source, target = twin.pair()
    run, run_twin = twin.source_features, twin.target_features
    if direction == "back":
        source, target, run, run_twin = target, source, run_twin, run
    twins.assert_alike(source, target, run, run_twin, tmp_path, TWIN_CONFIG)


SPEECH = {family.name: family for family in speech.FAMILIES}
SPEECH_TWINS = [
    (trait.removeprefix("twin:"), family.name)
    for family in speech.FAMILIES
    for trait in family.traits
    if trait.startswith("twin:") and "prefix" in family.traits
]


@pytest.mark.parametrize(("source", "target"), SPEECH_TWINS)
def test_speech_adapter_loads_on_the_same_weights_in_torchaudio(
    source: str, target: str, tmp_path: Path
) -> None:
    def features_of(family: Family) -> Callable[[nn.Module], list[Tensor]]:
        args, kwargs = family.inputs()
        return lambda model: tensors(model(*args, **kwargs))[:1]

    one, other = SPEECH[source], SPEECH[target]
    config = TWIN_CONFIG
    if "prefix" not in one.traits:
        config = CONFIG
    twins.assert_alike(
        one.build(), other.build(), features_of(one), features_of(other), tmp_path, config
    )


@pytest.fixture(scope="module")
def tf457() -> tuple[nn.Module, dict[str, Tensor]]:
    """The encoder, in the installed transformers, on which 4.57 made an adapter; what it gave."""
    folder = DATA / "vit_tf457_lora"
    vit = transformers.ViTModel.from_pretrained(
        folder / "base", dtype=torch.float32, add_pooling_layer=False
    )
    return vit.eval(), load_file(folder / "expected.safetensors")


@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_adapter_of_transformers_4_57_computes_the_same_here(
    library: str, tf457: tuple[nn.Module, dict[str, Tensor]]
) -> None:
    vit, expected = tf457
    if library == "timm":
        timm_vit = VisionTransformer(
            img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2,
            num_classes=0, global_pool="",
        ).eval()  # fmt: skip
        twin = next(twin for twin in twins.TWINS if twin.target == "timm-vit")
        twins.copy_weights(vit, timm_vit, twin.outside)
        vit = timm_vit
    model = init(vit)
    with torch.no_grad():
        plain = tensors(model(expected["images"]))[0]
        stored = model.load_adapter(DATA / "vit_tf457_lora" / "adapter")
        model.set_active_adapters("tf457")
        acting = tensors(model(expected["images"]))[0]
    model.detach()
    assert stored.metadata == {"made with": "transformers 4.57"}
    assert (plain - expected["plain"]).abs().max() < 1e-5
    assert (acting - expected["adapted"]).abs().max() < 1e-5
    assert (expected["adapted"] - expected["plain"]).abs().max() > 0.1
