"""The command line, from a config to a report, in small real runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner, Result

import mmadapters
from mmadapters.adapters import storage
from mmadapters.tasks.artifact import open_directory
from mmadapters.tasks.cli.app import app

CONFIG = {
    "task": "classification",
    "name": "shapes",
    "output": "runs/${name}",
    "backbone": {"name": "nano/vit"},
    "adapter": {"method": "double_seq_bn", "size": 4, "sites": ["vision.blocks.[67].*"]},
    "data": {
        "source": "builtin/scenes",
        "options": {"train": 48, "validation": 16, "test": 16},
        "columns": {"label": "count"},
    },
    "trainer": {"epochs": 1, "batch_size": 16, "log_every": 1},
    "evaluation": {"bootstrap": 50, "pictures": 4},
}


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def ok(*arguments: str) -> str:
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config and its finished run in `runs/shapes`."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "shapes.yaml").write_text(yaml.safe_dump(CONFIG))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        output = ok("train", "shapes.yaml", "--quiet")
    assert "Report: runs/shapes/report.html" in output
    return folder


@pytest.fixture(autouse=True)
def _there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def test_a_run_directory_holds_what_it_promises() -> None:
    run = Path("runs/shapes")
    inside = {path.name for path in run.iterdir()}
    assert inside == {*("config.yaml", "metrics.json", "adapter", "report.html", "tensorboard")}
    assert list((run / "tensorboard").glob("events.*"))
    assert {path.name for path in (run / "adapter").iterdir()} == {
        storage.WEIGHTS_FILE,
        storage.JSON_FILE,
    }
    metrics = json.loads((run / "metrics.json").read_text())
    test = metrics["splits"]["test"]["metrics"]["accuracy"]
    assert test["low"] <= test["value"] <= test["high"]
    assert test["count"] == 16 - metrics["skipped"]["test"]
    assert metrics["seed"] == 0
    assert metrics["environment"]["packages"]["torch"] == torch.__version__.partition("+")[0] or (
        metrics["environment"]["packages"]["torch"] in torch.__version__
    )
    assert 0 < metrics["trained_share"] < 0.05
    assert metrics["adapter_parameters"] > 0
    assert 0 <= metrics["waited_for_data"] <= 1
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert resolved["output"] == "runs/shapes"
    assert resolved["trainer"]["epochs"] == 1
    page = (run / "report.html").read_text()
    assert "accuracy" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_evaluate_gives_the_figures_of_the_run_again() -> None:
    ok("evaluate", "runs/shapes", "--out", "again.json")
    again = json.loads(Path("again.json").read_text())["metrics"]
    assert (
        again
        == json.loads(Path("runs/shapes/metrics.json").read_text())["splits"]["test"]["metrics"]
    )


def pictures(name: str) -> Path:
    """A folder of three drawn scenes, and a table that is none."""
    from mmadapters.tasks.data.synthetic import scenes

    made = Path(name)
    made.mkdir()
    (made / "metadata.csv").write_text("file_name\n")
    drawn = [scenes.make_scene(seed, scenes.UNSEEN) for seed in range(3)]
    images, _ = scenes.render(drawn, scenes.UNSEEN)
    for number, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(made / f"{number}.png")
    return made


def test_predict_writes_a_line_for_each_file() -> None:
    pictures("pictures")
    output = ok("predict", "runs/shapes/adapter", "pictures", "--out", "predicted")
    rows = [json.loads(line) for line in output.splitlines()]
    assert [Path(row["input"]).name for row in rows] == ["0.png", "1.png", "2.png"]
    assert Path("predicted/predictions.jsonl").read_text().splitlines() == output.splitlines()
    result = call("predict", "runs/shapes", "nowhere.png")
    assert result.exit_code == 1
    assert "nowhere.png" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("mode", ["head", "full", "lora", "none"])
def test_every_mode_trains_saves_and_opens_again(mode: str) -> None:
    name = f"mode-{mode}"
    ok("train", "shapes.yaml", f"name={name}", f"trainer.mode={mode}", "--quiet")
    metrics = json.loads(Path(f"runs/{name}/metrics.json").read_text())
    assert metrics["mode"] == mode
    share = metrics["trained_share"]
    assert {"head": share == 0, "none": share == 0, "full": share > 0.9, "lora": share < 0.05}[mode]
    opened = open_directory(f"runs/{name}")
    assert (mode == "full") == any(
        not torch.equal(a, b)
        for a, b in zip(
            opened.model.encoder.backbone.state_dict().values(),
            mmadapters.load_backbone("nano/vit").state_dict().values(),
            strict=True,
        )
    )
    ok("evaluate", f"runs/{name}", "--out", f"{name}.json")
    again = json.loads(Path(f"{name}.json").read_text())["metrics"]["accuracy"]
    assert again == metrics["splits"]["test"]["metrics"]["accuracy"]


def test_a_run_is_not_overwritten_unasked() -> None:
    result = call("train", "shapes.yaml", "--quiet")
    assert result.exit_code == 1
    assert "--resume" in result.output
    result = call("train", "shapes.yaml", "trainer.epochs=2", "--resume", "--quiet")
    assert result.exit_code == 1
    assert "trainer.epochs" in result.output.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "shapes.yaml", "trainer.epoch=3"], "epochs"),
        (["train", "shapse"], "config"),
        (
            ["train", "shapes.yaml", "name=x", "backbone.name=timm/vit_smal_patch16_224"],
            "did you mean",
        ),
        (["train", "shapes.yaml", "name=y", "data.columns.label=cuont"], "count"),
        (["evaluate", "nowhere"], "no adapter directory"),
        (["evaluate", "runs/shapes", "--split", "trian"], "trian"),
        (["inspect", "nano/vti"], "nano/vit"),
    ],
)
def test_mistakes_are_told_in_a_sentence(arguments: list[str], words: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 1
    assert words in result.output
    assert "Traceback" not in result.output
    assert not Path("runs/x/adapter").exists()


def test_keys_of_a_task_are_listed_with_their_defaults() -> None:
    for argument in ("classification", "shapes.yaml"):
        output = ok("train", argument, "--help")
        assert "trainer.batch_size" in output
        assert "32" in output
    assert "--resume" in ok("train", "--help")


def test_inspect_says_what_each_method_would_cost() -> None:
    output = json.loads(ok("inspect", "nano/vit", "--json"))
    assert output
    assert "lora" in ok("inspect", "nano/vit")


def test_doctor_says_what_is_wrong_before_any_training() -> None:
    broken: dict[str, Any] = {**CONFIG, "data": {"source": "broken", "columns": {"label": "kind"}}}
    data = Path("broken")
    data.mkdir()
    (data / "a.png").write_bytes(b"no picture")
    (data / "metadata.csv").write_text(
        "file_name,kind,split\na.png,x,train\nb.png,y,train\na.png,x,test\n"
    )
    Path("broken.yaml").write_text(yaml.safe_dump(broken))
    result = call("doctor", "broken.yaml")
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    assert "b.png" in result.output


def test_two_processes_give_what_one_gives() -> None:
    start = [sys.executable, "-m"]
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    for name, command in (("one", start), ("two", [*start, *launch])):
        done = subprocess.run(
            [*command, "mmadapters", "train", "shapes.yaml", f"name={name}", "--quiet"],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
    one, two = (
        json.loads(Path(f"runs/{name}/metrics.json").read_text())["splits"]
        for name in ("one", "two")
    )
    assert two == one


def test_pictures_are_indexed_and_searched_by_words(folder: Path) -> None:
    pytest.importorskip("faiss")
    retrieval = {
        "task": "retrieval",
        "name": "finder",
        "output": "runs/finder",
        "backbone": {"name": "nano/clip"},
        "data": {"source": "builtin/scenes", "options": {"train": 16, "validation": 8, "test": 8}},
        "trainer": {"mode": "head", "max_steps": 1, "batch_size": 8, "tensorboard": False},
        "evaluation": {"bootstrap": 0, "pictures": 0},
    }
    Path("finder.yaml").write_text(yaml.safe_dump(retrieval))
    ok("train", "finder.yaml", "--quiet")
    assert "3 pictures in index" in ok("index", "runs/finder", str(pictures("indexed")))
    assert "indexed/" in ok("search", "runs/finder", "index", "a large red circle", "-k", "2")
    result = call("search", "runs/finder", "nowhere", "a circle")
    assert result.exit_code == 1
    assert "nowhere" in result.output


def test_predict_goes_on_after_a_bad_file_and_names_it_at_the_end() -> None:
    folder = pictures("some_bad")
    (folder / "1.png").write_bytes(b"no picture")
    (folder / "notes.wav").write_bytes(b"of another task")
    (folder / ".hidden.png").write_bytes(b"hidden")
    Path("empty").mkdir(exist_ok=True)
    result = call("predict", "runs/shapes", "some_bad", "empty", "--out", "some_out")
    assert result.exit_code == 1
    every = Path("some_out/predictions.jsonl").read_text().splitlines()
    lines = [line for line in every if "error" not in json.loads(line)]
    refused = {json.loads(line)["input"]: json.loads(line)["error"] for line in {*every} - {*lines}}
    assert refused.keys() == {"some_bad/1.png", "empty"}
    assert refused["some_bad/1.png"].startswith("the image file is in no format")
    assert [Path(json.loads(line)["input"]).name for line in lines] == ["0.png", "2.png"]
    told = " ".join(result.output.split())
    assert all(line in result.output for line in lines)
    assert "error: 2 inputs cannot be used:" in told
    assert "the folder empty has no file that is read" in told
    assert "1.png cannot be classified: the image file is in no format" in told
    assert "notes" not in told
    assert "hidden" not in told
