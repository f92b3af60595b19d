"""A captioning job on drawn scenes from its config to the predictions of what it saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from typer.testing import CliRunner

import mmadapters
from mmadapters.tasks.artifact import open_directory
from mmadapters.tasks.cli.app import app
from mmadapters.tasks.config.file import read_config
from mmadapters.tasks.data.load import load_splits
from mmadapters.tasks.data.media import read_image
from mmadapters.tasks.jobs.prediction import predict
from mmadapters.tasks.jobs.run import evaluate_split, train
from mmadapters.tasks.reports.results import Run

from .conftest import SMALL

JOB: dict[str, Any] = {
    "task": "captioning",
    "name": "told",
    "data": {
        "source": "builtin/scenes",
        "options": {"train": 24, "validation": 8, "test": 12},
    },
    "adapter": {"method": "seq_bn", "size": 8},
    "decoding": {"max_tokens": 12},
    "trainer": {
        "max_steps": 4,
        "batch_size": 8,
        "accumulation": 2,
        "evaluate_every": 2,
        "device": "cpu",
        "tensorboard": False,
    },
    "evaluation": {"bootstrap": 20, "pictures": 4, "before": True, "groups": ["count"]},
}


def config_file(folder: Path, words: Path, **sections: Any) -> Path:
    """A job on a BLIP whose weights, drawn at random, lie in a file."""
    path, weights = folder / "told.yaml", folder / "blip.safetensors"
    torch.manual_seed(0)
    state = mmadapters.load_backbone("hf/blip-caption", **SMALL).state_dict()
    save_file({name: tensor.clone() for name, tensor in state.items()}, weights)
    backbone = {
        "name": "hf/blip-caption",
        "options": SMALL,
        "weights": str(weights),
        "processor": str(words),
    }
    given = {**JOB, "backbone": backbone, "output": str(folder / "run"), **sections}
    path.write_text(yaml.safe_dump(given), "utf-8")
    return path


@pytest.fixture(scope="module")
def run(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    path = config_file(tmp_path_factory.mktemp("captioning"), words)
    return train(read_config(str(path)), quiet=True)


@pytest.fixture(scope="module")
def pictures(run: Run, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("pictures")
    rows = load_splits(run.task.config.data, run.task.columns, ("test",))["test"]
    paths = [str(folder / f"{number:02}.png") for number in range(4)]
    for number, path in enumerate(paths):
        read_image(rows[number]["image"]).save(path)
    return paths


def test_a_run_has_figures_before_and_after_and_a_report(run: Run) -> None:
    found = json.loads((run.folder / "metrics.json").read_text("utf-8"))
    test = found["splits"]["test"]["metrics"]
    assert next(iter(test)) == "CIDEr"
    assert test["CIDEr"]["count"] == 12
    assert test["CIDEr"]["low"] <= test["CIDEr"]["value"] <= test["CIDEr"]["high"]
    assert test["perplexity"]["value"] < found["before"]["metrics"]["perplexity"]["value"]
    assert set(found["splits"]["test"]["groups"]["count"]) <= {"1", "2", "3", "4", "5", "6"}
    assert 0 < found["trained_share"] < 0.1
    assert found["head_parameters"] == 0
    report = (run.folder / "report.html").read_text("utf-8")
    for title in ("Highest CIDEr", "Lowest CIDEr", "what people wrote", "BLEU-4"):
        assert title in report


def test_what_was_saved_writes_the_same(run: Run, pictures: list[str]) -> None:
    opened = open_directory(run.folder, device="cpu")
    expected = list(run.task.predict(run.model.eval(), pictures, out=None))
    assert list(predict(opened, [str(Path(pictures[0]).parent)])) == expected
    assert list(predict(opened, pictures[2:3])) == expected[2:3]
    assert any(line["caption"] for line in expected)


def test_an_encoder_trained_as_a_whole_is_saved_and_writes_the_same(
    words: Path, tmp_path: Path, pictures: list[str]
) -> None:
    trainer = {**JOB["trainer"], "mode": "full", "max_steps": 2}
    deciding = {**JOB["evaluation"], "before": False, "deciding": "perplexity"}
    path = config_file(tmp_path, words, trainer=trainer, evaluation=deciding)
    run = train(read_config(str(path)), quiet=True)
    assert run.headline.name == "perplexity"
    opened = open_directory(run.folder, device="cpu")
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter.cpu(), opened.model.get_parameter(name))
    expected = list(run.task.predict(run.model.eval(), pictures, out=None))
    assert list(predict(opened, pictures)) == expected


def test_an_encoder_as_it_is_is_measured(words: Path, tmp_path: Path) -> None:
    path = config_file(tmp_path, words, trainer={**JOB["trainer"], "mode": "none"})
    run = train(read_config(str(path)), quiet=True)
    assert run.before is not None
    assert run.before["CIDEr"].value == run.headline.value
    rows = load_splits(run.task.config.data, run.task.columns, ("test",))["test"]
    opened = open_directory(run.folder, device="cpu")
    again = evaluate_split(opened.task, opened.model, rows).records
    assert opened.task.score(again, bootstrap=0)["CIDEr"].value == pytest.approx(run.headline.value)


def test_the_command_line_knows_the_task(run: Run, pictures: list[str], tmp_path: Path) -> None:
    invoke = CliRunner().invoke
    found = invoke(app, ["predict", str(run.folder), *pictures[:1]])
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout.strip().splitlines()[-1]).keys() == {"image", "caption"}
    found = invoke(app, ["doctor", str(run.folder.parent / "told.yaml")])
    assert found.exit_code == 0, found.output
    assert "Every row can be used." in found.output
    found = invoke(app, ["evaluate", str(run.folder)])
    assert found.exit_code == 0, found.output
    assert "CIDEr" in found.output


def test_the_shipped_config_is_valid() -> None:
    config = read_config("caption_blip")
    assert config.task == "captioning"
    assert config.adapter["sites"] == ["vision", "decoder"]
