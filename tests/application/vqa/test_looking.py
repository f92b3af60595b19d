"""Questions read with their image: gated cross-attention in a small SigLIP's text tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import families
from torch import Tensor, nn

from mmadapters import GatedCrossAttentionConfig
from mmadapters.tasks.core.model import TaskModel
from mmadapters.tasks.core.rows import Batch
from mmadapters.tasks.vqa.task import VQATask

from .conftest import Squares, job, made
from .test_task import KINDS, records_of

METHOD = GatedCrossAttentionConfig(size=32, heads=2, feed_forward=1)
# Of 24 questions: 2 of 6 colours, 3 of 6 places and 8 of 12 yes or no are told without the image.
WITHOUT_IMAGE = 13 / 24


def small(words: Path, rows: Any, kind: str = "fusion") -> tuple[VQATask, TaskModel]:
    config = job(
        backbone={"name": "hf/siglip", "processor": str(words)},
        head={"kind": kind, "width": 32, "heads": 2},
    )
    return made(config, rows, families()["hf-siglip"].build(), method=METHOD)


def batch_of(task: VQATask, rows: Any) -> Batch:
    return task.collate([task.example(rows[index], train=True) for index in range(len(rows))])


def hide(head: nn.Module, args: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Takes the image from a head, so that it can be told by the text's state alone."""
    return torch.ones_like(args[0]), args[1]


@pytest.fixture(scope="module")
def blinded(squares: Squares, words: Path) -> tuple[VQATask, TaskModel]:
    """Trained with a head that sees no image."""
    torch.manual_seed(0)
    task, model = small(words, squares)
    model.head.register_forward_pre_hook(hide)
    batch = batch_of(task, squares)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(70):
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        optimizer.step()
    return task, model.eval()


def accuracy(task: VQATask, model: TaskModel, rows: Any) -> float:
    return task.score(records_of(task, model, rows), bootstrap=0)["accuracy"].value


def test_answers_are_learned_from_the_image_through_the_text_tower(
    blinded: tuple[VQATask, TaskModel], squares: Squares
) -> None:
    task, model = blinded
    assert accuracy(task, model, squares) > WITHOUT_IMAGE + 0.15
    with model.encoder.using(None):
        assert accuracy(task, model, squares) <= WITHOUT_IMAGE


@torch.no_grad()
def test_answer_is_to_the_questions_own_image(blinded: tuple[VQATask, TaskModel]) -> None:
    """Other pictures give other answers, and the order of the batch gives none."""
    task, model = blinded
    questions = ["what colour is the square?", "where is the square?"]
    batch = {
        "pixels": torch.randn(3, 3, 32, 32),
        "tokens": task.tokenizer(questions),
        "image_of": torch.tensor([0, 1, 2, 0]),
        "text_of": torch.tensor([0, 0, 1, 1]),
    }
    found = model(**batch)["logits"]
    turned = {**batch, "image_of": torch.tensor([2, 1, 0, 2]), "pixels": batch["pixels"].flip(0)}
    torch.testing.assert_close(model(**turned)["logits"], found)
    assert (found[0] - found[1]).abs().max() > 1e-2
    assert (found[2] - found[3]).abs().max() > 1e-2
    with model.encoder.using(None):
        alone = model(**batch)["logits"]
    torch.testing.assert_close(alone[0], alone[1])


@pytest.mark.parametrize("kind", KINDS)
def test_every_head_reads_the_question_with_its_image(
    kind: str, squares: Squares, words: Path
) -> None:
    task, model = small(words, squares, kind)
    with torch.no_grad():
        for parameter in model.encoder.adapters.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    batch = batch_of(task, squares)
    seen: list[Tensor] = []
    model.head.register_forward_pre_hook(lambda head, args: seen.append(args[1].detach()))
    model.eval()
    model(**batch)["loss"].backward()
    own = dict(model.encoder.adapters.named_parameters())
    assert all(bool(parameter.grad.any()) for parameter in own.values())  # type: ignore[union-attr]
    assert len(seen[0]) == len(squares)
    asked = squares["question"]
    same = [place for place, question in enumerate(asked) if question == asked[0]]
    first, second = seen[0][same[0]], seen[0][same[1]]
    assert (first - second).abs().max() > 1e-3
