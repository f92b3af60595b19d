"""Methods beside bottlenecks of their size: what is trained, and what an interval holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner, Result

from mmadapters.tasks.cli.app import app
from mmadapters.tasks.config.file import config_names, read_config
from mmadapters.tasks.core.metrics import Metric, interval, summed_metric
from mmadapters.tasks.jobs.comparison.config import make_job, read_comparison, read_contenders
from mmadapters.tasks.jobs.comparison.results import (
    Cost,
    Duel,
    Entrant,
    TrainingScore,
    difference,
    spread,
)
from mmadapters.tasks.jobs.model import make_model

CONFIG: dict[str, Any] = {
    "name": "small",
    "job": "classify_scenes",
    "overrides": {
        "data.options": {"train": 16, "validation": 8, "test": 12, "vocabulary": "unseen"},
        "trainer": {"epochs": 1, "batch_size": 8},
        "evaluation.bootstrap": 100,
        "head.pooling": "mean",
    },
    "methods": {
        "LoRA": {"adapter": {"method": "lora", "rank": 2}},
        "SSF": {"adapter": {"method": "ssf"}},
    },
    "references": {"head only": {"trainer.mode": "head"}},
    "seeds": [0, 1],
    "learning_rates": [1e-3, 1e-2],
    "timed_steps": 2,
}


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config, its finished run in `runs/small` and what the command printed."""
    folder = tmp_path_factory.mktemp("comparison")
    (folder / "small.yaml").write_text(yaml.safe_dump(CONFIG))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = call("compare", "small.yaml", "--quiet")
    assert result.exit_code == 0, result.output
    (folder / "printed.txt").write_text(result.output)
    return folder


@pytest.fixture(autouse=True)
def _there(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "folder" in request.fixturenames:
        monkeypatch.chdir(request.getfixturevalue("folder"))


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "runs/small/comparison.json").read_text())


def test_every_seed_and_rate_is_a_run_and_the_rate_is_the_best_on_validation(folder: Path) -> None:
    found = result(folder)
    entrants = [*found["methods"], *found["references"]]
    entrants += [method["bottleneck"] for method in found["methods"]]
    for entrant in entrants:
        runs = {
            (path.parent.parent.name, path.parent.name): json.loads(path.read_text())["splits"]
            for path in (folder / "runs/small" / entrant["name"]).glob("*/*/metrics.json")
        }
        assert runs.keys() == {
            ("0.001", "0"),
            ("0.01", "0"),
            (f"{entrant['learning_rate']:g}", "1"),
        }
        validation = {
            rate: runs[rate, "0"]["validation"]["metrics"]["accuracy"]["value"]
            for rate in ("0.001", "0.01")
        }
        kept = f"{entrant['learning_rate']:g}"
        assert validation[kept] == max(validation.values())
        tests = [runs[kept, seed]["test"]["metrics"]["accuracy"]["value"] for seed in ("0", "1")]
        assert entrant["by_seed"] == tests
        assert entrant["metric"]["value"] == pytest.approx(np.mean(tests))


def test_bottleneck_trains_as_many_parameters_as_a_whole_size_can(folder: Path) -> None:
    config = read_comparison("small.yaml")
    for method in result(folder)["methods"]:
        name = method["bottleneck"]["name"]
        size = int(name.removeprefix("bottleneck "))
        _, model = make_model(read_contenders(config)[method["name"]], None or _rows(config))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert method["parameters"] == trained
        counts = {}
        for other in (size - 1, size, size + 1):
            if other:
                adapter = {"method": "double_seq_bn", "size": other}
                _, model = make_model(make_job(config, {"adapter": adapter}, "x"), _rows(config))
                counts[other] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert counts[size] == method["bottleneck"]["parameters"]
        assert min(counts, key=lambda other: abs(counts[other] - trained)) == size


def _rows(config: Any) -> Any:
    from mmadapters.tasks.data.load import load_splits
    from mmadapters.tasks.registry import task_class

    job = make_job(config, {}, "rows")
    return load_splits(job.data, task_class(job.task)(job).columns)["train"]


def test_costs_are_of_a_step(folder: Path) -> None:
    found = result(folder)
    head = found["references"][0]["cost"]
    for method in found["methods"]:
        # With adapters in every block all of the encoder's states are kept; a head keeps few.
        assert method["cost"]["kept_bytes"] > 5 * head["kept_bytes"] > 0
        assert method["cost"]["step_seconds"] > head["step_seconds"] > 0
        assert method["cost"]["peak_bytes"] is None


def test_report_table_and_chart_say_who_beats_the_bottleneck(folder: Path) -> None:
    run, found = folder / "runs/small", result(folder)
    text = (run / "comparison.md").read_text("utf-8")
    printed = (folder / "printed.txt").read_text()
    page = (run / "report.html").read_text("utf-8")
    assert (run / "comparison.png").read_bytes().startswith(b"\x89PNG")
    for method in found["methods"]:
        row = next(line for line in text.splitlines() if line.startswith(f"| {method['name']} |"))
        assert row.split(" | ")[-1].strip(" |") == method["verdict"]
        assert f"{method['parameters']:,} / {method['bottleneck']['parameters']:,}" in row
        assert method["name"] in page
    for place in (text, printed, page):
        assert "plain bottleneck of its size" in place
    assert "http" not in page.replace("http-equiv", "")


def test_parts_can_be_trained_apart_and_collected_later(folder: Path) -> None:
    again = ["compare", "small.yaml", "output=runs/parts", "--quiet"]
    assert call(*again, "--only", "lora").exit_code == 1
    for part in ("SSF", "LoRA"):
        done = call(*again, "--only", part, "seeds=[0,1]", "learning_rates=[]")
        assert done.exit_code == 0, done.output
        assert "collect" in done.output
        assert not (folder / "runs/parts/comparison.json").exists()
    there = {path.parts[-4] for path in (folder / "runs/parts").rglob("cell.json")}
    found = result(folder)
    assert there == {
        *(method["name"] for method in found["methods"]),
        *(method["bottleneck"]["name"] for method in found["methods"]),
    }


def stamps(folder: Path) -> dict[Path, int]:
    """When each training of the comparison was written."""
    return {path: path.stat().st_mtime_ns for path in folder.glob("runs/small/*/*/*/cell.json")}


def test_resumed_comparison_trains_nothing_anew(folder: Path) -> None:
    cells = stamps(folder)
    assert len(cells) == 3 * 5
    before = result(folder)
    assert call("compare", "small.yaml", "--quiet").exit_code == 1
    done = call("compare", "small.yaml", "--quiet", "--resume", "--markdown")
    assert done.exit_code == 0, done.output
    assert done.output.rstrip("\n") == (folder / "runs/small/comparison.md").read_text().rstrip(
        "\n"
    )
    assert stamps(folder) == cells
    after = result(folder)
    for one, other in zip(before["methods"], after["methods"], strict=True):
        assert {**one, "cost": 0, "bottleneck": 0} == {**other, "cost": 0, "bottleneck": 0}
    changed = call("compare", "small.yaml", "--quiet", "--resume", "seeds=[0,2]")
    assert changed.exit_code == 1
    assert "begun with another config (seeds)" in changed.output.replace("\n", " ")


def cells(right: np.ndarray, *, better: bool = True) -> list[TrainingScore]:
    """Of (seeds, examples), 1 where an answer is right."""
    found = []
    for row in right:
        statistics = np.column_stack([row, np.ones(len(row))])
        metric = summed_metric(
            "accuracy",
            statistics,
            lambda sums: sums[..., 0] / sums[..., 1],
            resamples=2000,
            greater_is_better=better,
        )
        found.append(TrainingScore(metric, None))
    return found


def test_interval_of_a_difference_is_of_pairs() -> None:
    """Two models that differ in a few of many hard examples: pairs tell, apart they would not."""
    rng = np.random.default_rng(0)
    one = (rng.random((1, 400)) < 0.5).astype(float).repeat(3, axis=0)
    other = one.copy()
    other[:, np.flatnonzero(one[0])[:16]] = 0
    found = difference(cells(one), cells(other))
    assert found.value == pytest.approx(16 / 400)
    # All seeds are alike: what is left is the standard error of a mean of 400 paired differences.
    error = np.std(one[0] - other[0]) / np.sqrt(400)
    assert found.low == pytest.approx(16 / 400 - 1.96 * error, abs=0.003)
    assert found.high == pytest.approx(16 / 400 + 1.96 * error, abs=0.003)
    apart = 1.96 * np.sqrt(np.var(one[0]) / 400 + np.var(other[0]) / 400)
    assert found.low > 0 > 16 / 400 - apart


def test_spread_of_few_seeds_is_students() -> None:
    values = np.array([0.50, 0.52, 0.57])
    low, high = interval(spread(values, np.full(200_000, values.mean())))
    half = 4.3027 * values.std(ddof=1) / np.sqrt(3)  # t of 2 degrees of freedom, 97.5 %
    assert low == pytest.approx(values.mean() - half, rel=0.05)
    assert high == pytest.approx(values.mean() + half, rel=0.05)


@pytest.mark.parametrize("greater", [True, False])
def test_verdict_follows_the_interval_and_the_metrics_direction(greater: bool) -> None:
    rng = np.random.default_rng(0)
    weak = (rng.random((3, 500)) < 0.4).astype(float)
    strong = np.maximum(weak, (rng.random((3, 500)) < 0.5).astype(float))
    cost = Cost(0.1, 1, None)

    def duel(mine: np.ndarray, theirs: np.ndarray) -> Duel:
        sides = [
            Entrant(name, 1, 1e-3, tuple(cells(right, better=greater)))
            for name, right in (("a", mine), ("b", theirs))
        ]
        return Duel(sides[0], sides[1], cost, cost)

    assert duel(strong, weak).verdict == ("better" if greater else "worse")
    assert duel(weak, strong).verdict == ("worse" if greater else "better")
    assert duel(weak, weak).verdict == "no difference"


def test_metric_of_a_run_keeps_its_samples_out_of_files() -> None:
    metric = cells(np.ones((1, 4)))[0].test
    assert metric.samples is not None
    assert "samples" not in metric.to_dict()
    assert metric == Metric(**metric.to_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["seeds=[1]"], "at least two different seeds"),
        (["methods={}"], "methods is empty"),
        (
            ["baseline={method: seq_bn, size: 4}"],
            "the bottleneck's size follows from each method's",
        ),
        (["learning_rates=[0.1,-1]"], "give different numbers above 0"),
        (["methods={a/b: {}}"], "cannot name a folder"),
        (["references={LoRA: {trainer.mode: head}}"], "'LoRA' is both a method and a reference"),
        (["methods={x: {trainer.epochs: 9}}"], "methods.x changes trainer.epochs, and all are"),
        (["methods={x: {data.options.train: 9}}"], "methods.x changes data, and all are compared"),
        (["methods={x: {adaptor: {}}}"], "did you mean 'adapter'"),
        (["methods={x: {adapter: {method: loar}}}"], "did you mean 'lora'"),
    ],
)
def test_bad_configs_say_what_to_change(
    changes: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text(yaml.safe_dump(CONFIG))
    done = call("compare", "bad.yaml", *changes)
    assert done.exit_code == 1
    assert message in " ".join(done.output.split())
    assert "Traceback" not in done.output
    assert not Path("runs").exists()


def test_shipped_comparisons_read_and_train_takes_none_of_them() -> None:
    names = config_names("comparison")
    shipped = {"compare_vision", "compare_speech", "compare_vision_language", "compare_retrieval"}
    assert shipped <= names.keys()
    for name in names:
        assert read_contenders(read_comparison(name))
        with pytest.raises(ValueError, match="give it to mmadapters compare"):
            read_config(name)


def test_an_override_of_an_option_leaves_the_others(folder: Path) -> None:
    changes = ["overrides.data.options.test=8", "overrides.trainer.batch_size=4"]
    job = make_job(read_comparison("small.yaml", changes), {}, "any")
    assert job.data.options == CONFIG["overrides"]["data.options"] | {"test": 8}
    assert (job.trainer.epochs, job.trainer.batch_size) == (1, 4)
    shipped = make_job(read_comparison("compare_captioning", changes[:1]), {}, "any")
    own = read_config("caption_scenes").data.options
    assert shipped.data.options == own | {"test": 8} != own
