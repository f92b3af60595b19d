"""`inspect`: what it says of sites and costs is what adding, saving and merging then give."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console
from torch import nn

import mmadapters
from mmadapters.methods import METHODS
from mmadapters.tasks.jobs.inspection import Inspection, MethodRow, inspect, print_inspection

SMALL_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 4}
NAME = "timm/vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def found() -> Inspection:
    return inspect(NAME, options=SMALL_VIT)


@pytest.fixture(scope="module")
def without_biases() -> Inspection:
    return inspect(NAME, options=SMALL_VIT | {"qkv_bias": False})


@pytest.fixture(scope="module")
def model() -> mmadapters.AdapterModel:
    return mmadapters.init(mmadapters.load_backbone(NAME, **SMALL_VIT))


@pytest.fixture(scope="module")
def model_without_biases() -> mmadapters.AdapterModel:
    return mmadapters.init(mmadapters.load_backbone(NAME, **SMALL_VIT, qkv_bias=False))


def row(found: Inspection, method: str) -> MethodRow:
    return next(row for row in found.methods if row.method == method)


@pytest.mark.parametrize("method", METHODS)
def test_costs_are_those_of_the_adapter_that_is_then_added(
    found: Inspection, model: mmadapters.AdapterModel, method: str, tmp_path: Path
) -> None:
    told = row(found, method)
    if told.problem is not None:
        with pytest.raises(ValueError) as error:
            model.add_adapter("a", method)
        assert str(error.value) == told.problem
        return
    model.add_adapter("a", method)
    (added,) = model.adapter_summary()
    assert (told.sites, told.parameters) == (added.sites, added.parameters)
    assert 100 * told.share == pytest.approx(added.share)
    model.save_adapter(tmp_path / "a", "a")
    assert told.fp32_bytes == (tmp_path / "a" / "adapter.safetensors").stat().st_size
    assert told.identity is model.adapter("a").config.identity
    model.delete_adapter("a")


def test_methods_that_couple_two_towers_cost_what_adding_and_saving_then_shows(
    tmp_path: Path,
) -> None:
    """What towers share is counted once."""
    of_clip = inspect("nano/clip")
    model = mmadapters.init(mmadapters.load_backbone("nano/clip"))
    for method in ("mma", "uniadapter", "gated_cross_attention"):
        told = row(of_clip, method)
        if told.problem is not None:
            with pytest.raises(ValueError, match=re.escape(told.problem)):
                model.add_adapter(method, method)
            continue
        model.add_adapter(method, method)
        own = model.adapter(method)
        assert told.parameters == sum(parameter.numel() for parameter in own.parameters())
        assert told.sites == len(list(own.entries()))
        model.save_adapter(tmp_path / method, method)
        assert told.fp32_bytes == (tmp_path / method / "adapter.safetensors").stat().st_size
    assert {"mma", "gated_cross_attention"} <= set(model.adapter_names)


@pytest.mark.parametrize("method", METHODS)
def test_what_can_be_merged_is_what_merging_then_accepts(
    without_biases: Inspection, model_without_biases: mmadapters.AdapterModel, method: str
) -> None:
    told = row(without_biases, method)
    if told.problem is not None:
        assert told.mergeable is False
        return
    model = model_without_biases
    model.add_adapter("a", method)
    if told.mergeable is True:
        model.merge_adapter("a")
        model.reset_adapter("a")
        model.delete_adapter("a")
        return
    with pytest.raises(ValueError) as error:
        model.merge_adapter("a")
    model.delete_adapter("a")
    assert str(error.value) == f"adapter 'a' cannot be merged: {told.mergeable}"


def test_a_missing_bias_keeps_a_shift_from_being_merged(
    found: Inspection, without_biases: Inspection
) -> None:
    assert row(found, "ssf").mergeable is True
    assert "has no parameter to hold its shift" in str(row(without_biases, "ssf").mergeable)


def test_half_the_bytes_in_half_precision(found: Inspection) -> None:
    lora = row(found, "lora")
    # Two bytes a number less; the names in the file's head are the same, up to its padding to 8.
    assert abs(lora.fp32_bytes - lora.fp16_bytes - 2 * lora.parameters) <= 128


def test_sites_are_all_canonical_names_with_the_shapes_of_their_weights(
    found: Inspection, model: mmadapters.AdapterModel
) -> None:
    (tower,) = found.towers
    names = [name for name in model.sites.names() if name.count(".") != 2 and name != "vision"]
    assert [site.name for site in tower.sites] == [
        name for name in names if not name.endswith(("blocks.0", "blocks.1", "blocks.2"))
    ]
    shapes = {site.name: (site.inputs, site.outputs, site.parameters) for site in tower.sites}
    # By the layout of timm: fused q, k and v, and a feed-forward four times as wide.
    assert shapes["vision.blocks.1.attn.k"] == (64, 64, 64 * 64 + 64)
    assert shapes["vision.blocks.1.ffn.up"] == (64, 256, 64 * 256 + 256)
    assert shapes["vision.blocks.1.ffn.down"] == (256, 64, 256 * 64 + 64)
    assert shapes["vision.norm"] == (64, 64, 128)


def test_a_tower_has_the_parameters_of_its_blocks_and_norm(found: Inspection) -> None:
    backbone = mmadapters.load_backbone(NAME, **SMALL_VIT)
    modules = nn.ModuleList([backbone.blocks, backbone.norm])  # type: ignore[list-item]
    (tower,) = found.towers
    assert tower.parameters == sum(p.numel() for p in modules.parameters())
    assert found.parameters == sum(p.numel() for p in backbone.parameters())
    assert (tower.depth, tower.width, tower.prompts) == (3, 64, None)
    sublayers = [site for site in tower.sites if site.kind in ("attn", "ffn")]
    assert sum(site.parameters for site in sublayers) + 128 == tower.parameters


def test_it_is_ready_for_json(found: Inspection) -> None:
    data = json.loads(json.dumps(found.as_dict()))
    assert data["methods"][0]["method"] == next(iter(METHODS))
    assert data["towers"][0]["sites"][0]["name"] == "vision.blocks.0.attn"
    assert data["architecture"] == "VisionTransformer"


def test_several_towers_each_have_their_table() -> None:
    found = inspect("nano/clip")
    assert [tower.name for tower in found.towers] == ["vision", "text"]
    assert "text tower" in str(row(found, "prompt").problem)
    text = printed(found, width=100)
    assert "vision.blocks.[0-" in text
    assert "text.blocks.[0-" in text


def test_the_tables_say_every_method_and_every_reason_once(found: Inspection) -> None:
    text = printed(found, width=100)
    assert f"{NAME}: VisionTransformer of timm, {found.parameters:,} parameters" in text
    assert "vision.blocks.[0-2].attn.q" in text
    for method in found.methods:
        assert re.search(rf"│ {method.method} *│", text)
    assert text.count("so no weight equals it") == 2  # bottlenecks, gates
    assert "a ConfigUnion needs at least two methods" in text


def test_a_narrow_terminal_loses_no_name(found: Inspection) -> None:
    text = printed(found, width=80)
    assert "vision.blocks.[0-2].attn.norm" in text
    assert "double_seq_bn" in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_an_unknown_encoder_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'nano/vit'"):
        inspect("nano/vitt")


def printed(found: Inspection, *, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_inspection(found, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_speech_encoder_shows_its_front_end_and_what_adapters_of_it_cost() -> None:
    found = inspect("nano/wav2vec2")
    (tower,) = found.towers
    convolutions = [site for site in tower.sites if site.kind == "conv"]
    assert [site.name for site in convolutions] == [f"audio.front.{index}" for index in range(7)]
    assert convolutions[0].inputs == 1
    for method in ("e_adapter", "mms_adapter", "conformer_adapter", "l_adapter", "conv_front_end"):
        told = row(found, method)
        assert told.problem is None
        assert told.identity is True
        assert told.parameters > 0
    assert row(found, "conv_front_end").sites == 7
    assert row(found, "l_adapter").sites == 1
    # The running mean and variance of every block are in the file, too.
    conformer = row(found, "conformer_adapter")
    numbers = conformer.parameters + 2 * 64 * conformer.sites
    assert abs(conformer.fp32_bytes - conformer.fp16_bytes - 2 * numbers) <= 128
    text = printed(found, width=100)
    assert "audio.front.[5-6]" in text
    assert "conformer_adapter" in text
    assert "…" not in printed(found, width=80)


def test_an_image_text_encoder_shows_its_embeddings_and_what_an_adapter_of_one_costs() -> None:
    found = inspect("nano/clip")
    (site,) = (site for site in found.towers[0].sites if site.kind == "embedding")
    assert site.name == "vision.embedding"
    told = row(found, "clip_adapter")
    assert told.sites == 1
    assert told.parameters == 2 * site.outputs * (site.outputs // 4)
    assert told.identity is False
    assert "no weight equals it" in str(told.mergeable)
    assert "vision.embedding" in printed(found, width=80)


def test_speech_methods_say_why_they_are_not_for_an_image_encoder(found: Inspection) -> None:
    assert "is for speech" in str(row(found, "conformer_adapter").problem)
    assert "is for speech" in str(row(found, "l_adapter").problem)
    assert "no convolutional front end" in str(row(found, "conv_front_end").problem)
