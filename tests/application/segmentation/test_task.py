"""The segmentation task: any size, batches as single images, training, files, pictures."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from application.endings import Told, until_error
from application.segmentation.scenes import CLASSES, Scenes, batch_of, job, made, miou, train
from PIL import Image

from mmadapters.tasks import artifact
from mmadapters.tasks.config.file import read_config
from mmadapters.tasks.config.schema import SPLITS
from mmadapters.tasks.core.errors import BadRow
from mmadapters.tasks.core.model import TaskModel
from mmadapters.tasks.core.results import Figure
from mmadapters.tasks.data.load import load_splits
from mmadapters.tasks.data.media import read_mask
from mmadapters.tasks.segmentation.config import SegmentationConfig
from mmadapters.tasks.segmentation.inference import resize_logits
from mmadapters.tasks.segmentation.model import SegmentationModel
from mmadapters.tasks.segmentation.task import SegmentationTask
from mmadapters.tasks.training.evaluate import evaluate

SIZES = ((40, 48), (33, 57), (40, 48), (19, 21))
KINDS = ("linear", "setr_pup", "segmenter", "upernet", "panoptic_fpn", "fpn")


@pytest.fixture(scope="module")
def trained() -> tuple[SegmentationTask, SegmentationModel]:
    """A job after some seconds of training."""
    config = job(
        head={"kind": "setr_pup", "channels": 32},
        loss={"dice": 1.0},
        evaluation={"groups": ("kind",)},
    )
    rows = Scenes(64)
    task, model = made(config, rows)
    before = {name: p.clone() for name, p in model.encoder.backbone.state_dict().items()}
    losses = train(task, model, rows, steps=60)
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
    for name, tensor in model.encoder.backbone.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    return task, model


def test_training_learns_what_unseen_pictures_hold(
    trained: tuple[SegmentationTask, SegmentationModel],
) -> None:
    task, model = trained
    unseen = Scenes(24, seed=9, sizes=SIZES)
    assert miou(task, model, unseen) > 0.6
    _, fresh = made(task.config, Scenes(1))
    assert miou(task, fresh, unseen) < 0.4


@pytest.mark.parametrize(
    ("kind", "mode"), [*((kind, "whole") for kind in KINDS), ("linear", "slide"), ("fpn", "slide")]
)
def test_an_image_gets_in_a_batch_what_it_gets_alone(kind: str, mode: str) -> None:
    rows = Scenes(4, sizes=SIZES)
    config = job(
        head={"kind": kind, "channels": 8},
        inference={"mode": mode, "window": 24, "stride": 16, "flip": True, "window_batch": 3},
    )
    task, model = made(config, rows)
    train(task, model, rows, steps=1, rate=1e-2)
    with torch.no_grad():
        together = task.records(model, batch_of(task, rows, range(4), train=False))
        for number, record in enumerate(together):
            (alone,) = task.records(model, batch_of(task, rows, [number], train=False))
            assert np.array_equal(record["counts"].cells, alone["counts"].cells)
            assert np.array_equal(record["counts"].pixels, alone["counts"].pixels)
            np.testing.assert_allclose(record["counts"].outlines, alone["counts"].outlines)


def test_any_size_is_padded_to_the_patch_and_cut_again() -> None:
    _, model = made(job(), Scenes(1))
    model.eval()
    pixels = torch.randn(2, 3, 21, 30)
    with torch.no_grad():
        found = model.logits(pixels)
        padded = torch.zeros(2, 3, 24, 32)
        padded[:, :, :21, :30] = pixels
        maps = model.tower(padded, model.layers).maps
        expected = resize_logits(model.head(maps, padded), (24, 32))[:, :, :21, :30]
    assert found.shape == (2, len(CLASSES), 21, 30)
    torch.testing.assert_close(found, expected)


def test_evaluation_sees_every_pixel_of_the_original() -> None:
    rows = Scenes(4, sizes=SIZES)
    task, model = made(job(transforms={"size": 24}), rows)
    found = evaluate(task, model, rows, batch_size=4)
    for record, (height, width) in zip(found.records, SIZES, strict=True):
        assert record["counts"].pixels.sum() == height * width


def test_scores_are_grouped_and_the_deciding_metric_is_first(
    trained: tuple[SegmentationTask, SegmentationModel],
) -> None:
    task, model = trained
    rows = Scenes(12, seed=3)
    found = evaluate(task, model, rows, batch_size=5)
    scores = task.score(found.records, bootstrap=100)
    assert scores.metrics[0].name == task.metric == "mIoU"
    assert [metric.name for metric in scores.metrics] == [
        *("mIoU", "pixel accuracy", "mean accuracy", "Dice", "foreground IoU", "boundary F1")
    ]
    assert set(scores.groups["kind"]) == {"even", "odd"}
    for value, metrics in scores.groups["kind"].items():
        own = [record for record in found.records if record["row"]["kind"] == value]
        assert metrics[0].count == len(own) == 6
        assert metrics[0].value == task.score(own, bootstrap=0)["mIoU"].value
    assert [table.title for table in scores.tables] == ["Classes", "What is taken for what"]
    json.dumps([metric.to_dict() for metric in scores.metrics])


def test_a_saved_job_predicts_the_same(
    trained: tuple[SegmentationTask, SegmentationModel], tmp_path: Path
) -> None:
    task, model = trained
    rows = Scenes(1, seed=5)
    # The encoder is drawn at random: the same one again is the file of its weights.
    torch.save(model.encoder.backbone.state_dict(), tmp_path / "encoder.pt")
    artifact.save(tmp_path / "adapter", task, model, mode="adapter", metrics={})
    opened = artifact.open_directory(
        tmp_path / "adapter",
        overrides=[f"backbone.weights={tmp_path / 'encoder.pt'}"],
        device="cpu",
    )
    assert opened.task.state == task.state
    picture = tmp_path / "picture.png"
    picture.write_bytes(rows[0]["image"]["bytes"])
    (ours,) = task.predict(model, [str(picture)], out=None)
    (theirs,) = opened.task.predict(opened.model, [str(picture)], out=None)
    assert ours == theirs


def test_predictions_are_written_with_a_palette_and_shares(
    trained: tuple[SegmentationTask, SegmentationModel], tmp_path: Path
) -> None:
    task, model = trained
    rows = Scenes(2, seed=7, sizes=((33, 57),))
    inputs = [tmp_path / "a" / "scene.png", tmp_path / "b" / "scene.png"]
    for path, row in zip(inputs, rows.rows, strict=True):
        path.parent.mkdir()
        path.write_bytes(row["image"]["bytes"])
    out = tmp_path / "out"
    out.mkdir()
    results = list(task.predict(model, [str(path) for path in inputs], out=out))
    json.dumps(results)
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*.png")) == [
        "a/scene_mask.png",
        "a/scene_overlay.png",
        "b/scene_mask.png",
        "b/scene_overlay.png",
    ]
    for result, row in zip(results, rows.rows, strict=True):
        mask = read_mask(result["mask"])
        assert mask.shape == (33, 57) == (result["height"], result["width"])
        with Image.open(result["mask"]) as image:
            assert image.mode == "P"
        with Image.open(result["overlay"]) as image:
            assert image.size == (57, 33)
        for number, name in enumerate(CLASSES):
            assert result["shares"][name] == pytest.approx((mask == number).mean(), abs=1e-6)
        assert (mask == read_mask(row["mask"])).mean() > 0.8


def test_a_file_that_is_no_picture_is_named(
    trained: tuple[SegmentationTask, SegmentationModel], tmp_path: Path
) -> None:
    task, model = trained
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken\.png: .*no format"):
        list(task.predict(model, [str(broken)], out=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["broken.png"]


def test_pictures_show_the_best_the_median_and_the_worst(
    trained: tuple[SegmentationTask, SegmentationModel],
) -> None:
    task, model = trained
    rows = Scenes(9, seed=3, sizes=SIZES)
    records = evaluate(task, model, rows, batch_size=9).records
    scores = [task.score([record], bootstrap=0)["mIoU"].value for record in records]
    shown = task.illustrate(model, rows, records, count=6)
    assert all(isinstance(figure, Figure) for figure in shown)
    titles = [figure.title for figure in shown]
    assert [title.split(":")[0] for title in titles] == [
        *("best", "best", "median", "median", "worst", "worst")
    ]
    numbers = [int(title.rpartition(" ")[2]) for title in titles]
    order = np.argsort(-np.array(scores), kind="stable")
    assert numbers == [*order[:2], *order[3:5], *order[-2:]]
    for figure in shown:
        assert isinstance(figure, Figure)
        with Image.open(io.BytesIO(figure.image)) as image:
            assert image.format == "PNG"
    # Fewer rows than pictures: each once.
    assert len(task.illustrate(model, rows, records[:2], count=6)) == 2


def test_a_bad_row_says_why() -> None:
    rows = Scenes(2, sizes=((40, 48), (33, 57)))
    task, _ = made(job(), rows)
    good, other = rows.rows
    for row, message in (
        ({**good, "image": None}, "there is no image"),
        ({**good, "image": {"bytes": b"x"}}, "image"),
        ({**good, "mask": None}, "neither a mask nor segments"),
        ({**good, "mask": other["mask"]}, "mask has 33×57 pixels, the image 40×48"),
        ({**good, "mask": np.full((40, 48), 7)}, "holds 7, where ids are 0 to 2"),
    ):
        for training in (True, False):
            with pytest.raises(BadRow, match=message):
                task.example(row, train=training)


def test_coco_segments_train_like_masks() -> None:
    rows = Scenes(1)
    segments = [{"category_id": 2, "segmentation": [[3, 4, 20, 4, 20, 30, 3, 30]]}]
    row = {"image": rows[0]["image"], "segments": json.dumps(segments)}
    task, _ = made(job(), rows)
    mask = task.example(row, train=False)["mask"].numpy()
    expected = np.zeros((40, 48))
    expected[4:30, 3:20] = 2
    assert np.array_equal(mask, expected)


def test_doctor_sees_the_classes_and_masks_in_which_nothing_counts() -> None:
    rows = Scenes(3)
    rows.rows[1] = {**rows.rows[1], "mask": np.full((40, 48), 255)}
    rows.rows[2] = {**rows.rows[2], "mask": np.full((40, 48), 99)}
    task, _ = made(job(), rows)
    (problem,) = task.check(rows)
    assert problem.index == 1
    assert "every pixel of the mask is ignored" in problem.reason
    (table,) = task.survey(rows)
    mask = read_mask(rows.rows[0]["mask"])
    body = {row[0]: row[1:] for row in table.rows}
    for number, name in enumerate(CLASSES):
        pixels = int((mask == number).sum())
        assert body[name] == [pixels, round(100 * pixels / (2 * mask.size), 2), 1]
    assert body["(ignored)"] == [mask.size, 50.0, 1]
    assert "2 masks" in table.caption


def test_data_without_masks_is_refused() -> None:
    rows = Scenes(1)
    rows.column_names = ("image", "label")  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"no column 'mask'.*columns are image, label"):
        made(job(), rows)


def test_an_adapter_that_nothing_passes_through_is_refused() -> None:
    clip = {
        "name": "open_clip/ViT-B-32",
        "options": {
            "embed_dim": 16,
            "vision_cfg": {"image_size": 32, "patch_size": 8, "layers": 2, "width": 64},
            "text_cfg": {
                **{"context_length": 8, "vocab_size": 64, "layers": 2, "width": 64, "heads": 2}
            },
        },
    }
    with pytest.raises(ValueError, match=r"sits in text of CLIP.*\[\"vision\"\]"):
        made(job(backbone=clip), Scenes(1))
    adapter = {"method": "seq_bn", "size": 8, "sites": ["vision"]}
    _, model = made(job(backbone=clip, adapter=adapter), Scenes(1))
    assert model.logits(torch.randn(1, 3, 32, 32)).shape == (1, 3, 32, 32)
    with pytest.raises(ValueError, match="sits in block 2, above the last that the head reads"):
        made(job(head={"layers": [1]}), Scenes(1))


@pytest.mark.parametrize("mode", ["head", "full", "bitfit", "lora"])
def test_every_mode_trains_what_it_says(mode: str) -> None:
    rows = Scenes(8)
    _, model = made(job(trainer={"mode": mode}), rows)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any(name.startswith("head.") for name in trained)
    inside = {name for name in trained if name.startswith("encoder.")}
    prefix = {"head": "none", "full": "encoder.backbone."}.get(mode, "encoder.adapters.")
    assert all(name.startswith(prefix) for name in inside)
    assert bool(inside) == (mode != "head")


def test_modes_start_from_the_same_head() -> None:
    heads = [made(job(trainer={"mode": mode}), Scenes(1))[1].head for mode in ("head", "adapter")]
    for one, other in zip(heads[0].parameters(), heads[1].parameters(), strict=True):
        assert torch.equal(one, other)


def shipped() -> Iterator[str]:
    for file in files("mmadapters.configs").iterdir():
        if file.name.startswith("segment_"):
            yield file.name.removesuffix(".yaml")


@pytest.mark.parametrize("name", sorted(shipped()))
def test_shipped_configs_are_valid(name: str) -> None:
    config = read_config(name, [])
    assert config.task == "segmentation"
    assert config.name == name


def test_real_nuclei_are_learned_in_a_few_steps(shared_dir: Path) -> None:
    """The config that ships, at a size that a test can wait for."""
    folder = shared_dir / "data" / "nuclei"
    weights = shared_dir / "weights" / "vit_small_patch14_focus.safetensors"
    if not folder.is_dir() or not weights.is_file():
        pytest.skip("no nuclei or no ViT-S/14 weights")
    config: Any = read_config(
        "segment_nuclei",
        [
            f"data.source={folder}",
            "data.limit={train: 48, test: 8}",
            f"backbone.weights={weights}",
            "transforms.size=196",
            "transforms.crop=98",
            "head.channels=64",
            "inference.flip=false",
            "trainer.device=cpu",
        ],
    )
    splits = load_splits(config.data, SegmentationTask.columns, SPLITS)
    rows, unseen = splits["train"], splits["test"]
    task, model = made(config, rows)
    share = sum(p.numel() for p in model.encoder.adapters.parameters()) / sum(
        p.numel() for p in model.encoder.backbone.parameters()
    )
    assert share <= 0.05
    train(task, model, rows, steps=24, rate=1e-3)
    # Background everywhere would have about 0.43.
    assert miou(task, model, unseen) > 0.5


def test_the_model_is_a_task_model() -> None:
    _, model = made(job(), Scenes(1))
    assert isinstance(model, TaskModel)
    assert not any(name.startswith(("tower", "loss")) for name, _ in model.named_parameters())


def test_a_bad_picture_does_not_end_the_others(
    trained: tuple[SegmentationTask, SegmentationModel], tmp_path: Path
) -> None:
    task, model = trained
    good = tmp_path / "good.png"
    good.write_bytes(Scenes(1, seed=7, sizes=((33, 57),)).rows[0]["image"]["bytes"])
    results, reasons = until_error(
        task.predict(model, [str(tmp_path / "gone.png"), str(good)], out=None, bad=(told := Told()))
    )
    assert told.names == [str(tmp_path / "gone.png")]
    assert "gone.png: no such file" in reasons[0]
    assert [result["input"] for result in results] == [str(good)]


def test_the_config_chooses_what_decides(
    trained: tuple[SegmentationTask, SegmentationModel],
) -> None:
    job = trained[0].config.model_dump()
    for name, metric in (("Dice", "Dice"), ("loss", "mIoU"), ("boundary F1", "boundary F1")):
        task = SegmentationTask(
            SegmentationConfig(**{**job, "evaluation": {"deciding": name}}), trained[0].state
        )
        assert (task.deciding, task.metric) == (name, metric)
    rows = Scenes(3, seed=7, sizes=((33, 57),))
    task = SegmentationTask(
        SegmentationConfig(**{**job, "evaluation": {"deciding": "Dice"}}), trained[0].state
    )
    records = evaluate(task, trained[1], rows, batch_size=2).records
    assert task.score(records, bootstrap=0).metrics[0].name == "Dice"
    with pytest.raises(ValueError, match="deciding"):
        SegmentationConfig(**{**job, "evaluation": {"deciding": "WER"}})
    off = {"deciding": "boundary F1", "boundary_tolerance": 0}
    with pytest.raises(ValueError, match="boundary_tolerance 0 leaves out"):
        SegmentationConfig(**{**job, "evaluation": off})
