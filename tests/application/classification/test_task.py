"""The classification task on drawn scenes, on pictures of noise and on recordings."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile
import torch
from application.endings import Told, until_error
from families import Family, families
from families.small import randomise
from PIL import Image
from torch.utils.data import DataLoader

import mmadapters
from mmadapters import SeqBnConfig, load_backbone
from mmadapters.tasks.classification.config import ClassificationConfig
from mmadapters.tasks.classification.model import Classifier
from mmadapters.tasks.classification.task import ClassificationTask
from mmadapters.tasks.config.schema import BackboneConfig
from mmadapters.tasks.core.errors import BadRow
from mmadapters.tasks.core.results import Figure, Table
from mmadapters.tasks.data.examples import Collate, Examples
from mmadapters.tasks.data.synthetic import scenes
from mmadapters.tasks.training.evaluate import evaluate, validated

COLOURS = ("blue", "green", "red")


def drawn(count: int, *, first: int = 0) -> datasets.Dataset:
    """Scenes of one thing each, with its colour as label and its size as group."""
    vocabulary = scenes.PRETRAINING
    rows = []
    seed = first
    while len(rows) < count:
        scene = scenes.make_scene(seed, vocabulary)
        seed += 1
        if len(scene.things) == 1 and scene.things[0].colour in COLOURS:
            pixels, _ = scenes.render([scene], vocabulary, size=64)
            picture = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
            data = io.BytesIO()
            picture.save(data, format="PNG")
            thing = scene.things[0]
            image = {"bytes": data.getvalue(), "path": f"{seed}.png"}
            rows.append({"image": image, "label": thing.colour, "size": thing.size})
    return datasets.Dataset.from_list(rows)


def config(**sections: Any) -> ClassificationConfig:
    sections = {
        "backbone": {"name": "nano/vit"},
        "data": {"source": "none"},
        "evaluation": {"groups": ["size"], "bootstrap": 50},
        **sections,
    }
    return ClassificationConfig.model_validate(sections)


def fitted(job: ClassificationConfig, rows: Any, backbone: Any = None) -> Any:
    backbone = load_backbone(job.backbone.name) if backbone is None else backbone
    task = ClassificationTask(job)
    task.fit(rows, backbone)
    encoder = mmadapters.init(backbone)
    encoder.add_adapter("a", SeqBnConfig(size=8))
    encoder.train_adapter("a")
    return task, task.build(encoder)


def train(task: ClassificationTask, model: Any, rows: Any, *, steps: int, rate: float) -> None:
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trainable, lr=rate)
    loader = DataLoader(
        Examples(task, rows, train=True), batch_size=16, shuffle=True, collate_fn=Collate(task)
    )
    model.train()
    done = 0
    while done < steps:
        for loaded in loader:
            optimiser.zero_grad()
            model(**loaded.batch)["loss"].backward()
            optimiser.step()
            done += 1


@pytest.fixture(scope="module")
def trained() -> Any:
    """A task and its model after a short training on scenes; other scenes, and their records."""
    torch.manual_seed(0)
    data = {"source": "none", "size": 32, "augment": {"crop": None, "hue": 0}}
    task, model = fitted(config(data=data, head={"pooling": "mean"}), drawn(64))
    train(task, model, drawn(64), steps=24, rate=3e-3)
    rows = drawn(60, first=150_000)
    return task, model, rows, evaluate(task, model, rows, batch_size=16).records


def test_a_short_training_tells_colours_apart(trained: Any) -> None:
    task, _, _, records = trained
    scores = task.score(records, bootstrap=100)
    accuracy = scores["accuracy"]
    assert scores.metrics[0] is accuracy
    assert accuracy.low is not None
    assert accuracy.low > 0.5  # a third by chance
    by_size = scores.groups["size"]
    assert sum(metrics[0].count for metrics in by_size.values()) == 60
    total = sum(metrics[0].value * metrics[0].count for metrics in by_size.values())
    assert total / 60 == pytest.approx(accuracy.value)
    classes, *mistakes = scores.tables
    assert [row[0] for row in classes.rows] == list(COLOURS)
    assert sum(row[2] for row in classes.rows) == 60
    wrong = sum(row[2] for table in mistakes for row in table.rows)
    assert wrong == round(60 * (1 - accuracy.value))


def test_the_report_shows_the_matrix_mistakes_and_right_answers(trained: Any) -> None:
    task, model, rows, records = trained
    found = task.illustrate(model, rows, records, count=6)
    assert [part.title for part in found] == [
        "Confusion matrix",
        "Most confident mistakes",
        "Right answers",
    ]
    for part in found:
        assert isinstance(part, Figure)
        assert Image.open(io.BytesIO(part.image)).format == "PNG"


def test_files_are_predicted_as_evaluation_predicts_them(trained: Any, tmp_path: Path) -> None:
    task, model, rows, records = trained
    names = []
    for index in (3, 0, 7):
        path = tmp_path / f"{index}.png"
        path.write_bytes(rows[index]["image"]["bytes"])
        names.append(str(path))
    found = list(task.predict(model, names, out=None))
    for index, name, result in zip((3, 0, 7), names, found, strict=True):
        probabilities = records[index]["probabilities"]
        assert result["input"] == name
        assert result["label"] == task.labels.names[probabilities.argmax()]
        assert result["probability"] == pytest.approx(probabilities.max(), abs=1e-4)
        assert [entry["label"] for entry in result["top"]] == [
            task.labels.names[c] for c in np.argsort(-probabilities)
        ]
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken\.png cannot be classified: "):
        list(task.predict(model, [str(broken)], out=None))


def test_a_task_built_again_from_its_state_predicts_the_same(trained: Any, tmp_path: Path) -> None:
    task, model, rows, records = trained
    model.encoder.save_adapter(tmp_path, "a", head=model.head)
    again = ClassificationTask(task.config, task.state)
    encoder = mmadapters.init(load_backbone("nano/vit"))
    encoder.load_adapter(tmp_path)
    encoder.set_active_adapters("a")
    other = again.build(encoder)
    other.head.load_state_dict(model.head.state_dict())
    found = evaluate(again, other, rows, batch_size=60).records
    for x, y in zip(found, records, strict=True):
        np.testing.assert_allclose(x["probabilities"], y["probabilities"], atol=1e-5)


def test_labels_are_those_of_the_training_rows_alone() -> None:
    rows = drawn(40)
    known = rows.filter(lambda row: row["label"] != "red")
    task, model = fitted(config(), known)
    assert task.labels.names == ("blue", "green")
    assert sum(task.state["counts"]) == len(known)
    found = evaluate(task, model, rows, batch_size=8)
    assert len(found.records) == len(known)
    assert len(found.problems) == 40 - len(known)
    assert all("'red' is not a class of" in problem.reason for problem in found.problems)


def test_rows_that_cannot_be_used_say_why() -> None:
    task, _ = fitted(config(), drawn(12))
    row = drawn(1)[0]
    for wrong, reason in (
        ({"image": None}, "it has no image"),
        ({"image": {"bytes": b"GIF89a", "path": None}}, "."),
        ({"label": None}, "it has no label"),
        ({"label": "mauve"}, "'mauve' is not a class of"),
    ):
        with pytest.raises(BadRow, match=reason):
            task.example({**row, **wrong}, train=False)


def test_jobs_that_cannot_be_are_refused() -> None:
    backbone = load_backbone("nano/vit")
    with pytest.raises(ValueError, match=r"there is none: name it in data.splits"):
        ClassificationTask(config()).fit(None, backbone)
    rows = datasets.Dataset.from_dict({"label": ["a", "b"], "picture": [1, 2]})
    with pytest.raises(ValueError, match=r"no column image, only label, picture; .* data\.kind"):
        ClassificationTask(config()).fit(rows, backbone)
    task = ClassificationTask(config(loss={"class_weights": {"gren": 2.0}}))
    with pytest.raises(ValueError, match="'gren', no class; did you mean 'green'"):
        task.fit(drawn(12), backbone)
    average = families()["timm-siglip"].build()
    with pytest.raises(ValueError, match=r"has no class token: set head.pooling"):
        fitted(config(head={"pooling": "cls"}, data={"source": "", "size": 32}), drawn(9), average)


@pytest.mark.parametrize(
    "head",
    [
        {},
        {"pooling": "mean"},
        {"pooling": "cls", "kind": "mlp"},
        {"pooling": "attention"},
        {"layers": "all"},
        {"layers": "all", "pooling": "attention"},
    ],
)
def test_a_picture_alone_gets_what_it_gets_in_a_batch(head: dict[str, Any]) -> None:
    rows = drawn(9)
    task, model = fitted(config(head=head), rows)
    randomise(model.encoder.adapters)
    together = evaluate(task, model, rows, batch_size=9).records
    alone = evaluate(task, model, rows, batch_size=1).records
    for x, y in zip(together, alone, strict=True):
        np.testing.assert_allclose(x["probabilities"], y["probabilities"], atol=1e-5)


def test_the_image_size_of_the_config_is_what_the_encoder_sees() -> None:
    task, model = fitted(config(data={"source": "none", "size": [96, 48]}), drawn(9))
    batch = task.collate([task.example(drawn(1)[0], train=train) for train in (False, True)])
    assert batch["pixels"].shape == (2, 3, 96, 48)
    assert model(**batch)["logits"].shape == (2, 3)


def test_losses_are_those_of_the_formulas() -> None:
    job = config(loss={"label_smoothing": 0.1, "class_weights": {"green": 3.0}})
    _, model = fitted(job, drawn(12))
    logits, targets = torch.randn(5, 3), torch.tensor([0, 1, 1, 2, 0])
    weights = torch.tensor([1.0, 3.0, 1.0])
    smooth = torch.full((5, 3), 0.1 / 3)
    smooth[torch.arange(5), targets] += 0.9
    each = -(smooth * weights * logits.log_softmax(dim=1)).sum(dim=1)
    expected = each.sum() / weights[targets].sum()
    torch.testing.assert_close(model.loss(logits, targets), expected)


def several(count: int) -> datasets.Dataset:
    """Pictures whose red and green may be bright: labels red, green, both or none."""
    rng = np.random.default_rng(0)
    bright = rng.integers(2, size=(count, 2))
    rows = []
    for red, green in bright:
        pixels = rng.integers(0, 100, (64, 64, 3))
        pixels[..., 0] += 150 * red
        pixels[..., 1] += 150 * green
        data = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(data, format="PNG")
        labels = [name for name, there in (("red", red), ("green", green)) if there]
        rows.append({"image": {"bytes": data.getvalue(), "path": None}, "label": labels})
    return datasets.Dataset.from_list(rows)


def test_several_labels_train_and_are_scored_and_shown() -> None:
    job = config(
        data={
            "source": "none",
            "multi_label": True,
            "size": 32,
            "augment": {"brightness": 0, "contrast": 0},
        },
        evaluation={"bootstrap": 20},
        loss={"class_weights": "balanced", "label_smoothing": 0.05},
    )
    rows = several(64)
    task, model = fitted(job, rows)
    assert task.metric == "mAP"
    assert ClassificationTask.metric == "accuracy"
    train(task, model, rows, steps=12, rate=3e-3)
    records = evaluate(task, model, rows, batch_size=32).records
    scores = task.score(records, bootstrap=20)
    assert scores.metrics[0].name == "mAP"
    assert scores["mAP"].value > 0.9
    assert scores["micro F1"].value > 0.8
    (table,) = scores.tables
    assert [row[0] for row in table.rows] == ["green", "red"]
    shown = task.illustrate(model, rows, records, count=4)
    assert shown
    assert all(isinstance(part, Figure) for part in shown)
    logits = torch.randn(3, 2)
    targets = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    soft = targets * 0.95 + 0.025
    weight = model.weights
    each = -(weight * soft * logits.sigmoid().log() + (1 - soft) * (1 - logits.sigmoid()).log())
    torch.testing.assert_close(model.loss(logits, targets), each.mean())


def test_predictions_with_several_labels_name_those_above_the_threshold(tmp_path: Path) -> None:
    job = config(data={"source": "none", "multi_label": True}, threshold=0.4)
    task, model = fitted(job, several(8))
    path = tmp_path / "a.png"
    path.write_bytes(several(1)[0]["image"]["bytes"])
    (found,) = task.predict(model, [str(path)], out=None)
    above = {entry["label"] for entry in found["top"] if entry["probability"] >= 0.4}
    assert set(found["labels"]) == above


def test_a_task_goes_to_worker_processes_after_it_was_used() -> None:
    task, _ = fitted(config(), drawn(9))
    task.example(drawn(1)[0], train=True)
    again = pickle.loads(pickle.dumps(task))
    assert torch.equal(
        again.example(drawn(1)[0], train=False)["pixels"],
        task.example(drawn(1)[0], train=False)["pixels"],
    )


# Recordings

SPEECH = {
    name: family
    for name, family in families().items()
    if name.startswith(("hf-wav2vec2", "hf-hubert", "hf-wavlm", "hf-whisper", "torchaudio"))
}


def tones(count: int, *, rate: int = 16_000) -> datasets.Dataset:
    """Sounds of 0.1 to 0.2 s, high or low."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        high = bool(rng.integers(2))
        time = np.arange(int(rate * rng.uniform(0.1, 0.2))) / rate
        samples = 0.5 * np.sin(2 * np.pi * (1500 if high else 200) * time)
        data = io.BytesIO()
        soundfile.write(data, samples + rng.normal(0, 0.01, len(time)), rate, format="WAV")
        audio = {"bytes": data.getvalue(), "path": f"tone{len(rows)}.wav"}
        rows.append({"audio": audio, "label": "high" if high else "low"})
    return datasets.Dataset.from_list(rows)


@pytest.mark.parametrize("layers", ["last", "all"])
@pytest.mark.parametrize("pooling", ["mean", "attention"])
@pytest.mark.parametrize("family", SPEECH.values(), ids=SPEECH)
def test_a_recording_alone_gets_what_it_gets_in_a_padded_batch(
    family: Family, pooling: str, layers: str
) -> None:
    rows = tones(5)
    task, model = fitted(
        config(
            backbone={"name": "hf/wav2vec2"},
            head={"pooling": pooling, "layers": layers},
            evaluation={"bootstrap": 0},
        ),
        rows,
        family.build(),
    )
    assert task.kind == "audio"
    randomise(model.head)
    randomise(model.encoder.adapters, std=0.1)
    model.eval()
    examples = [task.example(row, train=False) for row in rows]
    with torch.no_grad():
        together = model(**task.collate(examples))["logits"]
        alone = torch.cat([model(**task.collate([example]))["logits"] for example in examples])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=2e-5)
    assert (alone[:1] - alone[1:]).abs().max() > 1e-3


def test_recordings_train_and_are_scored_listed_and_predicted(tmp_path: Path) -> None:
    job = config(
        backbone={"name": "nano/wav2vec2"},
        evaluation={"bootstrap": 20},
        data={"source": "none", "augment_audio": {"gain": 3, "shift": 0.1, "noise": [20, 40]}},
    )
    rows = tones(24)
    task, model = fitted(job, rows)
    train(task, model, rows, steps=8, rate=3e-3)
    records = evaluate(task, model, rows, batch_size=8).records
    assert task.score(records, bootstrap=20)["accuracy"].value > 0.9
    shown = task.illustrate(model, rows, records, count=4)
    table = shown[-1]
    assert isinstance(table, Table)
    assert table.rows[0][0].startswith("tone")
    path = tmp_path / "sound.wav"
    path.write_bytes(rows[0]["audio"]["bytes"])
    (found,) = task.predict(model, [str(path)], out=None)
    assert found["label"] == task.labels.names[records[0]["probabilities"].argmax()]
    assert found["probability"] == pytest.approx(records[0]["probabilities"].max(), abs=1e-4)


def test_lengths_are_read_from_headers_at_the_encoders_rate() -> None:
    rows = tones(4, rate=8000)
    task, _ = fitted(config(backbone={"name": "nano/wav2vec2"}), rows)
    read = [len(task.example(row, train=False)["wave"]) for row in rows]
    assert task.lengths(rows) == read
    broken = {"bytes": b"nothing", "path": None}
    again = datasets.Dataset.from_list([{"audio": broken, "label": "low"}])
    assert task.lengths(again) == [0]


def test_recordings_too_short_for_a_frame_are_bad_rows_and_long_ones_are_cut() -> None:
    job = config(backbone={"name": "nano/wav2vec2"}, data={"source": "none", "max_seconds": 0.1})
    task, _ = fitted(job, tones(6))
    assert task.state["preprocessing"]["least"] == 400
    short = {"audio": {"array": np.ones(399, np.float32), "sampling_rate": 16_000}, "label": "low"}
    with pytest.raises(BadRow, match="it lasts 25 ms; the encoder needs 25 ms for one frame"):
        task.example(short, train=False)
    assert len(task.example(tones(1)[0], train=False)["wave"]) == 1600


def test_whisper_gets_no_more_than_it_takes() -> None:
    backbone = families()["hf-whisper"].build()
    task, model = fitted(config(backbone={"name": "hf/whisper-encoder"}), tones(6), backbone)
    longest = task.state["preprocessing"]["longest"]
    long = {
        "audio": {"array": np.random.rand(2 * longest), "sampling_rate": 16_000},
        "label": "low",
    }
    batch = task.collate([task.example(long, train=True)])
    assert batch["waves"].shape == (1, longest)
    assert torch.isfinite(model(**batch)["loss"])


# What is trained

TRAINED = {
    name: family
    for name, family in families().items()
    if name.startswith(
        ("timm", "hf-vit", "hf-d", "hf-beit", "hf-clip", "hf-siglip", "open_clip", "hf-blip")
    )
    and "text" not in name.removesuffix("custom_text")
} | SPEECH


@pytest.mark.parametrize("family", TRAINED.values(), ids=TRAINED)
def test_exactly_adapter_and_head_are_trained(family: Family) -> None:
    speech = family.name in SPEECH
    rows = tones(4) if speech else several(4)
    labels = ["a", "b", "a", "b"]
    rows = rows.remove_columns("label").add_column("label", labels)
    backbone = family.build()
    size = {"size": 160 if "timm_tower" in family.name else 32}
    libraries = {"timm": "timm/x", "open_clip": "open_clip/x"}
    usual = "hf/wav2vec2" if speech else "hf/vit"
    library = usual if speech else libraries.get(family.name.split("-")[0], usual)
    job = config(
        backbone={"name": library},
        data={"source": "none", **({} if speech else size)},
        evaluation={"groups": []},
    )
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    tower = "audio" if speech else "vision"
    task = ClassificationTask(job)
    task.fit(rows, backbone)
    encoder = mmadapters.init(backbone)
    encoder.add_adapter("a", SeqBnConfig(size=16, sites=(tower,)))
    encoder.train_adapter("a")
    model = task.build(encoder)
    own = {id(p) for p in (*encoder.adapters.parameters(), *model.head.parameters())}
    wanted = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in wanted} == own
    start = [p.detach().clone() for p in wanted]
    optimiser = torch.optim.SGD(wanted, lr=0.1)
    model.train()
    for _ in range(2):  # an adapter starts with one of its maps at zero: its other learns later
        batch = task.collate([task.example(row, train=True) for row in rows])
        optimiser.zero_grad()
        model(**batch)["loss"].backward()
        optimiser.step()
    assert all(not torch.equal(p, old) for p, old in zip(wanted, start, strict=True))
    after = backbone.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("backbone", "data", "kind"),
    [
        ("timm/vit_tiny_patch16_224", {}, "image"),
        ("nano/wav2vec2", {}, "audio"),
        ("hf/facebook/hubert-base-ls960", {}, "audio"),
        ("torchaudio/WAVLM_BASE", {}, "audio"),
        ("hf/own/model", {"columns": {"audio": "file_name"}}, "audio"),
        ("hf/own/model", {"kind": "audio"}, "audio"),
        ("nano/wav2vec2", {"kind": "image"}, "image"),
    ],
)
def test_what_is_classified_decides_which_columns_are_read(
    backbone: str, data: dict[str, Any], kind: str
) -> None:
    task = ClassificationTask(config(backbone={"name": backbone}, data={"source": "", **data}))
    assert task.kind == kind
    # Recordings may have offsets and durations beside them.
    assert {n for n, column in task.columns.items() if column.required} == {kind, "label"}


def test_doctor_sees_how_often_each_class_is_there() -> None:
    task, _ = fitted(config(), drawn(30))
    rows = datasets.Dataset.from_dict({"label": ["red", "red", "blue", None, "mauve"]})
    (table,) = task.survey(rows)
    assert table.rows == [["blue", 1, 20.0], ["green", 0, 0.0], ["red", 2, 40.0]]


def test_a_job_says_what_its_parts_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"metric 'mAP' does not exist without data.multi_label"):
        config(metric="mAP")
    with pytest.raises(ValueError, match="layers: all sums states of patches or frames"):
        config(head={"layers": "all", "pooling": "cls"})
    with pytest.raises(ValueError, match="the smaller one first"):
        config(data={"source": "", "augment": {"crop": [1.0, 0.5]}})
    assert config(metric="macro F1").deciding_metric == "macro F1"
    assert BackboneConfig(name="nano/vit").pretrained is False
    assert isinstance(fitted(config(), drawn(9))[1], Classifier)


def test_a_bad_picture_does_not_end_the_others(tmp_path: Path) -> None:
    rows = drawn(9)
    task, model = fitted(config(), rows)
    good = [tmp_path / f"{number}.png" for number in range(2)]
    for path, row in zip(good, rows, strict=False):
        path.write_bytes(row["image"]["bytes"])
    expected = list(task.predict(model, [str(path) for path in good], out=None))
    names = [str(tmp_path / "gone.png"), str(good[0]), str(tmp_path), str(good[1])]
    results, reasons = until_error(task.predict(model, names, out=None, bad=(told := Told())))
    assert told.names == [names[0], names[2]]
    assert [result["label"] for result in results] == [result["label"] for result in expected]
    assert len(reasons) == 2
    assert "no such file" in reasons[0]
    assert "Is a directory" in reasons[1]


@pytest.mark.parametrize("name", ["accuracy", "balanced accuracy", "macro F1", "loss"])
def test_the_config_chooses_what_decides(name: str) -> None:
    task = ClassificationTask(config(evaluation={"deciding": name}))
    assert task.deciding == name
    assert task.metric == ("accuracy" if name == "loss" else name)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"evaluation": {"deciding": "WER"}}, "deciding"),
        ({"evaluation": {"deciding": "mAP"}}, "'mAP' does not exist without data.multi_label"),
        (
            {"evaluation": {"deciding": "accuracy"}, "metric": "macro F1"},
            "metric is macro F1 and evaluation.deciding is accuracy: keep one",
        ),
    ],
)
def test_no_other_figure_decides(sections: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config(**sections)


def test_the_loss_of_validation_rows_is_that_of_pictures_as_they_are() -> None:
    rows = drawn(10)
    task, model = fitted(config(evaluation={"deciding": "loss"}, trainer={"batch_size": 4}), rows)
    with torch.no_grad():
        batch = task.collate([task.example(row, train=False) for row in rows])
        expected = model.eval()(**batch)["loss"].item()
    scores = validated(task, model, rows)
    assert scores["loss"].value == pytest.approx(expected, rel=1e-4)
    assert scores["loss"].count == 10
    assert not scores["loss"].greater_is_better
