"""Adapter directories: what is written, what is refused, and that nothing is ever half done."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families.small import hooks, output, randomise, small_vit
from families.vision_language import FAMILIES as VISION_LANGUAGE
from safetensors.torch import load_file, save
from torch import Tensor, nn

from mmadapters import (
    AdapterModel,
    AdapterPlusConfig,
    BottleneckConfig,
    CompacterConfig,
    ConfigUnion,
    DoRAConfig,
    IA3Config,
    LoRAConfig,
    MethodConfig,
    ParallelPlacement,
    PrefixConfig,
    PromptConfig,
    SeqBnConfig,
    SSFConfig,
    UniPELTConfig,
    files,
    init,
)

CONFIG = ConfigUnion(LoRAConfig(rank=2), SeqBnConfig(size=4))
BOTH_FILES = ["adapter.json", "adapter.safetensors"]


def adapted(config: MethodConfig = CONFIG, vit: nn.Module | None = None) -> AdapterModel:
    """A model with one random, active adapter `pets`."""
    model = init(small_vit() if vit is None else vit)
    model.add_adapter("pets", config)
    randomise(model.adapter("pets"))
    model.set_active_adapters("pets")
    return model


@contextlib.contextmanager
def unchanged(model: AdapterModel) -> Iterator[None]:
    """The same adapters, hooks, keys, parameters and output bits behind the block as before it."""

    def state() -> tuple:
        gradients = [name for name, p in model.named_parameters() if p.requires_grad]
        return model.adapter_names, model.active_adapters, hooks(model), gradients

    before, values, result = state(), model.state_dict(), output(model)
    values = {key: value.clone() for key, value in values.items()}
    yield
    assert state() == before
    after = model.state_dict()
    assert list(after) == list(values)
    assert all(torch.equal(after[key], values[key]) for key in values)
    assert torch.equal(output(model), result)


def refused(model: AdapterModel, directory: Path, **options: Any) -> str:
    """The one sentence with which loading is refused, the model unchanged."""
    with unchanged(model), pytest.raises((ValueError, FileNotFoundError)) as caught:
        model.load_adapter(directory, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    return message


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "pets"
    torch.manual_seed(0)
    adapted().save_adapter(directory, "pets", metadata={"labels": ["cat", "dog"]})
    return directory


@pytest.fixture
def saved(saved_once: Path, tmp_path: Path) -> Path:
    """A directory with an adapter, for each test its own."""
    return Path(shutil.copytree(saved_once, tmp_path / "pets"))


@pytest.fixture(scope="module")
def other() -> AdapterModel:
    """A model of the same weights that holds and runs something else."""
    model = init(small_vit())
    model.add_adapter("night", LoRAConfig(rank=2))
    model.set_active_adapters("night")
    return model


def description(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "adapter.json").read_text())


def describe_anew(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Another description without a checksum, as files of earlier versions have none."""
    data = description(directory)
    data.pop("checksum", None)
    change(data)
    (directory / "adapter.json").write_text(json.dumps(data))


def tensors_anew(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Other tensors under a right checksum, as by someone who knows the format."""
    found = load_file(directory / "adapter.safetensors")
    change(found)
    bytes_anew(directory, save(found))


def bytes_anew(directory: Path, data: bytes) -> None:
    (directory / "adapter.safetensors").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    describe_anew(directory, lambda written: written.update(sha256=digest))


@pytest.mark.parametrize(
    "config",
    [
        BottleneckConfig(placement=ParallelPlacement(input="normed"), size=4, norm="before"),
        AdapterPlusConfig(),
        CompacterConfig(size=4),
        LoRAConfig(rank=2, alpha=3, targets=("k", "down")),
        DoRAConfig(rank=2),
        IA3Config(),
        SSFConfig(),
        PrefixConfig(reparametrise=4),
        PromptConfig(deep=False),
        UniPELTConfig(PrefixConfig(), LoRAConfig(rank=2), CompacterConfig(size=4)),
    ],
    ids=lambda config: config.method,
)
def test_loaded_adapter_computes_the_very_same(config: MethodConfig, tmp_path: Path) -> None:
    model = adapted(config)
    model.save_adapter(tmp_path / "pets", "pets")
    fresh = init(small_vit())
    plain = output(fresh)
    stored = fresh.load_adapter(tmp_path / "pets")
    assert stored.name == "pets"
    assert fresh.adapter_names == ("pets",)
    assert fresh.active_adapters is None
    assert torch.equal(output(fresh), plain)
    fresh.set_active_adapters("pets")
    assert torch.equal(output(fresh), output(model))
    assert not torch.equal(output(fresh), plain)
    assert fresh.adapter("pets").config == config
    assert not any(parameter.requires_grad for parameter in fresh.parameters())


def test_directory_holds_two_files_and_no_pickle(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == BOTH_FILES
    assert saved.stat().st_mode & 0o777 == 0o755
    written = description(saved)
    assert written["format"] == 1
    assert written["name"] == "pets"
    assert written["backbone"]["library"] == "timm"
    assert written["backbone"]["architecture"] == "VisionTransformer"
    tower = written["backbone"]["towers"]["vision"]
    assert (tower["width"], tower["depth"], len(tower["weights"])) == (32, 2, 64)
    assert written["metadata"] == {"labels": ["cat", "dog"]}
    keys = set(load_file(saved / "adapter.safetensors"))
    assert "vision.blocks.0.attn.q#lora/a" in keys
    assert "vision.blocks.1.ffn#seq_bn/up.weight" in keys
    assert len(keys) == 2 * (2 * 2 + 4)


def test_saving_the_same_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    model = adapted()
    for name in ("one", "two"):
        model.save_adapter(tmp_path / name, "pets")
    for file in BOTH_FILES:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_file_is_hardly_larger_than_its_numbers(tmp_path: Path) -> None:
    model = adapted(LoRAConfig(rank=16, targets=("q", "k", "v", "o")))
    model.save_adapter(tmp_path / "pets", "pets")
    size = sum(path.stat().st_size for path in (tmp_path / "pets").iterdir())
    numbers = sum(parameter.numel() for parameter in model.adapter("pets").parameters())
    assert numbers == 2 * 4 * 2 * 16 * 32
    assert 4 * numbers < size < 4 * numbers + 4096


def test_adapter_may_be_loaded_under_another_name_and_beside_itself(saved: Path) -> None:
    model = init(small_vit())
    assert model.load_adapter(saved).name == "pets"
    assert model.load_adapter(saved, "cats").name == "pets"
    assert model.adapter_names == ("pets", "cats")
    outputs = []
    for name in model.adapter_names:
        model.set_active_adapters(name)
        outputs.append(output(model))
    assert torch.equal(*outputs)
    model.save_adapter(saved.parent / "cats", "cats")
    assert description(saved.parent / "cats")["name"] == "cats"


def test_loading_leaves_what_acts_acting(saved: Path) -> None:
    model = adapted(SeqBnConfig(size=4))
    before = output(model)
    model.load_adapter(saved, "second")
    assert torch.equal(output(model), before)


def test_head_and_metadata_travel_along(tmp_path: Path) -> None:
    model, head = adapted(), nn.Sequential(nn.BatchNorm1d(32), nn.Linear(32, 2))
    metadata = {"labels": {"0": "cat", "1": "dög"}, "accuracy": 0.9, "size": [32, None], "ok": True}
    model.save_adapter(tmp_path / "pets", "pets", head=head, metadata=metadata)
    stored = init(small_vit()).load_adapter(tmp_path / "pets")
    assert stored.metadata == metadata
    assert stored.config == description(tmp_path / "pets")["config"]
    state = head.state_dict()
    assert stored.head.keys() == state.keys()
    assert all(torch.equal(stored.head[key], state[key]) for key in state)
    assert stored.head["0.num_batches_tracked"].dtype == torch.int64
    nn.Sequential(nn.BatchNorm1d(32), nn.Linear(32, 2)).load_state_dict(stored.head)
    assert not any(key.startswith("head") for key in stored.tensors)


def test_head_with_tied_weights_is_saved_whole(tmp_path: Path) -> None:
    head = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    head[1].weight = head[0].weight
    model = adapted()
    model.save_adapter(tmp_path / "pets", "pets", head=head)
    stored = init(small_vit()).load_adapter(tmp_path / "pets")
    assert torch.equal(stored.head["0.weight"], stored.head["1.weight"])
    assert torch.equal(stored.head["1.weight"], head[0].weight)


def test_metadata_that_is_no_json_is_refused_and_the_old_adapter_stays(saved: Path) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    for wrong in ({"at": object()}, {"loss": float("nan")}):
        with pytest.raises((TypeError, ValueError)):
            adapted().save_adapter(saved, "pets", metadata=wrong)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["pets"]


def test_unknown_adapter_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no adapter is called 'pet'; did you mean 'pets'"):
        adapted().save_adapter(tmp_path / "pets", "pet")
    assert list(tmp_path.iterdir()) == []


def test_adapter_that_could_not_be_loaded_again_is_not_saved(saved: Path) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    model = adapted()
    with torch.no_grad():
        next(model.adapter("pets").parameters())[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"vision\.blocks\.0\.attn\.q#lora/a .* not finite"):
        model.save_adapter(saved, "pets")
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_saving_over_an_adapter_replaces_it(saved: Path) -> None:
    model = adapted(IA3Config())
    model.save_adapter(saved, "pets")
    assert sorted(path.name for path in saved.iterdir()) == BOTH_FILES
    assert [path.name for path in saved.parent.iterdir()] == ["pets"]
    fresh = init(small_vit())
    fresh.load_adapter(saved)
    assert fresh.adapter("pets").config == IA3Config()


def test_saving_into_an_empty_or_a_missing_folder_works(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    model = adapted()
    for directory in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        model.save_adapter(str(directory), "pets")
        assert sorted(path.name for path in directory.iterdir()) == BOTH_FILES


@pytest.mark.parametrize("kind", ["folder", "file", "adapter with more beside it"])
def test_what_is_not_an_adapter_is_never_overwritten(kind: str, saved: Path) -> None:
    precious = saved / "thesis.txt"
    if kind == "file":
        shutil.rmtree(saved)
        precious = saved
    elif kind == "folder":
        for path in saved.iterdir():
            path.unlink()
    precious.write_text("years of work")
    with pytest.raises(ValueError, match=r"pets .*; choose another path") as caught:
        adapted().save_adapter(saved, "pets")
    assert "\n" not in str(caught.value)
    assert precious.read_text() == "years of work"
    assert [path.name for path in saved.parent.iterdir()] == ["pets"]


@pytest.mark.parametrize(
    ("name", "call", "over"),
    [
        ("fsync", 1, False),
        ("fsync", 1, True),
        ("fsync", 2, False),
        ("fsync", 2, True),
        ("rename", 1, False),
        ("rename", 1, True),
        # A directory in the place is renamed away first.
        ("rename", 2, True),
    ],
)
def test_crash_while_saving_leaves_what_was_there_and_no_litter(
    name: str, call: int, over: bool, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = saved if over else saved.parent / "new"
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    model = adapted(IA3Config())
    function, calls = getattr(os, name), []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == call:
            raise OSError(28, "No space left on device")
        return function(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(files, "exchange_at_once", lambda one, two: False)
        patch.setattr(os, name, failing)
        with pytest.raises(OSError, match="No space left"):
            model.save_adapter(target, "pets")
    assert len(calls) >= call
    assert [path.name for path in saved.parent.iterdir()] == ["pets"]
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    init(small_vit()).load_adapter(saved)


def test_interrupt_between_the_two_renames_brings_the_old_adapter_back(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    model, rename, calls = adapted(IA3Config()), os.rename, []

    def interrupted(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(files, "exchange_at_once", lambda one, two: False)
        patch.setattr(os, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.save_adapter(saved, "pets")
    assert [path.name for path in saved.parent.iterdir()] == ["pets"]
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


@pytest.mark.parametrize("missing", BOTH_FILES)
def test_directory_without_one_of_its_files_is_refused(
    missing: str, saved: Path, other: AdapterModel
) -> None:
    (saved / missing).unlink()
    assert refused(other, saved) == f"{saved} is not an adapter directory: it has no {missing}"


def test_path_that_holds_no_adapter_is_refused(other: AdapterModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("nowhere", "file", "."):
        assert "is not an adapter directory: it has no adapter.json" in refused(
            other, tmp_path / name
        )


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_weights_are_refused(keep: int, saved: Path, other: AdapterModel) -> None:
    file = saved / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    message = refused(other, saved)
    assert str(file) in message
    assert "was truncated or changed; copy it again" in message


@pytest.mark.parametrize("at", [4, 60, -1])
def test_one_flipped_bit_is_refused(at: int, saved: Path, other: AdapterModel) -> None:
    file = saved / "adapter.safetensors"
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(bytes(data))
    assert "its checksum differs" in refused(other, saved)


@pytest.mark.parametrize(
    "data", [b"", b"\x08\0\0\0\0\0\0\0{}      ", b"not tensors at all, but text"]
)
def test_file_with_a_right_checksum_that_is_no_safetensors_is_refused(
    data: bytes, saved: Path, other: AdapterModel
) -> None:
    bytes_anew(saved, data)
    message = refused(other, saved)
    assert "adapter.safetensors is not a safetensors file" in message or "are missing" in message


@pytest.mark.parametrize("text", ["", "{", "[1, 2", '{"format": 1,}', "\x00"], ids=repr)
def test_json_that_cannot_be_read_is_refused(text: str, saved: Path, other: AdapterModel) -> None:
    (saved / "adapter.json").write_text(text)
    assert f"{saved / 'adapter.json'} is not readable as JSON" in refused(other, saved)


def test_json_that_is_no_text_is_refused(saved: Path, other: AdapterModel) -> None:
    (saved / "adapter.json").write_bytes(b"\xff\xfe\x00{")
    assert "adapter.json is not readable as JSON" in refused(other, saved)


@pytest.mark.parametrize("key", ["name", "config", "backbone", "sha256"])
def test_json_without_a_key_is_refused(key: str, saved: Path, other: AdapterModel) -> None:
    describe_anew(saved, lambda data: data.pop(key))
    assert f"adapter.json lacks {key}: it was changed by hand" in refused(other, saved)


def in_config(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data["config"]["configs"][0].update(values)


def in_tower(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data["backbone"]["towers"]["vision"].update(values)


def in_tower_of(name: str) -> Callable[[dict[str, Any]], None]:
    tower = {"width": 32, "depth": 2, "weights": "0" * 64}
    return lambda data: data["backbone"].update(towers={name: tower})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(format=2), "has format 2, this version reads format 1"),
        (lambda data: data.update(format="1"), "has format '1', this version reads format 1"),
        (lambda data: data.pop("format"), "has format None, this version reads format 1"),
        (lambda data: data.update(sha256="0" * 64), "its checksum differs"),
        (lambda data: data.update(sha256=None), "checksum differs"),
        (lambda data: data.update(name="a/b"), "'a/b' cannot name an adapter"),
        (lambda data: data.update(name=7), "7 cannot name an adapter"),
        (lambda data: data.update(config="lora"), "a config must be a mapping, not 'lora'"),
        (lambda data: data.update(config={}), "no method is called ''"),
        (in_config(method="lorra"), "no method is called 'lorra'; did you mean 'lora'"),
        (in_config(rnak=3), "LoRAConfig has no option 'rnak'; did you mean 'rank'"),
        (in_config(rank="two"), "rank must be a whole number of at least 1, not 'two'"),
        (in_config(rank=3), "attn.q#lora/a has shape (2, 32), this encoder needs (3, 32)"),
        (in_config(targets=["q"]), "0 tensors are missing and 4 have no place"),
        (in_config(targets=["q", "k", "v"]), "4 tensors are missing and 0 have no place"),
        (in_config(sites=["audio"]), "no site of VisionTransformer matches 'audio'"),
        (lambda data: data.update(backbone="vit"), "adapter.json: backbone"),
        (lambda data: data.update(backbone={}), "adapter.json: backbone"),
        (lambda data: data["backbone"].update(towers={}), "adapter.json: backbone"),
        (lambda data: data["backbone"].update(towers=["vision"]), "adapter.json: backbone"),
        (lambda data: data["backbone"]["towers"].update(vision=3), "adapter.json: backbone"),
        (lambda data: data["backbone"]["towers"]["vision"].pop("width"), "adapter.json: backbone"),
        (in_tower_of("audio"), "tower 'audio', which VisionTransformer lacks"),
        (in_tower(width=64), "of width 64 in tower 'vision'; this VisionTransformer has 32"),
        (in_tower(depth=12), "of depth 12 in tower 'vision'; this VisionTransformer has 2"),
        (in_tower(weights="0" * 64), "with other weights in tower 'vision'"),
        (lambda data: data.update(metadata=[1]), "adapter.json: metadata"),
    ],
)  # fmt: skip
def test_json_with_wrong_content_is_refused(
    change: Callable[[dict[str, Any]], Any], message: str, saved: Path, other: AdapterModel
) -> None:
    describe_anew(saved, change)
    assert message in refused(other, saved)


Q = "vision.blocks.0.attn.q#lora/a"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.pop(Q), f"1 tensors are missing and 0 have no place, first {Q!r}"),
        (lambda found: found.clear(), "16 tensors are missing and 0 have no place"),
        (
            lambda found: found.update({"vision.blocks.7.attn.q#lora/a": torch.ones(2, 32)}),
            "0 tensors are missing and 1 have no place, first 'vision.blocks.7.attn.q#lora/a'",
        ),
        (
            lambda found: found.update({Q: torch.ones(4, 32)}),
            f"{Q} has shape (4, 32), this encoder needs (2, 32)",
        ),
        (
            lambda found: found.update({Q: torch.full((2, 32), torch.nan)}),
            f"{Q} holds values that are not finite",
        ),
        (
            lambda found: found[Q].view(-1)[5].fill_(torch.inf),
            f"{Q} holds values that are not finite",
        ),
        (
            lambda found: found.update({"head/weight": torch.tensor([-torch.inf])}),
            "head/weight holds values that are not finite",
        ),
        (lambda found: found.update({Q: torch.ones(2, 32).int()}), f"{Q} holds int32"),
    ],
    ids=["missing", "empty", "extra", "shape", "nan", "inf", "head", "integers"],
)
def test_tensors_that_do_not_fit_are_refused(
    change: Callable[[dict[str, Tensor]], Any], message: str, saved: Path, other: AdapterModel
) -> None:
    tensors_anew(saved, change)
    assert message in refused(other, saved)


def test_detached_model_loads_nothing(saved: Path) -> None:
    model = init(small_vit())
    model.detach()
    assert "this model was detached from its encoder" in refused(model, saved)


def test_name_that_is_taken_is_refused(saved: Path, other: AdapterModel) -> None:
    assert "an adapter called 'night' is here already" in refused(other, saved, name="night")


@pytest.mark.parametrize("name", ["a/b", "../pets", "a\\b", "", "a.b"])
def test_name_that_cannot_be_a_folder_is_refused(
    name: str, saved: Path, other: AdapterModel
) -> None:
    assert f"{name!r} cannot name an adapter" in refused(other, saved, name=name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 64}, "of width 32 in tower 'vision'; this VisionTransformer has 64"),
        ({"depth": 3}, "of depth 2 in tower 'vision'; this VisionTransformer has 3"),
        ({"seed": 1}, "with other weights in tower 'vision'; load the same pretrained weights"),
    ],
    ids=["width", "depth", "weights"],
)
def test_adapter_of_another_encoder_is_refused(
    options: dict[str, int], message: str, saved: Path
) -> None:
    model = init(small_vit(**options))
    found = refused(model, saved)
    assert message in found
    assert found.startswith("this adapter was made for VisionTransformer (timm)")


def test_other_weights_are_taken_only_on_request_and_other_shapes_never(saved: Path) -> None:
    model = init(small_vit(seed=1))
    assert "allow_different_weights=True" in refused(model, saved)
    model.load_adapter(saved, allow_different_weights=True)
    assert model.adapter_names == ("pets",)
    wide = init(small_vit(embed_dim=64))
    assert "width 32" in refused(wide, saved, allow_different_weights=True)


def test_adapter_of_a_tower_that_is_not_there_is_refused(tmp_path: Path) -> None:
    family = next(family for family in VISION_LANGUAGE if family.name == "hf-clip")
    model = init(family.build())
    model.add_adapter("pets", LoRAConfig(rank=2, sites=("text",)))
    model.save_adapter(tmp_path / "pets", "pets")
    assert set(description(tmp_path / "pets")["backbone"]["towers"]) == {"text"}
    message = refused(init(small_vit()), tmp_path / "pets")
    assert "tower 'text', which VisionTransformer lacks" in message


def test_identity_is_that_of_the_encoder_before_a_merge(tmp_path: Path) -> None:
    model = adapted(LoRAConfig(rank=2))
    model.set_active_adapters(None)
    model.merge_adapter("pets")
    model.save_adapter(tmp_path / "pets", "pets")
    fresh = init(small_vit())
    fresh.load_adapter(tmp_path / "pets")
    fresh.set_active_adapters("pets")
    assert (output(fresh) - output(model)).abs().max() < 1e-5
