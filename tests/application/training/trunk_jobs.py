"""One small job of every task, and how it trains with and without kept states."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import soundfile
import torch
from application.captioning import conftest as captioning
from application.retrieval import conftest as retrieval
from application.segmentation import scenes as segmentation
from application.vqa import conftest as vqa
from families import blip
from families.tokenizers import word_tokenizer
from PIL import Image

from mmadapters import load_backbone
from mmadapters.tasks.asr.config import ASRConfig
from mmadapters.tasks.classification.config import ClassificationConfig
from mmadapters.tasks.config.schema import JobConfig
from mmadapters.tasks.data.synthetic import scenes
from mmadapters.tasks.jobs.model import build_model, make_encoder
from mmadapters.tasks.registry import task_class
from mmadapters.tasks.training.trainer import TaskTrainer

TRAINER = {
    **{"epochs": 2, "batch_size": 8, "log_every": 1, "device": "cpu", "tensorboard": False},
    **{"learning_rate": 1e-2, "cache_trunk": "memory"},
}


def upper(tower: str, blocks: str) -> dict[str, Any]:
    return {"method": "seq_bn", "size": 4, "sites": [f"{tower}.blocks.[{blocks}].*"]}


def picture(seed: int) -> dict[str, Any]:
    pixels = np.random.default_rng(seed).integers(256, size=(70, 60, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def sound(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    noise = 0.1 * rng.standard_normal(int(rng.integers(5000, 9000)))
    buffer = io.BytesIO()
    soundfile.write(buffer, noise, 16_000, format="FLAC")
    return {"bytes": buffer.getvalue(), "path": None}


def pictures(count: int = 20, first: int = 0) -> datasets.Dataset:
    return datasets.Dataset.from_list(
        [{"image": picture(i), "label": "ab"[i % 2]} for i in range(first, first + count)]
    )


def recordings(count: int = 20, first: int = 0) -> datasets.Dataset:
    return datasets.Dataset.from_list(
        [
            {"audio": sound(i), "label": "ab"[i % 2], "text": "ab ba"[: 2 + i % 3]}
            for i in range(first, first + count)
        ]
    )


PLAIN = {
    **{"crop": None, "horizontal_flip": 0.0, "vertical_flip": 0.0, "brightness": 0.0},
    **{"contrast": 0.0, "saturation": 0.0},
}
STILL = {
    **{"crop": 64, "scale": (1.0, 1.0), "cat_max_ratio": 1.0, "horizontal_flip": 0.0},
    **{"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0},
}


@dataclass(frozen=True)
class Job:
    """`make`: from a folder to config, training and validation rows. `backbone`: where the config's
    own is not small."""

    make: Callable[[Path], tuple[JobConfig, Any, Any]]
    backbone: Callable[[], torch.nn.Module] | None = None


def images(_: Path) -> tuple[JobConfig, Any, Any]:
    config = ClassificationConfig(
        task="classification",
        backbone={"name": "nano/vit"},
        adapter=upper("vision", "4-7"),
        data={"source": "none", "augment": PLAIN},
        head={"dropout": 0.1},
        trainer=TRAINER,
    )
    return config, pictures(), pictures(10, first=50)


def sounds(_: Path) -> tuple[JobConfig, Any, Any]:
    config = ClassificationConfig(
        task="classification",
        backbone={"name": "nano/wav2vec2"},
        adapter=upper("audio", "2-9"),
        data={"source": "none", "kind": "audio"},
        head={"layers": "all"},
        trainer=TRAINER,
    )
    return config, recordings(), recordings(10, first=50)


def speech(_: Path) -> tuple[JobConfig, Any, Any]:
    config = ASRConfig(
        task="asr",
        backbone={"name": "nano/wav2vec2"},
        adapter=upper("audio", "2-9"),
        data={"source": "none"},
        trainer=TRAINER,
    )
    return config, recordings(), recordings(10, first=50)


def segments(_: Path) -> tuple[JobConfig, Any, Any]:
    config = segmentation.job(
        backbone={"name": "nano/vit", "options": {}},
        adapter={"sites": ["vision.blocks.[4-7].*"]},
        transforms=STILL,
        trainer={**TRAINER, "eval_batch_size": 1},
    )
    rows = [segmentation._scene(np.random.default_rng(i), (48, 64)) for i in range(24)]
    table = [
        {"image": segmentation._png(image), "mask": segmentation._png(mask)} for image, mask in rows
    ]
    return config, datasets.Dataset.from_list(table[:16]), datasets.Dataset.from_list(table[16:])


def clip_questions(folder: Path) -> tuple[JobConfig, Any, Any]:
    config = vqa.job(
        adapter={"method": "seq_bn", "size": 4, "sites": ["vision.blocks.[4-7]", "text.blocks.3"]},
        trainer=TRAINER,
    )
    rows = vqa.Squares(folder)
    return config, rows, rows


def blip_questions(folder: Path) -> tuple[JobConfig, Any, Any]:
    tokenizer = word_tokenizer(folder / "words", vqa.WORDS)
    config = vqa.blip_job(
        tokenizer,
        adapter={"method": "seq_bn", "size": 4, "sites": ["vision.blocks.1", "text"]},
        trainer=TRAINER,
    )
    rows = vqa.Squares(folder)
    return config, rows, rows


def clip_pairs(_: Path) -> tuple[JobConfig, Any, Any]:
    config = retrieval.job(
        adapter={"method": "seq_bn", "size": 4, "sites": ["vision.blocks.[4-7]", "text.blocks.3"]},
        trainer=TRAINER,
    )
    return (
        config,
        retrieval.SceneRows(scenes.TASK_SEEDS[:20], scenes.UNSEEN),
        retrieval.SceneRows(scenes.TASK_SEEDS[20:32], scenes.UNSEEN, captions=2),
    )


def captions(folder: Path) -> tuple[JobConfig, Any, Any]:
    tokenizer = word_tokenizer(folder / "words", captioning.scene_words())
    config = captioning.job(
        tokenizer,
        adapter={"method": "seq_bn", "size": 4, "sites": ["vision.blocks.1", "decoder"]},
        trainer=TRAINER,
        decoding={"max_tokens": 6, "beams": 1},
    )
    return (
        config,
        captioning.SceneRows(scenes.TASK_SEEDS[:16]),
        captioning.SceneRows(scenes.TASK_SEEDS[16:24]),
    )


JOBS = {
    "images": Job(images),
    "sounds": Job(sounds),
    "speech": Job(speech),
    "segments": Job(segments),
    "clip-questions": Job(clip_questions),
    "blip-questions": Job(blip_questions, blip.hf_blip_vqa),
    "clip-pairs": Job(clip_pairs),
    "captions": Job(captions),
}


def changed(config: Any, **sections: Any) -> Any:
    """The config with other values of some sections."""
    data = config.model_dump()
    for name, values in sections.items():
        data[name] = {**data[name], **values} if isinstance(values, dict) else values
    return type(config).model_validate(data)


def trainer_of(
    config: JobConfig,
    train: Any,
    validation: Any,
    *,
    folder: Path,
    backbone: torch.nn.Module | None = None,
) -> TaskTrainer:
    torch.manual_seed(0)
    if backbone is None:
        backbone = load_backbone(config.backbone.name, **config.backbone.options)
    task = task_class(config.task)(config)
    task.fit(train, backbone)
    model = build_model(task, make_encoder(backbone))
    return TaskTrainer(task, model, train=train, validation=validation, folder=folder, quiet=True)


def fitted(
    name: str, folder: Path, *, data: tuple[JobConfig, Any, Any] | None = None, **trainer: Any
) -> tuple[TaskTrainer, dict[str, Any]]:
    """A job's trainer after its training, and what it told."""
    job = JOBS[name]
    folder.mkdir(exist_ok=True)
    config, train, validation = job.make(folder) if data is None else data
    training = trainer_of(
        changed(config, trainer=trainer),
        train,
        validation,
        folder=folder,
        backbone=None if job.backbone is None else job.backbone(),
    )
    return training, training.fit(None)


def figures(training: TaskTrainer) -> tuple[list[float], list[dict[str, float]]]:
    """The loss of every step, and the metrics of every evaluation."""
    history = training.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    metrics = [
        {n: v for n, v in entry.items() if n.startswith("eval_") and n != "eval_runtime"}
        for entry in history
        if any(n.startswith("eval_") for n in entry)
    ]
    return losses, metrics
