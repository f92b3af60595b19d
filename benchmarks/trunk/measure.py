"""Times training steps with and without cached states of the frozen trunk, and prints a table.

    python benchmarks/trunk/measure.py [vision] [speech]

It measures ViT-S/16 (timm, 224 pixels, batches of 16 JPEG pictures) and an encoder of the size of
wav2vec 2.0 base (transformers, batches of 4 recordings of 10 s) with random weights, on a GPU in
bf16. A step reads its batch, runs forward and backward and updates. Every round takes one step of
each case, so that other work of the machine slows all cases alike. Figures are medians over the
rounds; ratios are relative to full fine-tuning.
"""

from __future__ import annotations

import io
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import soundfile
import torch
from PIL import Image

from mmadapters.tasks.asr.config import ASRConfig
from mmadapters.tasks.classification.config import ClassificationConfig
from mmadapters.tasks.config.schema import JobConfig
from mmadapters.tasks.jobs.model import make_model
from mmadapters.tasks.training.cache.cache import prepare
from mmadapters.tasks.training.trainer import TaskTrainer

ROUNDS = 7
STILL = {"crop": None, "horizontal_flip": 0, "brightness": 0, "contrast": 0, "saturation": 0}
Make = Callable[..., JobConfig]


def pictures() -> datasets.Dataset:
    """Returns 32 labelled JPEG pictures of 500 x 375 pixels."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(32):
        pixels = rng.integers(256, size=(24, 32, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).resize((500, 375), Image.Resampling.BICUBIC).save(buffer, "JPEG")
        image = {"bytes": buffer.getvalue(), "path": None}
        rows.append({"image": image, "label": "ab"[number % 2]})
    return datasets.Dataset.from_list(rows)


def recordings() -> datasets.Dataset:
    """Returns 8 recordings of about 10 s at 16 kHz with a transcript each."""
    rows = []
    for number in range(8):
        noise = 0.1 * np.random.default_rng(number).standard_normal(160_000 - 800 * number)
        buffer = io.BytesIO()
        soundfile.write(buffer, noise, 16_000, format="FLAC")
        rows.append({"audio": {"bytes": buffer.getvalue(), "path": None}, "text": "some words"})
    return datasets.Dataset.from_list(rows)


def vision(**sections: Any) -> JobConfig:
    """Returns a job that classifies pictures; `sections` are added to its config."""
    return ClassificationConfig(
        task="classification",
        backbone={"name": "timm/vit_small_patch16_224"},
        data={"source": "none", "augment": STILL},
        **with_trainer(16, sections),
    )


def speech(**sections: Any) -> JobConfig:
    """Returns a job that transcribes recordings; `sections` are added to its config."""
    options = {"mask_time_prob": 0.0, "layerdrop": 0.0}
    return ASRConfig(
        task="asr",
        backbone={"name": "hf/wav2vec2", "options": options},
        data={"source": "none"},
        **with_trainer(4, sections),
    )


def with_trainer(batch: int, sections: dict[str, Any]) -> dict[str, Any]:
    """Returns the sections with a trainer's options for batches of `batch` records."""
    trainer = {"batch_size": batch, "epochs": 1000, "tensorboard": False}
    trainer["precision"] = "bf16" if torch.cuda.is_available() else "fp32"
    return {**sections, "trainer": {**trainer, **sections.get("trainer", {})}}


def cases(make: Make, tower: str) -> dict[str, JobConfig]:
    """Returns the jobs by name: full fine-tuning, and adapters in the upper half and a head alone,
    each with and without kept states."""
    upper = {"method": "double_seq_bn", "sites": [f"{tower}.blocks.[6-9]", f"{tower}.blocks.1[01]"]}
    jobs = {"full fine-tuning": make(trainer={"mode": "full", "cache_trunk": "off"})}
    for kept, name in (("off", ""), ("memory", ", kept states")):
        jobs[f"upper half{name}"] = make(adapter=upper, trainer={"cache_trunk": kept})
        jobs[f"head alone{name}"] = make(trainer={"mode": "head", "cache_trunk": kept})
    return jobs


def steps(config: JobConfig, rows: Any, folder: Path) -> Iterator[None]:
    """Runs one training step after the other, without end."""
    task, model = make_model(config, rows)
    trainer = TaskTrainer(task, model, train=rows, validation=None, folder=folder, quiet=True)
    model.to(trainer.args.device)
    trainer.cache = prepare(task, model, rows, None, passes=1000, evaluations=0, quiet=True)
    loader, optimizer = trainer.get_train_dataloader(), trainer.create_optimizer()
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    model.train()
    while True:
        parts, _ = trainer.get_batch_samples(batches, 1, trainer.args.device)
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, trainer._prepare_inputs(parts[0]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        yield


def measured(make: Make, tower: str, rows: Any) -> dict[str, float]:
    """Returns the median seconds of a step by case."""
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            name: steps(config, rows, Path(folder) / str(number))
            for number, (name, config) in enumerate(cases(make, tower).items())
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(ROUNDS + 1):
            for name, run in runs.items():
                started = time.perf_counter()
                next(run)
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


ENCODERS: dict[str, tuple[Make, str, Callable[[], Any]]] = {
    "vision": (vision, "vision", pictures),
    "speech": (speech, "audio", recordings),
}


def main(names: list[str]) -> None:
    """Measures the named encoders, or all of them, and prints a table for each."""
    for name in names or list(ENCODERS):
        make, tower, rows = ENCODERS[name]
        medians = measured(make, tower, rows())
        full = medians["full fine-tuning"]
        print(f"\n| {name} | ms a step | of full fine-tuning |\n|---|---|---|")
        for case, seconds in medians.items():
            print(f"| {case} | {1000 * seconds:,.0f} | {seconds / full:.3f} |")


if __name__ == "__main__":
    main(sys.argv[1:])
