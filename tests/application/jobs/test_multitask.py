"""Tasks learned together: what each gets of the others, and what comes out."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
import yaml
from application.training import joint_tints
from application.training.joint_tints import ROWS, STEADY, digest, joint, pictures, tasks, trainer
from PIL import Image
from torch import Tensor
from transformers import TrainerCallback
from typer.testing import CliRunner, Result

import mmadapters
from mmadapters.adapters.storage import read
from mmadapters.model.sharing import HALVES, half_parameters
from mmadapters.tasks.artifact import make_backbone, open_directory
from mmadapters.tasks.cli.app import app
from mmadapters.tasks.config.file import config_names
from mmadapters.tasks.core.metrics import Metric
from mmadapters.tasks.data.batches import EpochBatches, MixedBatches
from mmadapters.tasks.data.load import load_splits
from mmadapters.tasks.jobs.multitask.config import read_multitask, read_tasks
from mmadapters.tasks.jobs.multitask.results import history_of, mean_of
from mmadapters.tasks.jobs.run import evaluate_split
from mmadapters.tasks.training.checkpoint import last_checkpoint
from mmadapters.tasks.training.trainer import TaskTrainer

FEW = {"train": 32, "validation": 8, "test": 16}
JOBS: list[dict[str, Any]] = [
    {
        "config": "classify_scenes",
        "overrides": {
            "name": "count",
            "data.options": FEW,
            "evaluation": {"bootstrap": 20, "pictures": 0, "before": True},
            "trainer.batch_size": 16,
        },
    },
    {
        "config": "segment_scenes",
        "overrides": {
            "name": "shapes",
            "head": {"kind": "linear", "layers": [7]},
            "data": {"options": FEW},
            "evaluation": {"bootstrap": 0, "pictures": 2},
            "trainer": {"batch_size": 8},
        },
    },
]
CONFIG: dict[str, Any] = {
    "name": "two",
    "tasks": JOBS,
    "sharing": "half_down",
    "adapter": {"method": "double_seq_bn", "size": 4, "sites": ["vision.blocks.[67].*"]},
    "trainer": {"epochs": 2, "log_every": 1, "tensorboard": False},
}


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config, its finished run in `runs/two` and what the command printed."""
    folder = tmp_path_factory.mktemp("multitask")
    (folder / "two.yaml").write_text(yaml.safe_dump(CONFIG))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = call("multitask", "two.yaml", "--quiet")
    assert result.exit_code == 0, result.output
    (folder / "printed.txt").write_text(result.output)
    return folder


@pytest.fixture
def _there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


in_folder = pytest.mark.usefixtures("_there")


@pytest.fixture(scope="module")
def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "runs/two/metrics.json").read_text())


@in_folder
def test_the_run_directory_holds_a_run_for_each_task_and_the_report() -> None:
    run = Path("runs/two")
    files = {"config.yaml", "metrics.json", "report.html"}
    assert {path.name for path in run.iterdir()} == files | {"count", "shapes"}
    for name in ("count", "shapes"):
        assert {path.name for path in (run / name).iterdir()} == files | {"adapter"}
    page = (run / "report.html").read_text()
    addresses = re.findall(r'(?:src|href)="([^"#]+)"', page)
    assert addresses
    assert all(a.startswith("data:image/png") or (run / a).is_file() for a in addresses)
    assert page.count("training loss") >= 3
    assert "their down-projections shared" in page
    assert "<script" not in page


@in_folder
def test_the_figures_are_those_of_the_tasks_own_runs(metrics: dict[str, Any]) -> None:
    assert metrics["sharing"] == "half_down"
    # Of 32 rows a task has two batches of 16, or four of 8, in each of two epochs.
    steps = {name: own["steps"] for name, own in metrics["tasks"].items()}
    assert steps == {"count": 4, "shapes": 8}
    assert metrics["steps"] == 12
    deciding = []
    for name, own in metrics["tasks"].items():
        alone = json.loads(Path(f"runs/two/{name}/metrics.json").read_text())
        assert own["splits"] == alone["splits"]
        assert alone["steps"] == own["steps"]
        assert (alone["before"] is not None) is (name == "count")
        deciding.append(own["splits"]["test"]["metrics"][own["metric"]]["value"])
    assert metrics["mean"] == pytest.approx(sum(deciding) / 2)
    assert "low" in metrics["tasks"]["count"]["splits"]["test"]["metrics"]["accuracy"]
    alone, shared = metrics["adapter_parameters_unshared"], metrics["adapter_parameters"]
    each = metrics["tasks"]["count"]["adapter_parameters"]
    assert alone == 2 * each
    assert each < shared < alone
    assert metrics["trained_share"] == pytest.approx(shared / metrics["encoder_parameters"])


@in_folder
@pytest.mark.parametrize("name", ["count", "shapes"])
def test_a_saved_adapter_gives_what_it_gave_in_the_run(metrics: dict[str, Any], name: str) -> None:
    opened = open_directory(f"runs/two/{name}")
    assert opened.model.encoder.adapter_names == (name,)
    rows = load_splits(opened.task.config.data, opened.task.columns)["test"]
    found = evaluate_split(opened.task, opened.model, rows)
    scores = opened.task.score(found.records, bootstrap=0)
    known = metrics["tasks"][name]["splits"]["test"]["metrics"]
    assert {m.name: m.value for m in scores.metrics} == {k: v["value"] for k, v in known.items()}


@in_folder
def test_the_adapters_have_their_half_in_common_and_share_it_again_when_loaded() -> None:
    tensors = {name: read(f"runs/two/{name}/adapter").tensors for name in ("count", "shapes")}
    for key, tensor in tensors["count"].items():
        assert torch.equal(tensor, tensors["shapes"][key]) is ("/down." in key), key
    encoder = mmadapters.init(make_backbone(open_directory("runs/two/count").task.config.backbone))
    for name in tensors:
        encoder.load_adapter(f"runs/two/{name}/adapter")
    encoder.share_adapters(["count", "shapes"], "half_down")
    one, other = (set(encoder.adapter(name).parameters()) for name in tensors)
    assert len(one & other) == sum("/down." in key for key in tensors["count"])


@in_folder
def test_the_command_prints_every_task_and_predict_takes_them() -> None:
    printed = Path("printed.txt").read_text()
    for words in ("count", "accuracy", "shapes", "mIoU", "mean", "12 steps", "shared ones once"):
        assert words in printed
    assert "Report: runs/two/report.html" in printed
    Image.new("RGB", (64, 64), "white").save("white.png")
    result = call("predict", "runs/two/count", "white.png")
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["input"] == "white.png"


@in_folder
def test_a_run_is_neither_overwritten_unasked_nor_resumed_with_another_config() -> None:
    assert "--overwrite" in call("multitask", "two.yaml", "--quiet").output
    result = call("multitask", "two.yaml", "sharing=single", "--resume", "--quiet")
    assert result.exit_code == 1
    assert "begun with another config (sharing" in " ".join(result.output.split())


def tensors_of(model: Any, name: str) -> dict[str, Tensor]:
    """A task's adapter and head."""
    found = {k: t.detach() for k, t in model.encoder.adapter(name).tensors().items()}
    return found | {k: t.detach() for k, t in model.models[name].head.state_dict().items()}


def test_tasks_that_share_nothing_are_trained_to_the_bits_of_each_alone(tmp_path: Path) -> None:
    made = tasks(max_steps=12, evaluate_every=100, **STEADY)
    model = joint(made, "multiple")
    fresh = copy.deepcopy(model)
    trainer(tmp_path / "joint", made, model, sampling="uniform").train()
    # An epoch of 6 + 2 steps is 4 of each; 12 steps are one epoch and a half.
    for name, steps in zip(ROWS, mixed("uniform").steps_of_tasks(12), strict=True):
        alone = copy.deepcopy(fresh)
        alone.encoder.train_adapter(name)
        train, validation = pictures(name)
        one = tasks(max_steps=steps, evaluate_every=100, **STEADY)[name]
        TaskTrainer(
            one,
            alone.models[name],
            train=train,
            validation=validation,
            folder=tmp_path / name,
            quiet=True,
        ).train()
        expected = tensors_of(alone, name)
        for key, tensor in tensors_of(model, name).items():
            assert torch.equal(tensor, expected[key]), key
        assert not torch.equal(tensor, tensors_of(fresh, name)[key])


@pytest.mark.parametrize("sharing", ["single", *HALVES])
def test_what_is_shared_stays_one_and_the_rest_parts(sharing: Any, tmp_path: Path) -> None:
    made = tasks(max_steps=8, **STEADY)
    model = joint(made, sharing)
    trainer(tmp_path, made, model).train()
    one, other = (model.encoder.adapter(name) for name in ROWS)
    if sharing == "single":
        ours = set(one.parameters())
    else:
        ours = set(half_parameters(one, sharing).values())
    assert set(one.parameters()) & set(other.parameters()) == ours
    for key, tensor in one.tensors().items():
        assert torch.equal(tensor, other.tensors()[key]) is (tensor in ours) or sharing == "single"


def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 10

    made = tasks(max_steps=13, evaluate_every=5, **STEADY)
    whole = joint(made, "half_up")
    expected = trainer(tmp_path / "whole", made, whole)
    expected.train()
    first = trainer(tmp_path / "cut", made, joint(made, "half_up"))
    first.add_callback(Stop())
    first.train()
    checkpoint = last_checkpoint(tmp_path / "cut")
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-10"
    model = joint(made, "half_up")
    again = trainer(tmp_path / "cut", made, model)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert digest(model) == digest(whole)
    assert again.state.best_global_step == expected.state.best_global_step


def test_the_best_mean_of_the_validation_metrics_is_kept(tmp_path: Path) -> None:
    made = tasks(max_steps=16, evaluate_every=2, **{**STEADY, "learning_rate": 0.1})
    model = joint(made, "single")
    training = trainer(tmp_path, made, model)
    training.train()
    logs = {log["step"]: log for log in training.state.log_history if "eval_mean" in log}
    for log in logs.values():
        both = [log[f"eval_{name}/accuracy"] for name in ROWS]
        assert log["eval_mean"] == pytest.approx(sum(both) / 2)
    best = max(log["eval_mean"] for log in logs.values())
    kept = training.state.best_global_step
    assert kept == max(step for step, log in logs.items() if log["eval_mean"] == best)
    training.load_best()
    assert training.validate()["mean"] == best


def test_each_task_has_a_learning_curve_of_its_own(tmp_path: Path) -> None:
    made = tasks(max_steps=8, evaluate_every=4, **STEADY)
    training = trainer(tmp_path, made, joint(made, "half_down"))
    training.train()
    steps = training.mixed.steps_of_tasks(8)
    for name, own in zip(ROWS, steps, strict=True):
        history = history_of(training.state.log_history, name)
        assert sum("loss" in entry for entry in history) == own
        assert [e["step"] for e in history if "eval_accuracy" in e] == [4, 8]


def test_bad_rows_are_counted_for_their_own_task(tmp_path: Path) -> None:
    made = tasks(max_steps=8, **STEADY)
    training = trainer(tmp_path, made, joint(made, "half_down"), broken=(3, 9))
    training.train()
    found = {name: sorted(bad) for name, bad in training.bad.items()}
    assert found == {"first": [], "second": [3, 9]}


def test_a_task_that_would_have_no_turn_is_refused(tmp_path: Path) -> None:
    made = tasks(max_steps=1, **STEADY)
    with pytest.raises(ValueError, match=r"(first|second) gets none of the 1 steps"):
        trainer(tmp_path, made, joint(made, "half_down"))


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    program = Path(joint_tints.__file__)
    settings = {"max_steps": 6, "evaluate_every": 3, **STEADY}
    found = []
    for processes in (1, 2):
        own = tmp_path / str(processes)
        own.mkdir()
        done = forked.run(program, str(own), json.dumps(settings), processes=processes)
        assert done.returncode == 0, done.stderr
        found.append(json.loads((own / "figures.json").read_text()))
    one, two = found
    assert two["mean"] == pytest.approx(one["mean"])
    for key, values in one["weights"].items():
        assert two["weights"][key] == pytest.approx(values, abs=1e-4), key


def mixed(
    sampling: Any, *, accumulation: int = 1, sizes: tuple[int, ...] = (48, 16)
) -> MixedBatches:
    temperature = {"uniform": float("inf"), "proportional": 1.0}.get(sampling, sampling)
    parts = [EpochBatches(rows, 8, seed=0, accumulation=accumulation) for rows in sizes]
    return MixedBatches(parts, seed=0, temperature=temperature)


def test_proportional_sampling_gives_every_row_one_turn_in_an_epoch() -> None:
    rows = sorted((number, row) for batch in mixed("proportional") for number, row, _ in batch)
    assert rows == [(0, row) for row in range(48)] + [(1, row) for row in range(16)]


@pytest.mark.parametrize(
    ("sampling", "counts"), [("proportional", [6, 2]), ("uniform", [4, 4]), (2.0, [5, 3])]
)
def test_sampling_says_how_often_a_task_has_its_turn(sampling: Any, counts: list[int]) -> None:
    batches = mixed(sampling)
    assert batches.counts.tolist() == counts
    assert batches.steps_of_tasks(8) == counts
    assert batches.steps_of_tasks(16) == [2 * count for count in counts]


def test_a_small_task_has_its_turn_in_every_epoch() -> None:
    assert mixed("proportional", sizes=(8000, 8)).counts.tolist() == [1000, 1]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_each_task_goes_through_its_own_epochs_as_it_would_alone(accumulation: int) -> None:
    batches = mixed("uniform", accumulation=accumulation)
    seen: dict[int, list[Any]] = {0: [], 1: []}
    for epoch in range(3):
        batches.set_epoch(epoch)
        parts = list(batches)
        for start in range(0, len(parts), accumulation):
            assert (
                len({key[0] for part in parts[start : start + accumulation] for key in part}) == 1
            )
        for part in parts:
            seen[part[0][0]].append([key[1:] for key in part])
    for number, rows in enumerate((48, 16)):
        own, alone = EpochBatches(rows, 8, seed=0, accumulation=accumulation), []
        for epoch in range(6):
            own.set_epoch(epoch)
            alone += list(own)
        assert seen[number] == alone[: len(seen[number])]


def test_the_mean_counts_less_is_better_as_negative() -> None:
    rate = Metric("WER", 0.25, greater_is_better=False)
    assert mean_of([Metric("accuracy", 0.75), rate]) == pytest.approx(0.25)


def write(**changes: Any) -> str:
    Path("wrong.yaml").write_text(yaml.safe_dump(CONFIG | {"output": "runs/wrong"} | changes))
    return "wrong.yaml"


def changed(place: int, **overrides: Any) -> list[dict[str, Any]]:
    jobs = copy.deepcopy(JOBS)
    jobs[place]["overrides"] |= overrides
    return jobs


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks": JOBS[:1]}, "tasks: there must be at least two, not 1"),
        ({"sharing": "half_dwn"}, "did you mean 'half_down'?"),
        ({"sampling": 0.5}, "a temperature is at least 1, not 0.5"),
        ({"sampling": "unifrom"}, "did you mean 'uniform'?"),
        (
            {"tasks": changed(1, **{"backbone.name": "nano/clip"})},
            "tasks.1: shapes is on another encoder than count: name 'nano/clip', not 'nano/vit'",
        ),
        ({"tasks": changed(1, name="count")}, "two are called 'count'"),
        ({"tasks": changed(1, name="checkpoints")}, "tasks.1: 'checkpoints' cannot name a folder"),
        (
            {"tasks": changed(0, **{"trainer.learning_rate": 1})},
            "tasks.0: overrides set trainer.learning_rate, and there is one optimiser",
        ),
        ({"tasks": changed(0, trainer={"epochs": 3})}, "tasks.0: overrides set trainer.epochs"),
        ({"tasks": changed(1, adapter={"method": "lora"})}, "tasks.1: overrides set adapter"),
        ({"tasks": changed(0, composition="count")}, "count has members or a composition"),
        ({"trainer": {"mode": "full"}}, "mode is 'full', and tasks are trained together"),
        ({"trainer": {"adapter_drop": 2}}, "adapter_drop is for one job"),
        (
            {"adapter": {"method": "ia3"}},
            "has no down- and up-projection; use sharing='single' or 'multiple'",
        ),
    ],
)
def test_mistakes_are_told_in_a_sentence(
    changes: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call("multitask", write(**changes), "--quiet")
    assert result.exit_code == 1
    assert words in " ".join(result.output.split())
    assert "Traceback" not in result.output


@in_folder
def test_all_tasks_are_validated_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    few = {"data.options": {**FEW, "validation": 0}}
    result = call("multitask", write(tasks=changed(0, **few)), "--quiet")
    assert result.exit_code == 1
    assert "count has no validation split, and the best checkpoint" in result.output


@in_folder
def test_each_kind_of_config_names_its_command() -> None:
    assert "mmadapters multitask" in call("train", "two.yaml").output
    assert "'tasks'" in call("multitask", "classify_scenes").output


@in_folder
def test_tasks_have_the_joint_trainer_section_and_batch_sizes_of_their_own() -> None:
    count, shapes = read_tasks(read_multitask("two.yaml", ["seed=7", "trainer.epochs=3"]))
    assert (count.trainer.batch_size, shapes.trainer.batch_size) == (16, 8)
    assert count.trainer.epochs == shapes.trainer.epochs == 3
    assert count.trainer.max_steps is None
    assert (count.seed, count.output) == (7, "runs/two/count")
    assert count.adapter == shapes.adapter == CONFIG["adapter"]
    count, shapes = read_tasks(read_multitask("two.yaml", ["trainer.batch_size=4"]))
    assert count.trainer.batch_size == shapes.trainer.batch_size == 4


@pytest.mark.parametrize("name", config_names("multitask"))
def test_every_shipped_config_is_valid_and_listed(name: str) -> None:
    assert len(read_tasks(read_multitask(name))) > 1
    assert name in call("configs").output
