"""Jobs learned in turn: nothing is forgotten with adapters, to the bit; all is measured."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner, Result

from mmadapters.tasks.artifact import open_directory
from mmadapters.tasks.cli.app import app
from mmadapters.tasks.config.file import config_names, read_config
from mmadapters.tasks.core.metrics import Metric
from mmadapters.tasks.core.plots import heat_maps
from mmadapters.tasks.data.load import load_splits
from mmadapters.tasks.jobs.continual import router as routing
from mmadapters.tasks.jobs.continual.config import contrast_jobs, read_continual, read_jobs
from mmadapters.tasks.jobs.continual.report import points
from mmadapters.tasks.jobs.continual.results import LearningSequence, ScoreCell
from mmadapters.tasks.jobs.continual.run import fingerprint, measure
from mmadapters.tasks.registry import task_class

FEW = {"train": 32, "validation": 8, "test": 16}
SHORT = {
    "adapter": {"method": "double_seq_bn", "size": 4, "sites": ["vision.blocks.[67].*"]},
    "trainer": {"epochs": 1, "batch_size": 16, "tensorboard": False},
    "evaluation": {"bootstrap": 0, "pictures": 0},
}
OLD = {"vocabulary": "pretraining", "size": 16}  # coarse pictures of other things
JOBS: list[dict[str, Any]] = [
    {"config": "classify_scenes", "overrides": {"name": "count", "data.options": FEW, **SHORT}},
    {
        "config": "segment_scenes",
        "overrides": {
            "name": "shapes",
            # The head reads one block, in which the adapters of other jobs need not sit.
            "head": {"kind": "linear", "layers": [5]},
            "data": {"options": FEW},
            **SHORT,
            "adapter": {"method": "lora", "rank": 2, "sites": ["vision.blocks.[45].*"]},
            # Drawn after its step, with a head that has running statistics.
            "evaluation": {"bootstrap": 0, "pictures": 2},
        },
    },
    {
        "config": "classify_scenes",
        "overrides": {"name": "coarse", "data.options": FEW | OLD, **SHORT},
    },
]
NAMES = ["count", "shapes", "coarse"]
CONFIG: dict[str, Any] = {
    "name": "three",
    "output": "runs/${name}",
    "jobs": JOBS,
    "contrast_overrides": {"trainer": {"learning_rate": 1e-3}},
}


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config, its finished run in `runs/three` and what the command printed."""
    folder = tmp_path_factory.mktemp("continual")
    (folder / "three.yaml").write_text(yaml.safe_dump(CONFIG))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = call("continual", "three.yaml", "--quiet")
    assert result.exit_code == 0, result.output
    (folder / "printed.txt").write_text(result.output)
    return folder


@pytest.fixture(autouse=True)
def _there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


@pytest.fixture(scope="module")
def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "runs/three/metrics.json").read_text())


def again(directory: str) -> str:
    """The hash of what a saved run gives on its test split, on an encoder loaded anew."""
    opened = open_directory(directory)
    rows = load_splits(opened.task.config.data, opened.task.columns)["test"]
    return measure(opened.task, opened.model, rows)[0].outputs


@pytest.mark.parametrize("way", ["adapters", "full"])
def test_the_matrix_has_every_job_after_every_step_from_its_own_on(
    metrics: dict[str, Any], way: str
) -> None:
    matrix = metrics[way]["matrix"]
    assert [[value is not None for value in row] for row in matrix] == [
        *([True, False, False], [True, True, False], [True, True, True])
    ]
    folder = Path("runs/three") / ("full" if way == "full" else "")
    for place, (name, metric) in enumerate(
        zip(NAMES, ("accuracy", "mIoU", "accuracy"), strict=True)
    ):
        own = json.loads((folder / name / "metrics.json").read_text())
        assert own["mode"] == ("full" if way == "full" else "adapter")
        assert matrix[place][place] == own["splits"]["test"]["metrics"][metric]["value"]


def test_with_adapters_forgetting_is_exactly_zero_and_every_output_keeps_its_bits(
    metrics: dict[str, Any],
) -> None:
    kept = metrics["adapters"]
    assert kept["forgetting"] == {"count": 0.0, "shapes": 0.0}
    assert kept["backward_transfer"] == 0.0
    assert kept["outputs_unchanged"] == {"count": True, "shapes": True}
    assert kept["encoder_unchanged"] is True


@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_adapter_saved_after_its_step_gives_the_bits_of_the_one_in_memory_at_the_end(
    metrics: dict[str, Any], place: int
) -> None:
    assert again(f"runs/three/{NAMES[place]}") == metrics["adapters"]["outputs"][2][place]


def test_full_fine_tuning_changes_what_earlier_jobs_give(metrics: dict[str, Any]) -> None:
    full = metrics["full"]
    assert full["outputs_unchanged"] == {"count": False, "shapes": False}
    assert full["encoder_unchanged"] is False
    assert full["matrix"] != metrics["adapters"]["matrix"]
    assert again("runs/three/full/count") == full["outputs"][0][0]


def test_each_job_trains_its_own_adapter_alone() -> None:
    sizes = [json.loads(Path(f"runs/three/{name}/metrics.json").read_text()) for name in NAMES]
    assert sizes[0]["adapter_parameters"] == sizes[2]["adapter_parameters"]
    for own in sizes:
        share = own["adapter_parameters"] / own["encoder_parameters"]
        assert own["trained_share"] == pytest.approx(share)


def test_pictures_find_their_jobs_more_often_than_by_chance(metrics: dict[str, Any]) -> None:
    found = metrics["routing"]
    assert found["jobs"] == NAMES
    for row in found["shares"]:
        assert sum(row) == pytest.approx(1)
    # The first two jobs have the same pictures, the third has others.
    assert found["accuracy"]["coarse"] > 0.6
    assert found["shares"][0][2] < 0.4
    assert found["told"] == metrics["adapters"]["matrix"][-1]
    pairs = zip(found["routed"], found["told"], strict=True)
    assert all(0 <= routed <= told for routed, told in pairs)
    assert found["means"][1] == 1
    assert found["means"][0] > 1


def test_the_nearest_mean_decides() -> None:
    means = torch.nn.functional.normalize(torch.tensor([[1.0, 0], [0, 1], [-1, 1]]), dim=1)
    router = routing.Router(means, torch.tensor([0, 1, 0]))
    features = torch.nn.functional.normalize(torch.tensor([[1.0, 0.2], [0.1, 1], [-1, 0.9]]), dim=1)
    assert router(features).tolist() == [0, 1, 0]


def test_pictures_with_questions_are_not_routed() -> None:
    tasks = [
        task_class(job.task)(job)
        for job in (read_config("classify_scenes"), read_config("retrieve_scenes"))
    ]
    assert routing.obstacle(tasks[:1]) is None
    assert "retrieve_scenes reads image, text" in str(routing.obstacle(tasks))


def chain(rows: list[list[float | None]], **options: Any) -> LearningSequence:
    cells = [
        [None if v is None else ScoreCell(Metric("score", v, **options), str(v)) for v in row]
        for row in rows
    ]
    return LearningSequence(["a", "b", "c"], cells)


def test_forgetting_and_transfer_are_those_of_the_papers() -> None:
    found = chain([[0.8, None, None], [0.9, 0.6, None], [0.5, 0.7, 0.4]])
    assert found.forgetting == pytest.approx({"a": 0.9 - 0.5, "b": 0.6 - 0.7})
    assert found.backward_transfer == pytest.approx(((0.5 - 0.8) + (0.7 - 0.6)) / 2)
    assert found.average == pytest.approx((0.5 + 0.7 + 0.4) / 3)
    assert found.unchanged == {"a": False, "b": False}
    assert math.isnan(found.matrix[0][1])


def test_where_smaller_is_better_a_rise_is_forgetting() -> None:
    rows = [[0.2, None, None], [0.1, 0.3, None], [0.4, 0.3, 0.5]]
    found = chain(rows, greater_is_better=False)
    assert found.forgetting == pytest.approx({"a": 0.4 - 0.1, "b": 0.0})
    assert found.backward_transfer == pytest.approx(-0.1)
    assert found.unchanged == {"a": False, "b": True}


def test_metrics_that_point_both_ways_have_no_average() -> None:
    found = chain([[0.5, None], [0.5, 0.5]])
    found.cells[1][1] = ScoreCell(Metric("WER", 0.5, greater_is_better=False), "")
    found.jobs = ["a", "b"]
    assert found.average is None


def test_the_hash_sees_the_last_bit_wherever_it_lies() -> None:
    tensor = torch.randn(3, 4)
    record = {"row": {"x": 1}, "logits": [tensor, tensor.numpy()], "text": "a"}
    nudged: dict[str, Any] = copy.deepcopy(record)
    assert fingerprint(nudged) == fingerprint(record)
    value = nudged["logits"][1][2, 3]
    nudged["logits"][1][2, 3] = torch.nextafter(torch.tensor(value), torch.tensor(9.0))
    assert fingerprint(nudged) != fingerprint(record)
    assert fingerprint(tensor) != fingerprint(tensor.reshape(4, 3))
    assert fingerprint(tensor) != fingerprint(tensor.bfloat16())


def test_only_exact_zeros_are_shown_as_zero() -> None:
    assert [points(value) for value in (0.0, 0.129, -0.02, 1e-5)] == [
        "0.0",
        "12.9",
        "-2.0",
        "0.001",
    ]


def test_the_run_directory_holds_a_run_for_each_job_and_the_report() -> None:
    run = Path("runs/three")
    files = {"config.yaml", "metrics.json", "report.html"}
    assert {path.name for path in run.iterdir()} == files | {*NAMES, "full"}
    for own in [run / name for name in NAMES] + [run / "full" / name for name in NAMES]:
        assert {path.name for path in own.iterdir()} == files | {"adapter"}
    page = (run / "report.html").read_text()
    addresses = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(a.startswith("data:image/png") or (run / a).is_file() for a in addresses)
    assert "bit for bit unchanged" in page
    assert "<script" not in page


def test_the_command_prints_both_matrices_and_where_pictures_go() -> None:
    printed = Path("printed.txt").read_text()
    assert "Test splits, an adapter for each" in printed
    assert "Test splits, sequential full fine-tuning" in printed
    assert printed.count("after coarse") == 2
    assert "the same for 2 of 2 earlier jobs" in printed
    assert "the same for 0 of 2 earlier jobs" in printed
    assert "finds its job" in printed
    assert "Report: runs/three/report.html" in printed


def test_predict_works_on_each_job() -> None:
    Image.new("RGB", (64, 64), "white").save("white.png")
    result = call("predict", "runs/three/count", "white.png")
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["input"] == "white.png"


def test_a_run_is_not_overwritten_unasked() -> None:
    result = call("continual", "three.yaml", "--quiet")
    assert result.exit_code == 1
    assert "--overwrite" in result.output


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
        ({"jobs": JOBS[:1]}, "jobs: there must be at least two, not 1"),
        ({"contrasts": "none"}, "no key 'contrasts'; did you mean 'contrast'?"),
        (
            {"jobs": [*JOBS[:2], {"confg": "x"}]},
            "jobs.2 has no key 'confg'; did you mean 'config'?",
        ),
        ({"contrast": "ful"}, "did you mean 'full'?"),
        (
            {"jobs": changed(1, **{"backbone.name": "nano/clip"})},
            "jobs.1: shapes is on another encoder than count: name 'nano/clip', not 'nano/vit'",
        ),
        ({"jobs": changed(2, name="count")}, "two are called 'count'"),
        ({"jobs": changed(2, name="full")}, "jobs.2: 'full' cannot name a folder"),
        ({"jobs": changed(2, name="../x")}, "'../x' cannot name a folder"),
        ({"jobs": changed(0, **{"trainer.mode": "head"})}, "jobs.0: trainer.mode is head"),
        ({"jobs": changed(0, composition="count")}, "jobs.0: count has members or a composition"),
        ({"jobs": changed(0, **{"trainer.epoch": 3})}, "jobs.0: in the override"),
        ({"jobs": [*JOBS, {"config": "classify_scene"}]}, "did you mean 'classify_scenes'?"),
        (
            {"contrast_overrides": {"data": {"seed": 3}}},
            "contrast_overrides change data of count",
        ),
    ],
)
def test_mistakes_are_told_in_a_sentence_before_anything_is_learned(
    changes: dict[str, Any], words: str
) -> None:
    result = call("continual", write(**changes), "--quiet")
    assert result.exit_code == 1
    assert words in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert not Path("runs/wrong").exists()


def test_a_config_of_several_jobs_is_none_of_one_and_the_other_way_round() -> None:
    assert "mmadapters continual" in call("train", "three.yaml").output
    assert "'jobs'" in call("continual", "classify_scenes").output


def test_overrides_may_be_dotted_or_in_sections_and_the_command_line_has_the_last_word() -> None:
    config = read_continual("three.yaml", ["seed=7", "contrast_overrides.trainer.epochs=2"])
    first, second, _ = read_jobs(config)
    assert (first.seed, first.output) == (7, "runs/three/count")
    assert second.data.options == FEW
    assert second.data.classes[0] == "background"  # type: ignore[attr-defined]
    full = contrast_jobs(config, read_jobs(config))[0]
    assert (full.trainer.mode, full.trainer.epochs, full.trainer.learning_rate) == ("full", 2, 1e-3)
    assert (full.trainer.batch_size, full.output) == (16, "runs/three/full/count")


@pytest.mark.parametrize("name", config_names("continual"))
def test_every_shipped_config_is_valid_and_listed(name: str) -> None:
    config = read_continual(name)
    jobs = read_jobs(config)
    assert len(contrast_jobs(config, jobs)) == len(jobs) > 1
    assert name in call("configs").output


def test_heat_maps_stand_side_by_side_and_leave_out_what_is_not_there() -> None:
    cells = [[Metric("x", 0.5), None], [Metric("x", 0.25), Metric("x", 0.9)]]
    figure = heat_maps({"left": cells, "right": cells}, rows="after", columns=["a", "b"])
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["left", "right"]
    shown = [text.get_text() for text in figure.axes[0].texts]
    assert shown == ["50.0", "", "25.0", "90.0"]
