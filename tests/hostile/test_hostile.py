"""Malformed inputs: each is refused in one sentence or works; none crashes, hangs or is half done.

`make test` takes a sample of them, `--pairs all` (`make test-all`) all: over 1,000.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families.small import output, randomise, small_vit
from hostile import inputs

from mmadapters import AdapterModel, ConfigUnion, LoRAConfig, PrefixConfig, SeqBnConfig, init
from mmadapters.adapters.description import checksum
from mmadapters.limits import LIMITS
from mmadapters.tasks.config.errors import ConfigError
from mmadapters.tasks.config.file import read_config
from mmadapters.tasks.config.schema import DataConfig
from mmadapters.tasks.core.errors import BadRow
from mmadapters.tasks.core.rows import Column
from mmadapters.tasks.core.saved import STATES, read_metadata
from mmadapters.tasks.data.load import load_splits
from mmadapters.tasks.data.media import read_audio, read_image

SEED = 7
MEMORY, SECONDS = 1 << 30, 20  # more than one refusal may take


@pytest.fixture(scope="module")
def share(request: pytest.FixtureRequest) -> float:
    """The share of the inputs that are tried."""
    return 1.0 if request.config.getoption("--pairs") == "all" else 0.1


def tried(
    every: Iterator[tuple[str, Any]], use: Callable[[Any], Any], *kinds: type
) -> dict[str, str]:
    """Uses each input and returns the sentences of those that were refused, by name."""
    said: dict[str, str] = {}
    for name, value in every:
        before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        try:
            use(value)
        except kinds as error:
            said[name] = str(error)
            assert said[name], name
            assert len(said[name]) < 1500, name
        except Exception as error:
            raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        assert grown < MEMORY, f"{name} took {grown / 1e9:.1f} GB"
        assert time.process_time() - started < SECONDS, f"{name} took too long"
    return said


@pytest.fixture(scope="module")
def model() -> AdapterModel:
    return init(small_vit())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, model: AdapterModel) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "pets"
    other = init(small_vit())
    other.add_adapter(
        "pets", ConfigUnion(LoRAConfig(rank=2), PrefixConfig(length=3), SeqBnConfig(size=4))
    )
    randomise(other.adapter("pets"))
    other.save_adapter(folder, "pets", metadata={"labels": ["a", "b"], "accuracy": 0.9})
    return folder


def rewritten(folder: Path, description: dict[str, Any], target: Path) -> Path:
    """An adapter directory with another description and a right checksum, by a stranger."""
    target.mkdir(parents=True)
    data = {key: value for key, value in description.items() if key != "checksum"}
    data["checksum"] = checksum(data)
    (target / "adapter.json").write_text(inputs.as_text(data))
    weights = (folder / "adapter.safetensors").read_bytes()
    (target / "adapter.safetensors").write_bytes(weights)
    return target


def loading(model: AdapterModel) -> Callable[[Path], None]:
    def load(folder: Path) -> None:
        try:
            model.load_adapter(folder)
        finally:
            for name in model.adapter_names:
                model.delete_adapter(name)

    return load


def test_no_flipped_bit_is_accepted(
    saved: Path, model: AdapterModel, tmp_path: Path, share: float
) -> None:
    count = int(400 * share)
    bare = output(model)
    every = inputs.flipped(saved, tmp_path, seed=SEED, count=count)
    said = tried(every, loading(model), ValueError)
    # 1e-05 and 1E-05 are one bit apart and the same number.
    assert len(said) >= count - 2
    assert torch.equal(output(model), bare)


def test_mistyped_descriptions_are_refused_or_harmless(
    saved: Path, model: AdapterModel, tmp_path: Path, share: float
) -> None:
    good = json.loads((saved / "adapter.json").read_text())
    del good["metadata"], good["checksum"], good["sha256"]
    sha = json.loads((saved / "adapter.json").read_text())["sha256"]
    bare = output(model)
    cases = inputs.mistyped(good, seed=SEED, count=int(300 * share))
    every = (
        (name, rewritten(saved, {**data, "sha256": sha}, tmp_path / str(number)))
        for number, (name, data) in enumerate(cases)
    )
    tried(every, loading(model), ValueError)
    assert torch.equal(output(model), bare)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("config", "configs", 1, "length"), 300_000, "has shape"),
        (("config", "configs", 1, "length"), 10**30, "no tensor is that large"),
        (("config", "configs", 2, "size"), 10**9, "has shape"),
        (("config", "configs", 2, "scale"), 1e300, "outputs would not be finite"),
        (("config", "configs", 0, "rslora"), "x", "rslora must be true or false, not 'x'"),
        (("config", "configs", 0, "sites"), ["*"] * 20_000, "more than the limit of 10,000"),
        (("format",), True, "has format True"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_descriptions_that_ask_for_too_much_are_refused_cheaply(
    path: tuple, value: Any, message: str, saved: Path, model: AdapterModel, tmp_path: Path
) -> None:
    good = json.loads((saved / "adapter.json").read_text())
    folder = rewritten(saved, inputs.changed(good, path, value), tmp_path / "pets")
    (said,) = tried(iter([("", folder)]), loading(model), ValueError).values()
    assert message in said


def test_a_union_of_many_methods_is_refused(
    saved: Path, model: AdapterModel, tmp_path: Path
) -> None:
    good = json.loads((saved / "adapter.json").read_text())
    good["config"]["configs"] *= 33_334
    folder = rewritten(saved, good, tmp_path / "pets")
    (said,) = tried(iter([("", folder)]), loading(model), ValueError).values()
    assert "holds 100,002 methods in one union, more than the limit of 64" in said


def test_a_change_by_hand_is_told_and_files_without_a_checksum_load(
    saved: Path, model: AdapterModel, tmp_path: Path
) -> None:
    data = json.loads((saved / "adapter.json").read_text())
    data["metadata"]["accuracy"] = 0.99
    folder = rewritten(saved, data, tmp_path / "pets")
    data["checksum"] = json.loads((saved / "adapter.json").read_text())["checksum"]
    (folder / "adapter.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="checksum differs"):
        model.load_adapter(folder)
    del data["checksum"]
    (folder / "adapter.json").write_text(json.dumps(data))
    assert model.load_adapter(folder).metadata["accuracy"] == 0.99
    model.delete_adapter("pets")


def test_values_too_large_for_outputs_are_neither_saved_nor_loaded(tmp_path: Path) -> None:
    model = init(small_vit())
    model.add_adapter("pets", LoRAConfig(rank=2))
    for parameter in model.adapter("pets").parameters():
        parameter.data.fill_(1e30)
    with pytest.raises(ValueError, match="outputs would not be finite"):
        model.save_adapter(tmp_path / "pets", "pets")


@pytest.mark.parametrize("drop", ["adapter", "name"])
def test_a_composition_names_what_it_holds(drop: str, tmp_path: Path) -> None:
    model = init(small_vit())
    for name in ("a", "b"):
        model.add_adapter(name, SeqBnConfig(size=4))
    model.save_composition(tmp_path / "both", {"average": ["a", "b"]})
    good = json.loads((tmp_path / "both/adapter.json").read_text())
    if drop == "adapter":
        del good["config"]["adapters"]["b"]
    else:
        good["config"]["composition"] = {"average": ["a", "c"]}
    folder = rewritten(tmp_path / "both", good, tmp_path / "changed")
    fresh = init(small_vit())
    with pytest.raises(ValueError, match=r"names the adapter '[bc]', which"):
        fresh.load_composition(folder)
    assert fresh.adapter_names == ()


def test_configs_are_refused_in_time(tmp_path: Path, share: float) -> None:
    def read(text: str) -> None:
        file = tmp_path / "job.yaml"
        file.write_text(text)
        read_config(str(file))

    said = tried(inputs.configs(seed=SEED, count=int(200 * share) + 6), read, ConfigError)
    for name in ("aliases", "interpolation", "base 60", "negative limit", "deep []", "deep {}"):
        assert name in said
    assert "base 60" in said["base 60"]
    assert "data.limit.train must be greater than or equal to 1" in said["negative limit"]


def test_pictures_are_refused(share: float) -> None:
    every = inputs.pictures(seed=SEED, count=int(200 * share) + 4)
    said = tried(every, lambda data: read_image({"bytes": data, "path": "a.png"}), BadRow)
    assert "300,000 times as long as it is wide" in said["long"]
    assert "300,000 times as long as it is wide" in said["tall"]
    assert {"bomb", "postscript"} <= said.keys()


def test_sounds_are_refused(share: float) -> None:
    every = inputs.sounds(seed=SEED, count=int(100 * share) + 3)
    said = tried(every, lambda data: read_audio({"bytes": data, "path": "a.wav"}, 16_000), BadRow)
    assert "20,000 seconds, more than the limit of 14,400" in said["1 Hz"]
    assert "18,000 seconds, more than the limit of 14,400" in said["five hours"]
    assert "samples a second" in said["2 GHz"]


def test_a_long_recording_is_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    import soundfile

    from mmadapters.tasks.data.media import audio

    for rate in (44_100, 8_000, 16_000):
        noise = np.random.default_rng(0).standard_normal((int(rate * 7.3), 2)) * 0.1
        buffer = io.BytesIO()
        soundfile.write(buffer, noise, rate, format="WAV", subtype="FLOAT")
        value = {"bytes": buffer.getvalue()}
        whole = read_audio(value, 16_000)
        with monkeypatch.context() as patch:
            patch.setattr(audio, "PIECE", 1)
            pieces = read_audio(value, 16_000)
        np.testing.assert_allclose(pieces, whole, atol=1e-6)


def test_tables_are_refused(tmp_path: Path, share: float) -> None:
    columns = {"image": Column("image"), "label": Column("text")}
    (tmp_path / "data").mkdir()
    for name in ("a.png", "b.png", "../outside.png"):
        (tmp_path / "data" / name).write_bytes(inputs.png(4, 4))

    def read(data: bytes) -> None:
        file = tmp_path / "data" / "table.jsonl"
        file.write_bytes(data)
        load_splits(DataConfig(source=str(file)), columns)

    said = tried(inputs.tables(seed=SEED, count=int(100 * share) + 5), read, ValueError)
    for name in ("deep", "deep objects", "deep list"):
        assert "nested too deeply" in said[name]
    for name in ("climbing", "server"):
        assert "data.trust_paths: true" in said[name]


PREPROCESSING = {
    **{"height": 32, "width": 32, "mean": [0.5] * 3, "std": [0.5] * 3},
    **{"interpolation": "bicubic", "resize": "shortest", "crop": 1.0},
}
TEXT = {"context_length": 77, "vocabulary": 1000}
GOOD: dict[str, dict[str, Any]] = {
    "segmentation": {"classes": ["a", "b"], "preprocessing": PREPROCESSING},
    "asr": {
        **{"rate": 16_000, "layers": [[10, 5], [3, 2]], "longest": None, "normalise": True},
        "vocabulary": {"tokens": ["<pad>", "|", "a"], "blank": 0, "special": [0], "spaced": False},
    },
    "retrieval": {"preprocessing": PREPROCESSING, "blip": False, "text": TEXT},
    "captioning": {"preprocessing": PREPROCESSING, "text": {**TEXT, "encode": None}},
    "vqa": {
        **{"preprocessing": PREPROCESSING, "head": "fused", "text": TEXT, "answers": ["a"]},
        **{"official": False, "several": True},
    },
    "classification": {
        "labels": {"names": ["a", "b"], "coded": [], "separator": None},
        **{"counts": [3, 4], "rows": 7, "preprocessing": PREPROCESSING},
    },
}


@pytest.mark.parametrize("task", STATES)
def test_mistyped_states_are_refused(task: str, share: float) -> None:
    good = {"task": task, "mode": "adapter", "job": {}, "state": GOOD[task]}
    read_metadata(good, "adapter.json")
    # Each place gets a value that none of them takes.
    every = [
        (".".join(map(str, path)), inputs.changed(good, path, {"no": "such"}))
        for path in inputs.places(good)
        if path != ("job",)
    ]
    step = 1 if share == 1 else 3
    chosen = every[::step]
    said = tried(iter(chosen), lambda data: read_metadata(data, "adapter.json"), ValueError)
    assert said.keys() == {name for name, _ in chosen}
    assert all("adapter.json: metadata" in sentence for sentence in said.values())


def test_the_table_of_limits_in_the_docs_is_that_of_the_code() -> None:
    text = (Path(__file__).parents[2] / "docs/files.md").read_text("utf-8")
    for limit in LIMITS:
        (line,) = [line for line in text.splitlines() if f"`{limit.variable}`" in line]
        assert f" {limit.default:,} " in line, line


def test_a_limit_has_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    data = {"bytes": inputs.png(300, 300), "path": "a.png"}
    read_image(data)
    monkeypatch.setenv("MMADAPTERS_MAX_PIXELS", "1000")
    with pytest.raises(BadRow, match="90,000 pixels in a picture, more than the limit of 1,000"):
        read_image(data)
    monkeypatch.setenv("MMADAPTERS_MAX_PIXELS", "many")
    with pytest.raises(ValueError, match="must be a whole number above 0"):
        read_image(data)
