"""Jobs with several adapters: members of earlier runs, fusion, AdapterDrop, and what is saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mmadapters import Fuse, Stack
from mmadapters.tasks import artifact
from mmadapters.tasks.config.errors import ConfigError
from mmadapters.tasks.config.file import read_config
from mmadapters.tasks.data.load import load_splits
from mmadapters.tasks.jobs.run import evaluate_split, train
from mmadapters.tasks.reports.results import Run

SMALL = (
    *("data.options.train=48", "data.options.validation=16", "data.options.test=16"),
    *("trainer.max_steps=4", "trainer.tensorboard=false", "evaluation.bootstrap=50"),
    *("evaluation.pictures=0", "trainer.log_every=1"),
)


def job(folder: Path, *changes: str) -> Run:
    fixed = (f"output={folder}", f"name={folder.name}", *SMALL)
    return train(read_config("classify_scenes", [*fixed, *changes]), quiet=True)


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two adapters, `one` and `two`."""
    folder = tmp_path_factory.mktemp("members")
    for number, name in enumerate(("one", "two")):
        job(folder / name, f"seed={number}", f"data.seed={number}")
    return folder


def named(folder: Path) -> list[str]:
    return [f"members.one={folder}/one", f"members.two={folder}/two"]


@pytest.fixture(scope="module")
def fused(members: Path) -> Run:
    changes = ["trainer.mode=fusion", "composition={fuse: [one, two]}", "evaluation.pictures=1"]
    return job(members / "fused", *named(members), *changes)


def test_fusion_trains_the_attention_and_the_head_alone(fused: Run, members: Path) -> None:
    encoder = fused.model.encoder
    assert encoder.active_adapters == Fuse("one", "two")
    trained = {name for name, p in fused.model.named_parameters() if p.requires_grad}
    assert trained
    assert all(name.startswith(("encoder.fusions.", "head.")) for name in trained)
    for name in ("one", "two"):
        own = artifact.open_directory(members / name, device="cpu").model.encoder.adapter(name)
        for key, tensor in own.tensors().items():
            assert torch.equal(tensor, encoder.adapter(name).tensors()[key])


def test_report_and_figures_of_a_fusion_say_who_contributes_where(fused: Run) -> None:
    told = json.loads((fused.folder / "metrics.json").read_text())["fusion_attention"]
    assert told.keys() == {"one,two"}
    sites = {site for site, _ in fused.model.encoder.adapter("one").entries()}
    assert told["one,two"].keys() == sites
    for weights in told["one,two"].values():
        assert sum(weights) == pytest.approx(1, abs=1e-5)
    assert "Who contributes where" in (fused.folder / "report.html").read_text("utf-8")


def test_saved_composition_needs_none_of_its_members_directories(
    fused: Run, tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere"
    (fused.folder / artifact.FOLDER).rename(moved)
    try:
        opened = artifact.open_directory(
            moved, overrides=["members.one=gone", "members.two=gone"], device="cpu"
        )
        assert opened.model.encoder.active_adapters == Fuse("one", "two")
        image = torch.randn(2, 3, 64, 64)
        fused.model.eval()
        with torch.no_grad():
            expected = fused.model.encoder(image)
            assert torch.equal(opened.model.encoder(image), expected)
    finally:
        moved.rename(fused.folder / artifact.FOLDER)


def test_own_adapter_trains_on_top_of_a_member(members: Path) -> None:
    run = job(
        members / "own", f"members.one={members}/one", "composition={stack: [one, '${name}']}"
    )
    encoder = run.model.encoder
    assert encoder.active_adapters == Stack("one", "own")
    trained = {n for n, p in run.model.encoder.named_parameters() if p.requires_grad}
    assert all(name.startswith("adapters.own.") for name in trained)
    assert run.facts["adapter_parameters"] == sum(
        p.numel() for name in ("one", "own") for p in encoder.adapter(name).parameters()
    )


def test_average_of_members_is_evaluated_with_a_trained_head(members: Path) -> None:
    changes = ["trainer.mode=head", "composition={average: [one, two], weights: [3, 1]}"]
    run = job(members / "mean", *named(members), *changes)
    opened = artifact.open_directory(run.folder, device="cpu")
    assert opened.model.encoder.active_adapters == run.model.encoder.active_adapters
    assert run.facts["trained_share"] == 0


def test_dropped_adapters_stay_dropped_when_the_run_is_opened(tmp_path: Path) -> None:
    run = job(tmp_path / "dropped", "trainer.adapter_drop=3")
    used = artifact.open_directory(run.folder, device="cpu").model.encoder
    all_of_them = artifact.open_directory(
        run.folder, overrides=["evaluation.adapter_drop=0"], device="cpu"
    ).model.encoder
    with torch.no_grad():
        for key, tensor in all_of_them.adapter("dropped").tensors().items():
            tensor.add_(1e-2 * len(key))
            used.adapter("dropped").tensors()[key].copy_(tensor)
        image = torch.randn(1, 3, 64, 64)
        assert not torch.equal(used(image), all_of_them(image))
        with all_of_them.using("dropped", drop=3):
            assert torch.equal(used(image), all_of_them(image))


def test_run_is_measured_with_the_drop_of_its_evaluation(tmp_path: Path) -> None:
    steps = ("trainer.learning_rate=0.02", "data.options.test=64")
    run = job(tmp_path / "whole", *steps)
    dropped = job(tmp_path / "measured", *steps, "evaluation.adapter_drop=8")
    opened = artifact.open_directory(dropped.folder, device="cpu")
    for key, tensor in run.model.encoder.adapter("whole").tensors().items():
        assert torch.equal(tensor, dropped.model.encoder.adapter("measured").tensors()[key])
    rows = load_splits(opened.task.config.data, opened.task.columns, ("test",))["test"]
    again = evaluate_split(opened.task, opened.model, rows)
    score = opened.task.score(again.records, bootstrap=0)
    all_act, none_act, opened_again = (
        [metric.value for metric in found.metrics]
        for found in (run.scores["test"], dropped.scores["test"], score)
    )
    assert none_act == pytest.approx(opened_again, abs=1e-9)
    assert none_act != pytest.approx(all_act, abs=1e-3)


def test_random_drop_is_drawn_in_training_and_not_in_evaluation(tmp_path: Path) -> None:
    run = job(tmp_path / "robust", "trainer.adapter_drop=[0,5]")
    run.model.eval()
    encoder, image = run.model.encoder, torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(encoder(image), encoder(image))
        encoder.train()
        drawn = {encoder(image).sum().item() for _ in range(20)}
    assert len(drawn) > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["composition={fuze: [one, two]}"], "did you mean 'fuse'"),
        (["composition={fuse: [one]}"], "Fuse needs at least 2 members"),
        (["composition={fuse: [one, {parallel: [a, b]}]}"], "cannot stand inside Fuse"),
        (["trainer.mode=fuse"], "did you mean 'fusion'"),
        (["trainer.adapter_drop=[3,1]"], "least, most"),
    ],
)
def test_what_is_written_wrong_is_told_when_it_is_read(changes: list[str], message: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=message):
        read_config("classify_scenes", changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["members.one=@one"], "composition does not say how they act"),
        (["trainer.mode=fusion"], "mode fusion trains the attention over several members"),
        (["members.one=nowhere", "composition=one"], "no adapter directory"),
        (["composition={stack: [one, two]}"], "no adapter is called 'one'"),
    ],
)
def test_members_that_do_not_fit_end_the_run_with_a_reason(
    changes: list[str], message: str, members: Path, tmp_path: Path
) -> None:
    written = [change.replace("@one", f"{members}/one") for change in changes]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        job(tmp_path / "wrong", *written)
