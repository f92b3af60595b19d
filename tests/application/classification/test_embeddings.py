"""Classifiers by class names and by few pictures, on nano/clip and drawn scenes of one thing."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

import mmadapters
from mmadapters import load_backbone
from mmadapters.tasks import artifact
from mmadapters.tasks.classification import few_shot
from mmadapters.tasks.classification.config import ClassificationConfig
from mmadapters.tasks.classification.embedding_heads import TipAdapterHead, ZeroShotHead
from mmadapters.tasks.classification.embeddings import EmbeddingClassifier
from mmadapters.tasks.classification.labels import LabelMap
from mmadapters.tasks.classification.task import ClassificationTask
from mmadapters.tasks.config.file import read_config
from mmadapters.tasks.data.load import load_splits
from mmadapters.tasks.jobs.model import build_model, make_encoder, make_model
from mmadapters.tasks.jobs.run import train_model
from mmadapters.tasks.registry import task_class
from mmadapters.tasks.training.evaluate import evaluate
from mmadapters.zoo import load_tokenizer

from .test_task import COLOURS, drawn

TEMPLATES = ("a photo of a {} thing", "{}")
PLAIN = {"crop": None, "horizontal_flip": 0, "brightness": 0, "contrast": 0, "saturation": 0}


def job(folder: Path | None = None, **sections: Any) -> ClassificationConfig:
    head = {"kind": "zero_shot", "templates": list(TEMPLATES), **sections.pop("head", {})}
    data = {"source": "none", "augment": PLAIN, **sections.pop("data", {})}
    trainer = {"device": "cpu", "tensorboard": False, "batch_size": 8, "epochs": 3}
    return ClassificationConfig.model_validate(
        {
            "name": "few",
            "backbone": {"name": "nano/clip"},
            "evaluation": {"bootstrap": 0, "pictures": 0},
            "output": str(folder or "none"),
            "data": data,
            "head": head,
            "trainer": {**trainer, **sections.pop("trainer", {})},
            **sections,
        }
    )


def tip(folder: Path | None = None, *, data: Any = None, **head: Any) -> ClassificationConfig:
    return job(
        folder,
        head={"kind": "tip_adapter", "shots": 4, **head},
        trainer={"mode": "head", "learning_rate": 1e-2},
        data=data or {},
    )


@pytest.fixture(scope="module")
def splits() -> dict[Any, Any]:
    return {
        "train": drawn(18),
        "validation": drawn(12, first=50_000),
        "test": drawn(15, first=150_000),
    }


def task_and_model(config: ClassificationConfig, rows: Any) -> tuple[Any, Any]:
    task = ClassificationTask(config)
    backbone = load_backbone("nano/clip")
    task.fit(rows, backbone)
    return task, build_model(task, make_encoder(backbone))


@torch.no_grad()
def unit_features(model: EmbeddingClassifier, task: ClassificationTask, rows: Any) -> Tensor:
    """(N, E), row by row."""
    pixels = [task.example(rows[index], train=False)["pixels"] for index in range(len(rows))]
    with model.encoder.using(None):
        return F.normalize(model.encoder.encode_image(torch.stack(pixels)), dim=-1)


@torch.no_grad()
def of_names(names: Any = COLOURS) -> np.ndarray:
    """(C, E) class by class and text by text, by nano/clip itself."""
    clip: Any = load_backbone("nano/clip")
    tokenize = load_tokenizer("nano/clip")
    found = []
    for name in names:
        texts = [template.format(name) for template in TEMPLATES]
        each = clip.encode_text(tokenize(texts)).numpy()
        mean = (each / np.linalg.norm(each, axis=1, keepdims=True)).mean(axis=0)
        found.append(mean / np.linalg.norm(mean))
    return np.stack(found)


def probabilities(task: ClassificationTask, model: Any, rows: Any) -> np.ndarray:
    records = evaluate(task, model, rows, batch_size=8).records
    return np.stack([record["probabilities"] for record in records])


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def test_zero_shot_is_the_softmax_of_scaled_cosines_to_the_names(splits: dict) -> None:
    task, model = task_and_model(job(trainer={"mode": "none"}), splits["train"])
    f = unit_features(model, task, splits["test"]).numpy()
    clip: Any = model.encoder.backbone
    scale = min(float(clip.logit_scale.exp()), 100)
    expected = softmax(scale * f @ of_names().T)
    np.testing.assert_allclose(probabilities(task, model, splits["test"]), expected, atol=1e-4)


def test_names_that_are_no_words_are_replaced_and_underscores_are_spaces() -> None:
    rows = drawn(6).map(lambda row: {"label": f"the_{row['label']}"})
    labels = sorted(set(rows["label"]))
    config = job(head={"class_names": {labels[0]: "crimson"}}, trainer={"mode": "none"})
    _, model = task_and_model(config, rows)
    assert model.names == ("crimson", *(label.replace("_", " ") for label in labels[1:]))
    np.testing.assert_allclose(model.text_weights(), of_names(model.names), atol=1e-5)


@pytest.mark.parametrize("towers", [("vision",), ("vision", "text")])
def test_names_are_read_once_unless_something_in_the_text_tower_learns(
    splits: dict, towers: tuple[str, ...]
) -> None:
    config = job(adapter={"method": "lora", "rank": 2, "sites": list(towers)})
    task, model = task_and_model(config, splits["train"])
    calls: list[int] = []
    model.encoder.backbone.ln_final.register_forward_hook(lambda *_: calls.append(1))
    examples = [task.example(splits["train"][index], train=True) for index in range(4)]
    batch = task.collate(examples)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(parameters, lr=0.5)
    for _ in range(3):
        optimiser.zero_grad()
        model(**batch)["loss"].backward()
        optimiser.step()
    learns = "text" in towers
    assert len(calls) == (3 if learns else 1)
    reached = {
        site.split(".")[0]
        for site, module in model.encoder.adapter("few").entries()
        if any(p.grad is not None and p.grad.ne(0).any() for p in module.parameters())
    }
    assert reached == set(towers)
    model.eval()
    with torch.no_grad():
        for _ in range(2):
            model.logits(pixels=batch["pixels"])
    assert len(calls) == (4 if learns else 1)
    moved = np.abs(model.head.weight.numpy() - of_names()).max()
    assert bool(moved > 1e-5) is learns


def numpy_logits(head: TipAdapterHead, features: np.ndarray) -> np.ndarray:
    """Sample by sample and key by key, in float64."""
    w, keys = (t.detach().double().numpy() for t in (head.weight, head.keys))
    logits = np.zeros((len(features), len(w)))
    for n, raw in enumerate(features.astype(float)):
        f = raw / np.sqrt((raw**2).sum())
        for c in range(len(w)):
            logits[n, c] = float(head.scale) * (f @ w[c])
        for k, key in enumerate(keys):
            near = np.exp(-float(head.beta) * (1 - f @ key))
            logits[n, int(head.owners[k])] += float(head.alpha) * near
    return logits


def random_head(*, finetune: bool = False, seed: int = 0) -> TipAdapterHead:
    """Of 4 classes, 11 keys and 6 numbers."""
    generator = torch.Generator().manual_seed(seed)
    head = TipAdapterHead(6, 4, scale=torch.tensor(3.0), keys=20, finetune=finetune)
    head.weight.copy_(F.normalize(torch.randn(4, 6, generator=generator), dim=1))
    keys = 3 * torch.randn(11, 6, generator=generator)
    head.fill(keys, torch.randint(4, (11,), generator=generator))
    return head


def test_logits_of_a_cache_are_the_sum_over_keys_and_names() -> None:
    head = random_head()
    head.alpha.fill_(1.7)
    head.beta.fill_(2.3)
    features = 5 * torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
    np.testing.assert_allclose(head(features), numpy_logits(head, features.numpy()), atol=1e-5)
    norms = head.keys.detach().norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(11))


def test_keys_have_the_gradient_of_the_formula_only_where_they_are_trained() -> None:
    head = random_head(finetune=True).double()
    head.alpha.fill_(1.7)
    features = torch.randn(5, 6, generator=torch.Generator().manual_seed(1)).double()

    def logits(keys: Tensor) -> Tensor:
        return torch.func.functional_call(head, {"keys": keys}, (features,))

    assert torch.autograd.gradcheck(logits, (head.keys.detach().requires_grad_(),))
    assert not random_head().keys.requires_grad


def test_search_takes_the_best_of_the_grid_and_of_equal_ones_the_smaller() -> None:
    alphas, betas = (0.1, 0.8, 2.0, 2.5), (0.5, 1.0, 4.0)
    for seed in range(6):
        head = random_head(seed=seed)
        generator = torch.Generator().manual_seed(seed)
        features = torch.randn(30, 6, generator=generator)
        truth = torch.randint(4, (30,), generator=generator)
        best = (-1.0, 0.0, 0.0)
        for alpha, beta in itertools.product(alphas, betas):
            head.alpha.fill_(alpha)
            head.beta.fill_(beta)
            guesses = numpy_logits(head, features.numpy()).argmax(axis=1)
            accuracy = float((guesses == truth.numpy()).mean())
            if accuracy > best[0]:
                best = (accuracy, alpha, beta)
        found = few_shot.search(head, features, truth, alphas=alphas, betas=betas)
        assert found == (best[1], best[2], pytest.approx(best[0]))


def test_grid_is_that_of_the_authors_code() -> None:
    assert len(few_shot.ALPHAS) == 20
    assert len(few_shot.BETAS) == 200
    assert (few_shot.ALPHAS[0], few_shot.BETAS[0]) == (0.1, 0.1)
    assert few_shot.ALPHAS[-1] == pytest.approx(3 - 2.9 / 20)
    assert few_shot.BETAS[-1] == pytest.approx(7 - 6.9 / 200)


def test_shots_are_drawn_of_each_class_with_the_seed() -> None:
    labels = ["a"] * 9 + ["b"] * 3 + [None] + ["c"] * 6
    rows = datasets.Dataset.from_dict({"label": labels})
    names = LabelMap(("a", "b", "c"))
    chosen = few_shot.drawn(rows, names, 4, seed=1)
    assert chosen == sorted(chosen)
    assert [labels[index] for index in chosen] == ["a"] * 4 + ["b"] * 3 + ["c"] * 4
    assert chosen == few_shot.drawn(rows, names, 4, seed=1)
    assert chosen != few_shot.drawn(rows, names, 4, seed=2)


def test_training_free_cache_is_made_in_no_step_and_searched_on_validation_alone(
    splits: dict, tmp_path: Path
) -> None:
    task, model = task_and_model(tip(tmp_path / "a"), splits["train"])
    run = train_model(task, model, splits, quiet=True)
    assert "steps" not in run.facts
    chosen = few_shot.drawn(splits["train"], task.labels, 4, seed=0)
    keys = unit_features(model, task, splits["train"].select(chosen))
    torch.testing.assert_close(model.head.keys.data, keys, atol=1e-5, rtol=0)
    told = run.facts["tip_adapter"]
    assert told["keys"] == len(chosen)
    assert told["alpha"] == pytest.approx(float(model.head.alpha))
    validation = float(run.scores["validation"]["accuracy"].value)
    assert told["validation_accuracy"] == pytest.approx(validation)
    # Whatever the test split is, or whether there is one, the same is found.
    without = {name: rows for name, rows in splits.items() if name != "test"}
    task, model = task_and_model(tip(tmp_path / "b"), splits["train"])
    assert train_model(task, model, without, quiet=True).facts["tip_adapter"] == told


def test_trained_keys_are_no_worse_than_those_they_began_as(splits: dict, tmp_path: Path) -> None:
    losses, accuracies = [], []
    for finetune in (False, True):
        config = tip(tmp_path / str(finetune), finetune=finetune, alpha=1.0, beta=5.5)
        task, model = task_and_model(config, splits["train"])
        run = train_model(task, model, splits, quiet=True)
        guesses = probabilities(task, model, splits["train"])
        truth = [task.labels.indices(label)[0] for label in splits["train"]["label"]]
        losses.append(-np.log(guesses[np.arange(len(truth)), truth]).mean())
        accuracies.append(run.scores["test"]["accuracy"].value)
        assert run.facts["tip_adapter"]["alpha"] == 1.0
    assert run.facts["steps"] == 3 * (12 // 8)  # on the cache's pictures: 4 of each class
    assert losses[1] < losses[0]
    assert accuracies[1] >= accuracies[0]


@pytest.mark.parametrize("finetune", [False, True])
def test_saved_cache_predicts_the_same(finetune: bool, splits: dict, tmp_path: Path) -> None:
    config = tip(tmp_path / "run", finetune=finetune, alpha=1.2, beta=3.0)
    task, model = task_and_model(config, splits["train"])
    train_model(task, model, splits, quiet=True)
    opened = artifact.open_directory(tmp_path / "run", device="cpu")
    assert np.array_equal(
        probabilities(opened.task, opened.model, splits["test"]),
        probabilities(task, model, splits["test"]),
    )
    picture = tmp_path / "picture.png"
    picture.write_bytes(splits["test"][0]["image"]["bytes"])
    assert list(opened.task.predict(opened.model, [str(picture)], out=None)) == list(
        task.predict(model, [str(picture)], out=None)
    )


def test_clip_adapter_trains_before_the_names_and_begins_at_zero_shot(
    splits: dict, tmp_path: Path
) -> None:
    config = job(
        tmp_path / "run",
        adapter={"method": "clip_adapter"},
        trainer={"learning_rate": 1e-2, "epochs": 2},
        evaluation={"before": True, "bootstrap": 0, "pictures": 0},
    )
    task, model = task_and_model(config, splits["train"])
    plain = task_and_model(job(trainer={"mode": "none"}), splits["train"])
    zero_shot = plain[0].score(evaluate(*plain, splits["test"], batch_size=8).records, bootstrap=0)[
        "accuracy"
    ]
    run = train_model(task, model, splits, quiet=True)
    assert run.before is not None
    assert run.before["accuracy"].value == zero_shot.value
    assert run.facts["adapter_parameters"] == 2 * 128 * 32
    assert run.facts["head_parameters"] == 0
    opened = artifact.open_directory(tmp_path / "run", device="cpu")
    guesses = probabilities(opened.task, opened.model, splits["test"])
    assert np.array_equal(guesses, probabilities(task, model, splits["test"]))
    assert np.abs(guesses - probabilities(*plain, splits["test"])).max() > 1e-2


def test_cache_of_a_trained_adapter_holds_what_pictures_became(
    splits: dict, tmp_path: Path
) -> None:
    config = job(
        tmp_path / "run",
        head={"kind": "tip_adapter", "shots": 2, "alpha": 1.0, "beta": 5.5},
        adapter={"method": "clip_adapter"},
        trainer={"learning_rate": 1e-2, "epochs": 1},
    )
    task, model = task_and_model(config, splits["train"])
    train_model(task, model, splits, quiet=True)
    rows = splits["train"].select(few_shot.drawn(splits["train"], task.labels, 2, seed=0))
    pixels = [task.example(rows[index], train=False)["pixels"] for index in range(len(rows))]
    with torch.no_grad():
        own = F.normalize(model.encoder.encode_image(torch.stack(pixels)), dim=1)
    torch.testing.assert_close(model.head.keys.data, own, atol=1e-5, rtol=0)
    assert (own - unit_features(model, task, rows)).abs().max() > 1e-2


def test_keys_of_augmented_pictures_are_means_of_their_features(splits: dict) -> None:
    rows = splits["train"].select(range(4))
    flips = {"augment": {**PLAIN, "horizontal_flip": 1}}
    task, model = task_and_model(tip(data=flips), splits["train"])
    found, _ = few_shot.embedded(task, model, rows, epochs=3)
    with torch.no_grad():
        pixels = [task.example(rows[index], train=False)["pixels"].flip(-1) for index in range(4)]
        expected = model.encoder.encode_image(torch.stack(pixels))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    task, model = task_and_model(tip(data={"augment": {**PLAIN, "crop": [0.5, 1]}}), rows)
    one, other = (few_shot.embedded(task, model, rows, epochs=count)[0] for count in (1, 3))
    assert (one - other).abs().max() > 1e-2
    again, _ = few_shot.embedded(task, model, rows, epochs=3)
    assert torch.equal(other, again)


def test_pictures_that_cannot_be_read_are_left_out_of_the_cache(splits: dict) -> None:
    rows = splits["train"].select(range(6))
    broken = {"bytes": b"no picture", "path": "x.png"}
    torn = [{**row, "image": broken} if index == 2 else row for index, row in enumerate(rows)]
    task, model = task_and_model(tip(alpha=1.0, beta=1.0), rows)
    whole, labels = few_shot.embedded(task, model, rows)
    kept = torch.arange(6) != 2
    for epochs in (0, 2):
        found, targets = few_shot.embedded(
            task, model, datasets.Dataset.from_list(torn), epochs=epochs
        )
        torch.testing.assert_close(found, whole[kept], atol=1e-4, rtol=0)
        assert torch.equal(targets, labels[kept])


def test_nothing_to_search_on_is_said_before_anything_is_trained(
    splits: dict, tmp_path: Path
) -> None:
    task, model = task_and_model(tip(tmp_path, finetune=True, alpha=1.0), splits["train"])
    rows: Any = {"train": splits["train"], "test": splits["test"]}
    with pytest.raises(ValueError, match=r"searched on a validation split.*data.fractions"):
        train_model(task, model, rows, quiet=True)


def test_zero_shot_needs_no_training_rows_where_the_classes_are_given(splits: dict) -> None:
    config = job(trainer={"mode": "none"}, data={"labels": list(COLOURS)})
    task, model = task_and_model(config, None)
    other = task_and_model(job(trainer={"mode": "none"}), splits["train"])
    rows = splits["test"].select(range(4))
    assert np.array_equal(probabilities(task, model, rows), probabilities(*other, rows))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"head": {"pooling": "mean"}}, "pooling does nothing with kind zero_shot"),
        ({"head": {"kind": "linear"}}, "templates does nothing with kind linear"),
        ({"head": {"shots": 3}}, "shots does nothing with kind zero_shot, only with tip_adapter"),
        ({"head": {"templates": ["a photo"]}}, "one {} where the class stands"),
        ({"data": {"multi_label": True}}, "chooses one class for a picture"),
        ({"data": {"kind": "audio"}}, "chooses one class for a picture"),
        ({"data": {"size": 32}}, "reads pictures of the encoder's own size only"),
        ({"trainer": {"mode": "head"}}, "nothing to train with head.kind zero_shot: take none"),
        ({"head": {"kind": "tip_adapter"}, "trainer": {"mode": "none"}}, "take mode head for tip"),
        ({"head": {"kind": "tip_adapter", "finetune": True}}, "take trainer.mode head"),
        ({"data": {"shots": 3, "streaming": True}}, "shots are drawn from each class"),
    ],
)
def test_what_does_not_go_together_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        job(**sections)


def test_encoders_without_names_and_classes_that_are_not_there_are_refused() -> None:
    rows = drawn(4)
    with pytest.raises(ValueError, match=r"head.class_names has 'blu', no class; did you mean"):
        task_and_model(job(head={"class_names": {"blu": "azure"}}), rows)
    task = ClassificationTask(job(backbone={"name": "nano/vit"}))
    backbone = load_backbone("nano/vit")
    task.fit(rows, backbone)
    with pytest.raises(ValueError, match="is no image-text encoder with two towers; take nano/cl"):
        task.build(mmadapters.init(backbone))


def test_heads_that_read_tokens_refuse_adapters_behind_them() -> None:
    config = ClassificationConfig.model_validate(
        {
            "backbone": {"name": "nano/clip"},
            "data": {"source": "none"},
            "adapter": {"method": "clip_adapter"},
        }
    )
    with pytest.raises(ValueError, match=r"head.kind linear reads the tokens.*vision.embedding wo"):
        task_and_model(config, drawn(4))


def test_zero_shot_head_keeps_what_was_loaded() -> None:
    head = ZeroShotHead(3, 2, scale=torch.tensor(2.0))
    assert not head.current
    head.load_state_dict({"weight": torch.eye(3)[:2], "scale": torch.tensor(5.0)})
    assert head.current
    assert torch.equal(head(torch.tensor([[2.0, 0, 0]])), torch.tensor([[5.0, 0]]))


def test_linear_head_refuses_adapters_beside_the_image_tower() -> None:
    few = ["data.options={vocabulary: unseen, train: 12, validation: 4, test: 4}"]
    for more, message in (
        ([], r'sits in text of CLIP, which head.kind linear does not use: set .* to \["vision"\]'),
        (["adapter={method: clip_adapter}"], "would do nothing: compare embeddings"),
    ):
        config = read_config("classify_scenes", ["backbone.name=nano/clip", *few, *more])
        rows = load_splits(config.data, task_class(config.task)(config).columns)["train"]
        with pytest.raises(ValueError, match=message):
            make_model(config, rows)
