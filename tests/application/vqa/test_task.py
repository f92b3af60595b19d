"""VQA from rows to scores, pictures and predictions, on nano/clip and on a small BLIP."""

from __future__ import annotations

import copy
import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from application.endings import Told, until_error
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

import mmadapters
from mmadapters import LoRAConfig
from mmadapters.tasks.core.errors import BadRow
from mmadapters.tasks.core.model import TaskModel
from mmadapters.tasks.core.results import Figure
from mmadapters.tasks.data.batches import EpochBatches
from mmadapters.tasks.data.examples import Collate, Examples
from mmadapters.tasks.training.evaluate import evaluate
from mmadapters.tasks.vqa.blip import BlipVQA
from mmadapters.tasks.vqa.pictures import in_turn
from mmadapters.tasks.vqa.task import VQATask, image_key

from .conftest import Squares, blip_backbone, blip_job, fake_records, job, made

KINDS = ("fusion", "bilinear", "coattention")


def trained(task: VQATask, model: TaskModel, rows: Any, *, steps: int, rate: float) -> list[float]:
    """The losses of a plain loop."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    loader = DataLoader(
        Examples(task, rows, train=True), batch_size=8, shuffle=True, collate_fn=Collate(task)
    )
    losses: list[float] = []
    model.train()
    while len(losses) < steps:
        for loaded in loader:
            loss = model(**loaded.batch)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    model.eval()
    return losses[:steps]


def records_of(task: VQATask, model: TaskModel, rows: Any, size: int = 6) -> list[dict[str, Any]]:
    return evaluate(task, model, rows, batch_size=size).records


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    names = [[answer for answer, _ in record["best"]] for record in (one, other)]
    shares = [[share for _, share in record["best"]] for record in (one, other)]
    return names[0] == names[1] and np.allclose(*shares, atol=1e-5)


@pytest.fixture(scope="module")
def fusion(squares: Squares) -> tuple[VQATask, TaskModel]:
    """Trained for a moment on nano/clip with adapters in both towers."""
    task, model = made(job(head={"width": 64}), squares)
    before = task.score(records_of(task, model, squares), bootstrap=0)["accuracy"].value
    losses = trained(task, model, squares, steps=45, rate=5e-3)
    after = task.score(records_of(task, model, squares), bootstrap=0)["accuracy"].value
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    assert after > max(before, 0.75)
    return task, model


@pytest.fixture(scope="module")
def records(fusion: tuple[VQATask, TaskModel], squares: Squares) -> list[dict[str, Any]]:
    return records_of(*fusion, squares)


@pytest.fixture(scope="module")
def ranking(opinions: Squares, words: Path) -> tuple[VQATask, TaskModel]:
    """A small BLIP that ranks seven of the answers, trained for a moment."""
    task, model = made(blip_job(words, blip={"candidates": 7}), opinions, blip_backbone())
    before = task.score(records_of(task, model, opinions), bootstrap=0)["accuracy"].value
    trained(task, model, opinions, steps=120, rate=1e-2)
    # Not of losses: people who disagree and smoothed labels leave a loss of their own.
    after = task.score(records_of(task, model, opinions), bootstrap=0)["accuracy"].value
    assert after > max(before, 0.75)
    return task, model


def test_state_is_json_and_enough_to_answer_again(
    fusion: tuple[VQATask, TaskModel], records: list[dict], squares: Squares
) -> None:
    task, model = fusion
    again = VQATask(task.config, json.loads(json.dumps(task.state)))
    encoder = mmadapters.init(mmadapters.load_backbone("nano/clip"))
    encoder.add_adapter("squares", model.encoder.adapter("squares").config)
    encoder.adapter("squares").load_state_dict(model.encoder.adapter("squares").state_dict())
    encoder.set_active_adapters("squares")
    other = again.build(encoder).eval()
    other.head.load_state_dict(model.head.state_dict())
    for one, two in zip(records, records_of(again, other, squares), strict=True):
        assert same(one, two)


def test_vocabulary_is_of_the_training_answers_alone(fusion: tuple[VQATask, TaskModel]) -> None:
    state = fusion[0].state
    assert state["answers"][:2] == ["no", "yes"]
    assert set(state["answers"]) == {"yes", "no", "red", "green", "blue", "left", "right"}
    assert state["official"] is state["several"] is False
    assert state["preprocessing"]["resize"] == "squash"


def test_unknown_answers_are_wrong_and_counted_and_none_is_dropped(
    fusion: tuple[VQATask, TaskModel], squares: Squares
) -> None:
    task, model = fusion
    rows = copy.copy(squares)
    answers = ["purple" if answer == "red" else answer for answer in squares["answer"]]
    rows.columns = {**squares.columns, "answer": answers}
    scores = task.score(records_of(task, model, rows), bootstrap=0)
    assert scores["accuracy"].count == len(squares)
    assert scores["within reach"].value == pytest.approx(1 - answers.count("purple") / len(rows))
    assert scores.groups["answer"]["purple"][0].value == 0
    assert [p.reason for p in task.check(rows)] == [
        "the answer 'purple' is not among the 7 of the vocabulary"
    ] * answers.count("purple")


def test_answers_with_a_share_are_scored_by_kind_of_question(
    fusion: tuple[VQATask, TaskModel], records: list[dict]
) -> None:
    scores = fusion[0].score(records, bootstrap=50)
    assert scores.metrics[0].name == fusion[0].metric
    assert set(scores.groups["question_type"]) == {"colour", "place", "presence"}
    assert scores["accuracy"].low is not None
    assert scores["most common answer"].value == pytest.approx(0.25)
    for record in records:
        assert record["best"][0] == (record["prediction"], record["probability"])
        assert len(record["best"]) == 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("several", [False, True])
def test_a_record_is_the_same_whatever_its_batch(
    kind: str, several: bool, squares: Squares, opinions: Squares
) -> None:
    rows = opinions if several else squares
    task, model = made(job(head={"kind": kind, "width": 32}), rows)
    torch.nn.init.normal_(next(iter(model.encoder.adapter("squares").parameters())))
    model.eval()
    together = records_of(task, model, rows, size=24)
    examples = Examples(task, rows, train=False)
    for number in range(0, 24, 5):
        loaded = Collate(task)([examples[number]])
        with torch.no_grad():
            (alone,) = task.records(model, loaded.batch)
        assert same(alone, together[number])
        assert alone["image"] == together[number]["image"]


def test_nano_clip_of_both_libraries_answers_the_same(squares: Squares) -> None:
    found = []
    for options in ({}, {"library": "hf"}):
        config = job(
            backbone={"name": "nano/clip", "options": options},
            head={"kind": "coattention", "width": 32},
        )
        task, model = made(config, squares)
        found.append(records_of(task, model.eval(), squares, size=24))
    assert all(same(one, two) for one, two in zip(*found, strict=True))


def test_a_batch_reads_every_image_and_every_text_once(
    fusion: tuple[VQATask, TaskModel], squares: Squares
) -> None:
    task, _ = fusion
    examples = [Examples(task, squares, train=True)[n] for n in (5, 0, 1, 4, 8)]
    batch = Collate(task)(examples).batch
    assert batch is not None
    assert len(batch["pixels"]) == 3
    assert batch["image_of"].tolist() == [0, 1, 1, 0, 2]
    assert batch["text_of"].tolist() == [0, 1, 0, 1, 1]
    for place, number in enumerate((5, 0, 1, 4, 8)):
        alone = task.example(squares[number], train=True)
        assert torch.equal(batch["pixels"][batch["image_of"][place]], alone["pixels"])
        assert torch.equal(batch["tokens"][batch["text_of"][place]], alone["tokens"])
        assert torch.equal(batch["targets"][place], alone["targets"])


def test_questions_about_one_image_share_a_training_batch(
    fusion: tuple[VQATask, TaskModel], squares: Squares
) -> None:
    groups = fusion[0].groups(squares)
    assert groups == [n // 4 for n in range(24)]
    batches = EpochBatches(24, 8, seed=0, groups=groups)
    orders = []
    for epoch in range(2):
        batches.set_epoch(epoch)
        rows = [[row for row, _ in batch] for batch in batches]
        assert sorted(row for batch in rows for row in batch) == list(range(24))
        assert all(len({groups[row] for row in batch}) == 2 for batch in rows)
        orders.append(rows)
    assert orders[0] != orders[1]


def test_images_are_known_by_id_path_or_content(squares: Squares, tmp_path: Path) -> None:
    path = squares["image"][0]
    data = Path(path).read_bytes()
    assert image_key(path) == image_key({"bytes": None, "path": path}) == path
    key = image_key({"bytes": data, "path": "a.png"})
    assert key == image_key({"bytes": data, "path": None}) != image_key({"bytes": data[:-1]})
    picture = Image.open(path)
    assert image_key(picture) == image_key(picture.copy()) != image_key(picture.rotate(90))
    task = VQATask(job())

    class Bytes:
        column_names = ("image",)

        def __getitem__(self, key: Any) -> Any:
            return {"image": {"bytes": data, "path": "a.png"}}

    assert task.groups(Bytes()) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"question": "  "}, "no question"),
        ({"question": None}, "no question"),
        ({"question": 3}, "3 is no question"),
        ({"answer": None}, "no answer"),
        ({"image": "nowhere.png"}, "nowhere.png"),
        ({"image": None}, "image"),
    ],
)
def test_bad_rows_say_what_is_wrong(
    fusion: tuple[VQATask, TaskModel], squares: Squares, change: dict, reason: str
) -> None:
    with pytest.raises(BadRow, match=reason):
        fusion[0].example({**squares[0], **change}, train=True)


def test_predictions_are_of_pairs_of_an_image_and_a_question(
    fusion: tuple[VQATask, TaskModel], squares: Squares, records: list[dict]
) -> None:
    task, model = fusion
    inputs = [f"{squares['image'][n]}::{squares['question'][n]}" for n in (0, 5, 6)]
    found = list(task.predict(model, inputs, out=None))
    json.dumps(found)
    for result, number in zip(found, (0, 5, 6), strict=True):
        assert result["image"] == squares["image"][number]
        assert result["question"] == squares["question"][number]
        assert result["answer"] == records[number]["prediction"]
        assert result["probability"] == pytest.approx(records[number]["probability"], abs=1e-5)
        assert result["best"][0]["answer"] == result["answer"]


@pytest.mark.parametrize("text", ["a.png", "a.png::", "::what?", "a.png: what?"])
def test_inputs_that_are_no_pair_are_refused(fusion: tuple[VQATask, TaskModel], text: str) -> None:
    with pytest.raises(ValueError, match=r"is no pair .* photo\.jpg::"):
        list(fusion[0].predict(fusion[1], [text], out=None))


def test_an_input_without_a_file_is_named(fusion: tuple[VQATask, TaskModel]) -> None:
    with pytest.raises(ValueError, match=r"^gone\.png::what\?"):
        list(fusion[0].predict(fusion[1], ["gone.png::what?"], out=None))


def test_pictures_show_the_surest_mistakes_and_right_answers(
    fusion: tuple[VQATask, TaskModel], squares: Squares, records: list[dict]
) -> None:
    task, model = fusion
    wrong = [{**record, "answers": ["nothing"]} for record in records[:12]]
    found = task.illustrate(model, squares, [*wrong, *records[12:]], count=6)
    assert [figure.title for figure in found] == ["Surest wrong answers", "Right answers"]
    for figure in found:
        assert isinstance(figure, Figure)
        image = np.asarray(Image.open(io.BytesIO(figure.image)).convert("RGB"))
        assert len(np.unique(image.reshape(-1, 3), axis=0)) > 50
    assert task.illustrate(model, squares, records, count=0) == []


def test_right_answers_come_from_all_kinds_of_questions_in_turn() -> None:
    pairs = [("a", ["a"]), ("a", ["a"]), ("a", ["a"]), ("b", ["b"])]
    kinds = ["x", "x", "y", "x"]
    found = in_turn(fake_records(pairs, question_type=kinds))
    assert [record["index"] for record in found] == [0, 2, 3, 1]


def test_several_answers_are_soft_targets_by_the_official_rules(opinions: Squares) -> None:
    task, model = made(job(), opinions)
    assert task.state["official"] is task.state["several"] is True
    assert model.binary  # type: ignore[union-attr]
    example = task.example(opinions[1], train=True)
    names = task.state["answers"]
    assert {
        names[n]: round(float(example["targets"][n]), 3) for n in example["targets"].nonzero()
    } == {
        "left": 1.0,
        "red": 0.9,
    }


def test_answers_missing_from_the_data_are_told(squares: Squares) -> None:
    backbone = mmadapters.load_backbone("nano/clip")
    rows = copy.copy(squares)
    rows.columns = {k: v for k, v in squares.columns.items() if k != "answer"}
    with pytest.raises(ValueError, match=r"column of answers: name it in data\.columns"):
        VQATask(job()).fit(rows, backbone)
    rows.columns["answer"] = [None] * 24
    with pytest.raises(ValueError, match="no row of the training split has an answer"):
        VQATask(job()).fit(rows, backbone)
    with pytest.raises(ValueError, match="no training answers to choose from"):
        VQATask(job()).fit(None, backbone)


def test_heads_of_the_other_encoder_are_refused(squares: Squares, words: Path) -> None:
    with pytest.raises(ValueError, match=r"head\.kind ranking is not for CLIP"):
        made(job(head={"kind": "ranking"}), squares)
    with pytest.raises(ValueError, match=r"head\.kind fusion is not for BLIP"):
        made(blip_job(words, head={"kind": "fusion"}), squares, blip_backbone())


def test_long_questions_are_cut_and_named(squares: Squares) -> None:
    task, _ = made(job(data={"source": "squares", "question_length": 8}), squares)
    assert task.asked(squares["image"][0], "what " * 60)["tokens"].shape == (8,)
    problems = task.check(squares)
    assert problems
    assert all("is cut to the 8 that are read" in problem.reason for problem in problems)


def test_survey_counts_answers(fusion: tuple[VQATask, TaskModel], squares: Squares) -> None:
    (table,) = fusion[0].survey(squares)
    assert dict(row[:2] for row in table.rows)["yes"] == 6
    assert sum(row[1] for row in table.rows) == 24


def test_task_and_model_can_be_pickled(
    fusion: tuple[VQATask, TaskModel], records: list[dict], squares: Squares
) -> None:
    task, model = pickle.loads(pickle.dumps(fusion))
    assert same(records_of(task, model, squares)[3], records[3])


def test_blip_learns_answers_of_several_people(
    ranking: tuple[VQATask, TaskModel], opinions: Squares
) -> None:
    task, model = ranking
    scores = task.score(records_of(task, model, opinions), bootstrap=0)
    assert scores["accuracy"].value > scores["most common answer"].value + 0.1


def test_blips_loss_weighs_the_answers_by_how_many_gave_them(
    opinions: Squares, words: Path
) -> None:
    config = blip_job(words, blip={"label_smoothing": 0.0})
    task, model = made(config, opinions, blip_backbone())
    assert isinstance(model, BlipVQA)
    batch = Collate(task)([Examples(task, opinions, train=True)[n] for n in (0, 5)]).batch
    assert batch is not None
    assert batch["question_of"].tolist() == [0, 1, 1]  # red is also what the others say
    torch.testing.assert_close(batch["weights"], torch.tensor([1.0, 0.7, 0.3]))
    model.eval()
    expected = 0.0
    for number in (0, 5):
        for answer in opinions["answers"][number]:
            row = {**opinions[number], "answers": [answer]}
            alone = task.collate([task.example(row, train=True)])
            expected += float(model(**alone)["loss"]) / 10 / 2
    assert float(model(**batch)["loss"]) == pytest.approx(expected, rel=1e-4)


def test_blip_trains_its_adapter_alone(opinions: Squares, words: Path) -> None:
    method = LoRAConfig(rank=2, targets=("q", "v"))
    task, model = made(blip_job(words), opinions, blip_backbone(), method=method)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(name.startswith("encoder.adapters.") for name in trainable)
    before = {name: p.clone() for name, p in model.encoder.backbone.named_parameters()}
    trained(task, model, opinions, steps=2, rate=1e-2)
    assert all(torch.equal(before[n], p) for n, p in model.encoder.backbone.named_parameters())


def test_blips_last_layers_are_trained_as_a_copy(opinions: Squares, words: Path) -> None:
    config = blip_job(words, blip={"train_lm_head": True}, trainer={"mode": "head"})
    task, model = made(config, opinions, blip_backbone())
    assert isinstance(model, BlipVQA)
    model.encoder.adapters.requires_grad_(False)
    plain = made(blip_job(words), opinions, blip_backbone())
    start = records_of(task, model.eval(), opinions)
    for one, two in zip(start, records_of(plain[0], plain[1].eval(), opinions), strict=True):
        assert same(one, two)
    state = model.head.state_dict()
    pointers = [tensor.data_ptr() for tensor in state.values()]
    assert len(set(pointers)) == len(pointers)  # safetensors refuses shared ones
    losses = trained(task, model, opinions, steps=20, rate=1e-2)
    assert losses[-1] < 0.7 * losses[0]
    assert not same(start[0], records_of(task, model, opinions)[0])
    with pytest.raises(ValueError, match="would train nothing"):
        made(blip_job(words, trainer={"mode": "head"}), opinions, blip_backbone())


@pytest.mark.parametrize("kind", ["ranking", "generation"])
def test_blips_record_is_the_same_whatever_its_batch(
    kind: str, ranking: tuple[VQATask, TaskModel], opinions: Squares
) -> None:
    """Questions of different lengths: the shorter ones are padded."""
    task = VQATask(ranking[0].config, {**ranking[0].state, "head": kind})
    model = ranking[1]
    together = records_of(task, model, opinions, size=24)
    lengths = {len(task.asked(*pair)["tokens"]) for pair in pairs(opinions)}
    assert len(lengths) > 1
    for number in (0, 1, 6, 11, 15):
        loaded = Collate(task)([Examples(task, opinions, train=False)[number]])
        with torch.no_grad():
            (alone,) = task.records(model, loaded.batch)
        assert same(alone, together[number])


def pairs(rows: Squares) -> list[tuple[str, str]]:
    return list(zip(rows["image"], rows["question"], strict=True))


def test_generated_answers_are_written_by_the_decoder(
    ranking: tuple[VQATask, TaskModel], opinions: Squares
) -> None:
    task = VQATask(ranking[0].config, {**ranking[0].state, "head": "generation"})
    records = records_of(task, ranking[1], opinions)
    assert {record["prediction"] for record in records} & set(task.state["answers"])
    assert all(0 < record["probability"] <= 1 for record in records)
    assert len(records[0]["best"]) == 1
    assert [m.name for m in task.score(records, bootstrap=0).metrics] == [
        "accuracy",
        "most common answer",
    ]


def test_blip_generates_without_any_training_answers(squares: Squares, words: Path) -> None:
    task = VQATask(blip_job(words, head={"kind": "generation"}))
    backbone = blip_backbone()
    task.fit(None, backbone)
    model = task.build(mmadapters.init(backbone)).eval()
    records = records_of(task, model, squares)
    assert [m.name for m in task.score(records, bootstrap=0).metrics] == ["accuracy"]


def test_blips_questions_are_padded_with_its_own_token(
    ranking: tuple[VQATask, TaskModel], opinions: Squares
) -> None:
    task, _ = ranking
    batch = Collate(task)([Examples(task, opinions, train=True)[n] for n in range(4)]).batch
    assert batch is not None
    tokens: Tensor = batch["tokens"]
    assert (tokens == task.state["text"]["pad"]).any()
    assert (tokens[:, 0] == 3).all()
    assert (batch["answers"][:, 0] == task.state["text"]["start"]).all()


def test_a_bad_input_does_not_end_the_others(
    fusion: tuple[VQATask, TaskModel], squares: Squares
) -> None:
    task, model = fusion
    good = f"{squares['image'][0]}::{squares['question'][0]}"
    results, reasons = until_error(
        task.predict(model, ["a.png", good, "gone.png::what?"], out=None, bad=(told := Told()))
    )
    assert told.names == ["a.png", "gone.png::what?"]
    assert [result["image"] for result in results] == [squares["image"][0]]
    assert "is no pair" in reasons[0]
    assert reasons[1] == "gone.png::what?: no such file: gone.png"


def test_accuracy_or_the_loss_decides() -> None:
    from mmadapters.tasks.vqa.config import VQAEvaluationConfig

    assert VQAEvaluationConfig().deciding == "accuracy"
    assert VQAEvaluationConfig(deciding="loss").deciding == "loss"
    with pytest.raises(ValueError, match="'accuracy' or 'loss'"):
        VQAEvaluationConfig(deciding="within reach")
