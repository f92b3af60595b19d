"""A retrieval job from its config to predictions and an index of the saved adapter."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mmadapters.tasks.artifact import open_directory
from mmadapters.tasks.config.file import read_config
from mmadapters.tasks.jobs.prediction import predict
from mmadapters.tasks.jobs.run import train
from mmadapters.tasks.reports.results import Run
from mmadapters.tasks.retrieval.index import build_index, search_index

SMALL = [
    *("data.options={train: 24, validation: 8, test: 16}", "trainer.max_steps=2"),
    *("trainer.batch_size=8", "trainer.device=cpu", "evaluation.bootstrap=20"),
    *("evaluation.pictures=4", "trainer.tensorboard=false"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    output = tmp_path_factory.mktemp("retrieval") / "run"
    return train(read_config("retrieve_scenes", [*SMALL, f"output={output}"]), quiet=True)


def test_a_run_has_figures_before_and_after_and_a_report(run: Run) -> None:
    metrics = json.loads((run.folder / "metrics.json").read_text("utf-8"))
    assert set(metrics["splits"]) == {"validation", "test"}
    test = metrics["splits"]["test"]["metrics"]
    assert next(iter(test)) == "mean R@1"
    assert set(metrics["before"]["metrics"]) == set(test)
    assert test["text-to-image R@10"]["count"] == 16
    assert metrics["trained_share"] < 0.05
    report = (run.folder / "report.html").read_text("utf-8")
    assert "Texts and the pictures that they find" in report


def test_a_saved_adapter_gives_the_trained_embeddings(run: Run, tmp_path: Path) -> None:
    opened = open_directory(run.folder, device="cpu")
    assert opened.metadata["mode"] == "adapter"
    texts = ["big teal arrow", "tiny gold dome, middle"]
    (first, _) = predict(opened, texts)
    expected = run.model.eval().texts(run.task.tokens(texts[:1]))  # type: ignore[attr-defined]
    np.testing.assert_allclose(first["embedding"], expected[0].tolist(), atol=1e-5)


def test_an_index_of_the_run_belongs_to_its_adapter(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    texts = tmp_path / "texts.txt"
    texts.write_text("big teal arrow\ntiny gold dome, middle\n", "utf-8")
    opened = open_directory(run.folder / "adapter", device="cpu")
    build_index(opened.task, opened.model, [str(texts)], tmp_path / "index")
    again = open_directory(run.folder, device="cpu")
    found = search_index(again.task, again.model, tmp_path / "index", "big teal arrow")
    assert found[0]["text"] == "big teal arrow"
    assert found[0]["similarity"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", ["retrieve_scenes", "retrieve_emoji", "retrieve_blip"])
def test_the_shipped_configs_are_valid(name: str) -> None:
    config = read_config(name)
    assert config.task == "retrieval"
    assert config.evaluation.before
