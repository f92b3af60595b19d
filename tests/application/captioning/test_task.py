"""Captioning from rows to scores, pictures and predictions, on a small BLIP."""

from __future__ import annotations

import copy
import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from application.endings import Told, until_error
from families import blip
from PIL import Image

import mmadapters
from mmadapters import SeqBnConfig
from mmadapters.tasks.captioning import metrics
from mmadapters.tasks.captioning.config import CaptioningConfig
from mmadapters.tasks.captioning.task import CaptioningTask
from mmadapters.tasks.core.errors import BadRow
from mmadapters.tasks.core.metrics import Metric
from mmadapters.tasks.core.results import Figure
from mmadapters.tasks.data.doctor import examine
from mmadapters.tasks.data.examples import Collate, Examples
from mmadapters.tasks.training.evaluate import evaluate

from .conftest import SMALL, Fluent, SceneRows, job, made, scores_of, trained


def changed(rows: SceneRows, **columns: Any) -> SceneRows:
    found = copy.copy(rows)
    found.columns = {**rows.columns, **columns}
    return found


def bounds(metric: Metric) -> tuple[float | None, ...]:
    return metric.value, metric.low, metric.high


def test_a_frozen_blip_learns_other_captions_by_its_adapter_alone(
    fluent: Fluent, words: Path, one: SceneRows
) -> None:
    """What each picture shows is now told of the next one."""
    backbone = mmadapters.load_backbone("hf/blip-caption", **SMALL)
    backbone.load_state_dict(fluent[1].encoder.backbone.state_dict())
    other = changed(one, caption=[*one["caption"][1:], one["caption"][0]])
    task, model = made(job(words), other, method=SeqBnConfig(size=16), backbone=backbone)
    before = {name: p.clone() for name, p in backbone.named_parameters()}
    start = scores_of(task, model, other)["CIDEr"].value
    trained(task, model, other, steps=120, rate=1e-2)
    assert all(torch.equal(before[name], p) for name, p in backbone.named_parameters())
    assert scores_of(task, model, other)["CIDEr"].value > 5 * start + 300
    model.encoder.set_active_adapters(None)
    assert scores_of(task, model, other)["CIDEr"].value == pytest.approx(start)


def test_state_is_json_and_enough_to_write_the_same(fluent: Fluent, one: SceneRows) -> None:
    task, model = fluent
    again = CaptioningTask(task.config, json.loads(json.dumps(task.state)))
    for record, other in zip(
        evaluate(task, model, one, batch_size=8).records,
        evaluate(again, model, one, batch_size=3).records,
        strict=True,
    ):
        assert record.pop("likelihood") == pytest.approx(other.pop("likelihood"), rel=1e-4)
        assert record == other


def test_task_and_model_can_be_pickled(fluent: Fluent, one: SceneRows) -> None:
    task, model = pickle.loads(pickle.dumps(fluent))
    assert scores_of(task, model, one)["BLEU-4"].value > 0.9


def test_one_caption_is_drawn_by_the_seed_or_all_count_together(
    words: Path, several: SceneRows
) -> None:
    task, _ = made(job(words), several)
    examples = Examples(task, several, train=True)
    drawn = [examples[0, seed]["reference"]["captions"] for seed in range(20)]  # type: ignore[index]
    assert drawn == [examples[0, seed]["reference"]["captions"] for seed in range(20)]  # type: ignore[index]
    assert {len(texts) for texts in drawn} == {1}
    assert {texts[0] for texts in drawn} == set(several["captions"][0])

    task, model = made(job(words, data={"source": "x", "captions": "all"}), several)
    uneven = changed(several, captions=[several["captions"][0], several["captions"][1][:1]])
    batch = Collate(task)([Examples(task, uneven, train=True)[n] for n in (0, 1)]).batch
    assert batch is not None
    assert batch["image_of"].tolist() == [0, 0, 0, 1]
    torch.testing.assert_close(batch["weights"], torch.tensor([1 / 6] * 3 + [1 / 2]))
    model.eval()
    with torch.no_grad():
        together = float(model(**batch)["loss"])
        alone = [
            float(model(**task.collate([task.example(uneven[n], train=True)]))["loss"])
            for n in (0, 1)
        ]
    assert together == pytest.approx(sum(alone) / 2, rel=1e-4)


def test_evaluation_knows_every_caption(fluent: Fluent, several: SceneRows) -> None:
    example = Examples(fluent[0], several, train=False)[2]
    assert example["reference"]["captions"] == several["captions"][2]  # type: ignore[index]


@pytest.mark.parametrize("by", ["image_id", "picture"])
def test_rows_of_one_image_are_read_once_and_scored_as_one(
    by: str, fluent: Fluent, several: SceneRows
) -> None:
    task, model = fluent
    rows = copy.copy(several)
    pairs = [(n, text) for n in range(8) for text in several["captions"][n]]
    rows.columns = {
        "image": [several["image"][n] for n, _ in pairs],
        "caption": [text for _, text in pairs],
        "things": [several["things"][n] for n, _ in pairs],
    }
    if by == "image_id":
        rows.columns["image_id"] = [n for n, _ in pairs]
    batch = Collate(task)([Examples(task, rows, train=False)[n] for n in range(6)]).batch
    assert batch is not None
    assert len(batch["pixels"]) == 2
    assert batch["image_of"].tolist() == [0, 0, 0, 1, 1, 1]
    together = task.score(evaluate(task, model, several, batch_size=4).records, bootstrap=20)
    apart = task.score(evaluate(task, model, rows, batch_size=5).records, bootstrap=20)
    for one, two in zip(together.metrics, apart.metrics, strict=True):
        assert one.count == 8
        assert bounds(one) == pytest.approx(bounds(two), rel=1e-4)


def test_the_best_checkpoint_is_chosen_by_what_the_config_says(words: Path) -> None:
    task = CaptioningTask(job(words))
    assert (task.metric, task.greater_is_better) == ("CIDEr", True)
    task = CaptioningTask(job(words, evaluation={"deciding": "perplexity"}))
    assert (task.metric, task.greater_is_better) == ("perplexity", False)
    with pytest.raises(ValueError, match="deciding"):
        job(words, evaluation={"deciding": "METEOR"})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"caption": "  "}, "there is no caption"),
        ({"caption": None}, "there is no caption"),
        ({"caption": 3}, "a caption is int 3, not text"),
        ({"image": "nowhere.png"}, "nowhere.png"),
        ({"image": None}, "no image|no picture"),
    ],
)
def test_a_bad_row_says_what_is_wrong_with_it(
    change: dict[str, Any], reason: str, fluent: Fluent, one: SceneRows
) -> None:
    for train in (True, False):
        with pytest.raises(BadRow, match=reason):
            fluent[0].example({**one[0], **change}, train=train)


def test_the_doctor_finds_empty_missing_and_cut_captions(
    words: Path, one: SceneRows, several: SceneRows
) -> None:
    config = job(words, data={"source": "scenes", "caption_length": 10})
    task, _ = made(config, one)
    images = [*one["image"][:5], "nowhere.png", *one["image"][6:]]
    captions = ["a gold dome", *one["caption"][1:6], "  ", "a lime arrow"]
    report = examine(task, {"train": changed(one, image=images, caption=captions)}, workers=0)
    (split,) = report.splits
    assert {(g.reason.partition(":")[0], g.places[0].index) for g in split.problems} >= {
        ("there is no caption", 6)
    }
    assert [place.index for g in split.problems for place in g.places] in ([5, 6], [6, 5])
    (note,) = split.notes
    assert "tokens is cut to the 10 that are read" in note.reason
    assert [place.index for place in note.places] == [1, 2, 3, 4]
    assert split.tables[0].rows[0][0] == 7

    some = changed(several, captions=[["a gold dome", " "], *several["captions"][1:]])
    (problem,) = made(job(words), some)[0].check(some)
    assert problem.index == 0
    assert problem.reason == "1 of its 2 captions say nothing and are left out"


def test_long_captions_are_cut_with_their_end_and_the_prompt_stays(words: Path) -> None:
    rows = SceneRows(range(2))
    config = job(words, data={"source": "x", "caption_length": 6})
    task, _ = made(config, rows)
    (ids,) = task.tokens(["a big gold dome with two lime arrows on its left"])
    assert len(ids) == len(task.prompt) + 5
    assert ids[: len(task.prompt)].tolist() == task.prompt.tolist()
    assert ids[-1] == task.state["text"]["end"]
    # Without a limit of the config it is the decoder's: prompt and caption fill its positions.
    task, _ = made(job(words, data={"source": "x", "caption_length": 999}), rows)
    assert len(task.tokens(["gold " * 500])[0]) == task.state["text"]["context_length"]


def test_what_cannot_be_trained_is_told(words: Path, one: SceneRows) -> None:
    with pytest.raises(ValueError, match=r"trainer\.mode head would train nothing"):
        job(words, trainer={"mode": "head"})
    backbone = mmadapters.load_backbone("hf/blip-caption", **SMALL)
    rows = copy.copy(one)
    rows.columns = {"image": one["image"], "text": one["caption"]}
    with pytest.raises(ValueError, match=r"column of captions: name it in data\.columns"):
        CaptioningTask(job(words)).fit(rows, backbone)
    for other in (blip.hf_blip_vqa(), mmadapters.load_backbone("nano/clip")):
        with pytest.raises(ValueError, match="captioning needs a BLIP that writes captions"):
            CaptioningTask(job(words)).fit(one, other)
    with pytest.raises(ValueError, match=r"data\.prompt has 45 tokens and leaves no room"):
        CaptioningTask(job(words, data={"source": "x", "prompt": "a " * 45})).fit(one, backbone)
    with pytest.raises(ValueError, match="min_tokens 9 is above max_tokens 5"):
        job(words, decoding={"min_tokens": 9, "max_tokens": 5})


def test_the_report_shows_the_best_and_the_worst(fluent: Fluent, several: SceneRows) -> None:
    task, model = fluent
    records = evaluate(task, model, several, batch_size=8).records
    highest, lowest = task.illustrate(model, several, records, count=6)
    for figure in (highest, lowest):
        assert isinstance(figure, Figure)
        image = Image.open(io.BytesIO(figure.image))
        assert image.width > 800
        assert image.height > 3 * 150
    images = metrics.images_of(records)
    assert [len(image.references) for image in images] == [3] * 8
    assert task.illustrate(model, several, records, count=0) == []


def test_predictions_are_the_captions_of_the_evaluation(
    fluent: Fluent, one: SceneRows, tmp_path: Path
) -> None:
    task, model = fluent
    paths = [str(tmp_path / f"{number}.png") for number in range(8)]
    for path, image in zip(paths, one["image"], strict=True):
        image.save(path)
    records = evaluate(task, model, one, batch_size=8).records
    assert list(task.predict(model, paths, out=None)) == [
        {"image": path, "caption": record["caption"]}
        for path, record in zip(paths, records, strict=True)
    ]
    assert "picture of" not in records[0]["caption"]  # the prompt is left out
    with pytest.raises(ValueError, match=r"nowhere\.png"):
        list(task.predict(model, ["nowhere.png"], out=None))


def test_a_config_of_blips_own_prompt_is_the_default() -> None:
    config = CaptioningConfig.model_validate(
        {"task": "captioning", "backbone": {"name": "hf/blip-caption"}, "data": {"source": "x"}}
    )
    assert config.data.prompt == "a picture of"
    assert (config.loss.label_smoothing, config.decoding.beams) == (0.1, 3)


def test_a_bad_picture_does_not_end_the_others(
    fluent: Fluent, one: SceneRows, tmp_path: Path
) -> None:
    task, model = fluent
    good = [str(tmp_path / f"{number}.png") for number in range(2)]
    for path, image in zip(good, one["image"], strict=False):
        image.save(path)
    expected = list(task.predict(model, good, out=None))
    bad = str(tmp_path / "bad.png")
    Path(bad).write_bytes(b"no picture")
    results, reasons = until_error(
        task.predict(model, [good[0], bad, good[1]], out=None, bad=(told := Told()))
    )
    assert told.names == [bad]
    assert [reason.partition(": ")[2] for reason in reasons] == [
        "the image file is in no format that can be read"
    ]
    assert results == expected
