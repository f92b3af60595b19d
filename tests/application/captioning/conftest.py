"""Drawn scenes with captions, and a small BLIP of random weights that writes whole words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families.tokenizers import word_tokenizer
from PIL import Image
from torch import nn

import mmadapters
from mmadapters import MethodConfig, SeqBnConfig
from mmadapters.tasks.captioning.config import CaptioningConfig
from mmadapters.tasks.captioning.model import CaptioningModel
from mmadapters.tasks.captioning.task import CaptioningTask
from mmadapters.tasks.core.results import Scores
from mmadapters.tasks.data.examples import Collate, Examples
from mmadapters.tasks.data.synthetic import scenes
from mmadapters.tasks.training.evaluate import evaluate

VOCABULARY = 120
WIDTH = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "initializer_range": 0.05,
}
# The options of hf/blip-caption, in the ids of `word_tokenizer`.
SMALL = {
    "text_config": {
        **WIDTH,
        "encoder_hidden_size": 64,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 48,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "sep_token_id": 2,
    },
    "vision_config": {**WIDTH, "image_size": 64, "patch_size": 8},
}


class SceneRows:
    """A row for the scene of each seed, with one caption or several of them."""

    def __init__(self, seeds: Sequence[int], *, captions: int | None = None) -> None:
        drawn = [scenes.make_scene(seed, scenes.UNSEEN) for seed in seeds]
        images, _ = scenes.render(drawn, scenes.UNSEEN)
        self.columns: dict[str, list[Any]] = {
            "image": [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images],
            "things": [str(len(scene.things)) for scene in drawn],
        }
        if captions is None:
            self.columns["caption"] = [scenes.describe(s, scenes.UNSEEN) for s in drawn]
        else:
            self.columns["captions"] = [
                [scenes.describe(scene, scenes.UNSEEN, seed=seed) for seed in range(captions)]
                for scene in drawn
            ]

    @property
    def column_names(self) -> list[str]:
        return list(self.columns)

    def __len__(self) -> int:
        return len(self.columns["image"])

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self.columns[key]
        return {name: values[key] for name, values in self.columns.items()}


def scene_words() -> list[str]:
    """All words and signs in the captions of a thousand scenes, and in BLIP's prompt."""
    seeds = scenes.TASK_SEEDS[:1000]
    drawn = [scenes.describe(scenes.make_scene(s, scenes.UNSEEN), scenes.UNSEEN) for s in seeds]
    pieces = (re.findall(r"\w+|[^\w\s]", text) for text in [*drawn, "a picture of"])
    return sorted({word for some in pieces for word in some})


def job(folder: Path, **sections: Any) -> CaptioningConfig:
    given: dict[str, Any] = {
        "name": "scenes",
        "backbone": {"name": "hf/blip-caption", "options": SMALL, "processor": str(folder)},
        "data": {"source": "builtin/scenes"},
        "trainer": {"batch_size": 8, "device": "cpu", "tensorboard": False},
        "decoding": {"max_tokens": 24},
    }
    return CaptioningConfig.model_validate({**given, **sections})


def made(
    config: CaptioningConfig,
    rows: Any,
    *,
    method: MethodConfig | None = None,
    backbone: nn.Module | None = None,
) -> tuple[CaptioningTask, CaptioningModel]:
    """The task fitted to rows, and its model with an adapter that is trained."""
    torch.manual_seed(0)
    if backbone is None:
        backbone = mmadapters.load_backbone(config.backbone.name, **config.backbone.options)
    task = CaptioningTask(config)
    task.fit(rows, backbone)
    encoder = mmadapters.init(backbone)
    encoder.add_adapter(config.name, method or SeqBnConfig(size=8))
    encoder.train_adapter(config.name)
    return task, task.build(encoder)


Fluent = tuple[CaptioningTask, CaptioningModel]


def trained(
    task: CaptioningTask, model: CaptioningModel, rows: Any, *, steps: int, rate: float
) -> None:
    """A plain loop over all rows at once."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    examples = Examples(task, rows, train=True)
    model.train()
    for step in range(steps):
        batch = Collate(task)([examples[row, step] for row in range(len(rows))]).batch
        loss = model(**batch)["loss"]  # type: ignore[arg-type]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    model.eval()


def scores_of(task: CaptioningTask, model: CaptioningModel, rows: Any) -> Scores:
    return task.score(evaluate(task, model, rows, batch_size=8).records, bootstrap=0)


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = scene_words()
    assert len(found) + 5 <= VOCABULARY
    return word_tokenizer(tmp_path_factory.mktemp("words"), found)


@pytest.fixture(scope="session")
def one() -> SceneRows:
    """Eight scenes with a caption each."""
    return SceneRows(scenes.TASK_SEEDS[:8])


@pytest.fixture(scope="session")
def several() -> SceneRows:
    """Eight scenes with three captions each, of different lengths."""
    return SceneRows(scenes.TASK_SEEDS[:8], captions=3)


@pytest.fixture(scope="session")
def fluent(words: Path, one: SceneRows) -> Fluent:
    """A BLIP trained as a whole, from random weights, until it can tell eight scenes apart."""
    task, model = made(job(words), one)
    model.encoder.set_active_adapters(None)
    model.encoder.backbone.requires_grad_(True)
    before = scores_of(task, model, one)
    trained(task, model, one, steps=110, rate=3e-3)
    after = scores_of(task, model, one)
    assert after["CIDEr"].value > 10 * before["CIDEr"].value
    assert after["BLEU-4"].value > 0.9
    assert after["perplexity"].value < 0.05 * before["perplexity"].value
    return task, model
