"""Nothing is trained that evaluation, saving or the report would lose; a report is made again."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from mmadapters.tasks.artifact import Opened
from mmadapters.tasks.cli.app import app
from mmadapters.tasks.config.file import read_config
from mmadapters.tasks.config.schema import SPLITS
from mmadapters.tasks.core.errors import BadInputs
from mmadapters.tasks.data.load import load_splits
from mmadapters.tasks.jobs import ending
from mmadapters.tasks.jobs import run as runs
from mmadapters.tasks.jobs.model import make_model, rows_to_fit, sizes
from mmadapters.tasks.jobs.prediction import predict
from mmadapters.tasks.jobs.rehearsal import rehearse
from mmadapters.tasks.registry import task_class
from mmadapters.tasks.reports.results import Run
from mmadapters.tasks.training.encoder_trainer import EncoderTrainer

ADAPTER = {"method": "double_seq_bn", "size": 2, "sites": ["vision.blocks.7.*"]}
FEW = {"train": 8, "validation": 4, "test": 4}
CONFIG: dict[str, Any] = {
    "task": "classification",
    "name": "few",
    "backbone": {"name": "nano/vit"},
    "adapter": ADAPTER,
    "data": {"source": "builtin/scenes", "options": FEW, "columns": {"label": "count"}},
    "trainer": {
        **{"max_steps": 1, "batch_size": 8, "log_every": 1},
        **{"tensorboard": False, "workers": 0, "cache_trunk": "off"},
    },
    "evaluation": {"bootstrap": 2, "pictures": 0},
}
SHORT = {"trainer": {"batch_size": 8}, "evaluation": {"bootstrap": 0, "pictures": 0}}


def several(**last: Any) -> list[dict[str, Any]]:
    """Two jobs; the second has these changes."""
    return [
        {"config": "few.yaml", "overrides": {"name": name, **SHORT, **changes}}
        for name, changes in (("one", {}), ("two", last))
    ]


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "300"})


def told(result: Result) -> str:
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config and its finished run in `runs/few`."""
    folder = tmp_path_factory.mktemp("rehearsal")
    (folder / "few.yaml").write_text(yaml.safe_dump(CONFIG))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = call("train", "few.yaml", "--quiet")
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(autouse=True)
def _there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


@pytest.fixture
def nothing_trained(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The test fails if a training begins."""

    def begun(*args: Any, **kwargs: Any) -> None:
        pytest.fail("the training began")

    monkeypatch.setattr(EncoderTrainer, "fit", begun)
    yield
    left = [path.name for path in Path("runs").rglob("*") if path.name.startswith(".rehearsal")]
    assert not left


MISTAKES = [
    ("evaluation.adapter_drop", 99, "evaluation.adapter_drop is 99"),
    ("evaluation.groups", ["nope"], "evaluation.groups: the validation and test rows have no"),
]


@pytest.mark.usefixtures("nothing_trained")
@pytest.mark.parametrize(("key", "value", "message"), MISTAKES)
def test_a_late_mistake_ends_a_run_before_its_first_step(
    key: str, value: Any, message: str
) -> None:
    result = call("train", "few.yaml", f"output=runs/{key}", f"{key}={json.dumps(value)}")
    assert result.exit_code == 1
    assert message in told(result)
    assert not [path for path in Path(f"runs/{key}").iterdir() if path.name != "config.yaml"]


@pytest.mark.usefixtures("nothing_trained")
@pytest.mark.parametrize("command", ["continual", "multitask"])
def test_a_late_mistake_of_the_last_job_ends_a_run_before_its_first_step(command: str) -> None:
    key, value, message = MISTAKES[0]
    listed = {"continual": "jobs", "multitask": "tasks"}[command]
    config = {"name": f"late-{command}", listed: several(**{key: value})}
    Path("late.yaml").write_text(yaml.safe_dump(config))
    result = call(command, "late.yaml", "--quiet")
    assert result.exit_code == 1
    assert message in told(result)


@pytest.mark.usefixtures("nothing_trained")
def test_a_late_mistake_of_the_contrast_ends_a_run_before_its_first_step() -> None:
    overrides = {"evaluation.adapter_drop": 99}
    config = {"name": "late-full", "jobs": several(), "contrast_overrides": overrides}
    Path("late.yaml").write_text(yaml.safe_dump(config))
    result = call("continual", "late.yaml", "--quiet")
    assert result.exit_code == 1
    assert MISTAKES[0][2] in told(result)


def states() -> tuple[Any, ...]:
    """Returns the global random states of Python, NumPy and torch."""
    return (
        random.getstate(),
        [*map(repr, np.random.get_state(legacy=False)["state"].items())],
        torch.get_rng_state().tolist(),
    )


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["trainer.mode=full", "evaluation.deciding=loss"],
        ["trainer.adapter_drop=[0, 4]", "evaluation.groups=[caption]", "data.limit.test=1"],
    ],
)
def test_the_dry_pass_changes_nothing(changes: list[str], tmp_path: Path) -> None:
    config = read_config("few.yaml", changes)
    splits = load_splits(config.data, task_class(config.task)(config).columns, SPLITS)
    task, model = make_model(config, rows_to_fit(splits["train"]))
    model.train()
    run = Run(tmp_path / "run", task, model, facts=sizes(model, config.name))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    state, random_states = json.dumps(task.state, sort_keys=True), states()
    rehearse(run, splits)
    assert states() == random_states
    assert json.dumps(task.state, sort_keys=True) == state
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    assert not run.scores
    assert not (tmp_path / "run").exists()


SMALL = {
    "segment_scenes": ["data.options={train: 4, validation: 2, test: 3}"],
    "caption_scenes": ["data.options={train: 8, validation: 2, test: 3}"],
    "retrieve_scenes": ["data.options={train: 8, validation: 4, test: 4}"],
    "vqa_easy": ["data.limit={train: 8, validation: 4, test: 4}"],
    "asr_accent": ["data.options={accents: [en-us], train: 2, validation: 2, test: 2}"],
}
NEEDED = {"vqa_easy": "easy_vqa", "asr_accent": "espeakng_loader"}


@pytest.mark.parametrize("name", SMALL)
def test_every_task_has_its_dry_pass(name: str, tmp_path: Path) -> None:
    if name in NEEDED:
        pytest.importorskip(NEEDED[name])
    config = read_config(name, [*SMALL[name], "evaluation.bootstrap=2", "evaluation.pictures=1"])
    splits = load_splits(config.data, task_class(config.task)(config).columns, SPLITS)
    task, model = make_model(config, rows_to_fit(splits["train"]))
    run = Run(tmp_path / "run", task, model, facts=sizes(model, config.name))
    random_states = states()
    rehearse(run, splits)
    assert states() == random_states
    assert not run.scores
    assert not (tmp_path / "run").exists()


def test_a_training_with_a_dry_pass_gives_the_bits_of_one_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(runs, "rehearse", lambda run, splits: None)
        runs.train(read_config("few.yaml", [f"output={tmp_path / 'run'}"]), quiet=True)
    one, two = (load_file(path / "adapter/adapter.safetensors") for path in (tmp_path / "run", RUN))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    figures = [json.loads((path / "metrics.json").read_text()) for path in (tmp_path / "run", RUN)]
    assert figures[0]["splits"] == figures[1]["splits"]
    assert [entry.get("loss") for entry in figures[0]["log"]] == [
        entry.get("loss") for entry in figures[1]["log"]
    ]


RUN = Path("runs/few")


def text_of(report: Path) -> str:
    """The page without its date."""
    return "\n".join(line for line in report.read_text().splitlines() if "<time" not in line)


def test_a_report_that_fails_loses_nothing_and_is_made_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write = ending.write_run_report

    def failing(path: Path, *args: Any, **kwargs: Any) -> None:
        if path.parent.name == "again":
            raise KeyError("a mistake in a picture")
        write(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ending, "write_run_report", failing)
        result = call("train", "few.yaml", "output=runs/again", "--quiet")
    assert result.exit_code == 1
    assert "the report could not be made ('a mistake in a picture')" in told(result)
    assert "`mmadapters report runs/again` makes it again" in told(result)
    again = Path("runs/again")
    assert {path.name for path in again.iterdir()} == {"config.yaml", "metrics.json", "adapter"}
    assert call("train", "few.yaml", "output=runs/again", "--resume").exit_code == 0
    result = call("report", "runs/again")
    assert result.exit_code == 0, result.output
    page = (again / "report.html").read_text()
    assert "training loss" in page
    assert "8 train" in page


def test_the_report_that_is_made_again_is_the_first_one(tmp_path: Path) -> None:
    before = (RUN / "report.html").read_text()
    metrics = (RUN / "metrics.json").read_bytes()
    assert call("report", "runs/few").exit_code == 0
    after = (RUN / "report.html").read_text()
    differing = [
        (one, two)
        for one, two in zip(before.splitlines(), after.splitlines(), strict=True)
        if one != two
    ]
    assert all("UTC" in one or "20" in one for one, _ in differing), differing
    assert len(differing) <= 1
    assert (RUN / "metrics.json").read_bytes() == metrics
    assert "Confusion matrix" not in after
    assert call("report", "runs/few", "evaluation.pictures=1").exit_code == 0
    assert "Confusion matrix" in (RUN / "report.html").read_text()
    result = call("report", str(tmp_path))
    assert result.exit_code == 1
    assert "no directory of a finished run" in told(result)


@pytest.mark.parametrize("command", ["continual", "multitask"])
def test_the_pages_of_several_jobs_are_made_again(command: str) -> None:
    listed = {"continual": "jobs", "multitask": "tasks"}[command]
    config: dict[str, Any] = {"name": command, listed: several()}
    if command == "multitask":
        config |= {"adapter": ADAPTER, "trainer": CONFIG["trainer"] | {"max_steps": 2}}
    else:
        config |= {"contrast": "none", "routing": False}
    Path("several.yaml").write_text(yaml.safe_dump(config))
    result = call(command, "several.yaml", "--quiet")
    assert result.exit_code == 0, result.output
    run = Path("runs") / command
    before = (run / "report.html").read_text().splitlines()
    (run / "report.html").unlink()
    (run / "two/report.html").unlink()
    result = call("report", str(run))
    assert result.exit_code == 0, result.output
    assert (run / "two/report.html").is_file()
    after = (run / "report.html").read_text().splitlines()
    assert sum(one != two for one, two in zip(before, after, strict=True)) <= 1


def test_names_of_classes_are_no_formulas_and_variables_stay_out_of_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKEN", "xyzzy-9f1c")
    monkeypatch.setenv("MATHS", str(tmp_path))
    names = ["$\\frac$", "$x_$", "\\$_{"]
    rows = [{"file_name": f"{number}.png", "label": names[number % 3]} for number in range(6)]
    for split in SPLITS:
        (tmp_path / split).mkdir()
        for number, row in enumerate(rows):
            Image.new("RGB", (32, 32), (40 * number, 0, 0)).save(
                tmp_path / split / row["file_name"]
            )
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / split / "metadata.jsonl").write_text(lines)
    (tmp_path / "test/bad.png").write_bytes(b"no picture")
    with open(tmp_path / "test/metadata.jsonl", "a") as file:
        file.write(json.dumps({"file_name": "gone.png", "label": names[0]}) + "\n")
    evaluation = {"bootstrap": 0, "pictures": 2, "groups": ["label"]}
    trainer = CONFIG["trainer"] | {"cache_folder": "${oc.env:TOKEN}"}
    changes = {"data": {"source": "${oc.env:MATHS}"}, "evaluation": evaluation, "trainer": trainer}
    Path("maths.yaml").write_text(yaml.safe_dump(CONFIG | {"name": "maths"} | changes))
    result = call("train", "maths.yaml", "--quiet")
    assert result.exit_code == 0, result.output
    run = Path("runs/maths")
    assert "Confusion matrix" in (run / "report.html").read_text()
    assert json.loads((run / "metrics.json").read_text())["bad_rows"]["test"]
    for path in run.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert b"xyzzy-9f1c" not in data, path
            assert str(tmp_path).encode() not in data, path
    assert "${oc.env:TOKEN}" in (run / "config.yaml").read_text()
    result = call("report", "runs/maths")
    assert result.exit_code == 0, result.output
    monkeypatch.delenv("MATHS")
    result = call("report", "runs/maths")
    assert result.exit_code == 1
    assert "the saved config says ${oc.env:MATHS}" in told(result)
    picture = str(tmp_path / "test/0.png")
    result = call("predict", "runs/maths", picture)
    assert result.exit_code == 0, result.output


def test_predictions_are_written_as_they_come(tmp_path: Path) -> None:
    config = read_config("few.yaml", ["trainer.eval_batch_size=1"])
    rows = load_splits(config.data, task_class(config.task)(config).columns, ("train",))["train"]
    task, model = make_model(config, rows)
    for name in ("1", "3", "4"):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{name}.png")
    (tmp_path / "2.png").write_bytes(b"no picture")
    inputs = [str(tmp_path / "gone"), *(str(tmp_path / f"{name}.png") for name in range(1, 5))]
    results = predict(Opened(task, model, {}), inputs, out=tmp_path / "out")

    def lines() -> list[dict[str, Any]]:
        text = (tmp_path / "out/predictions.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    first = next(results)
    assert [line["input"] for line in lines()] == inputs[:2]
    assert lines()[1] == first
    next(results)
    assert [line["input"] for line in lines()] == inputs[:4]
    with pytest.raises(BadInputs, match="2 inputs cannot be used"):
        list(results)
    assert [line["input"] for line in lines()] == inputs
    assert ["error" in line for line in lines()] == [True, False, True, False, False]
