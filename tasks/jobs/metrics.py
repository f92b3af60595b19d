"""The contents of `metrics.json`: the figures of a run, and the environment of the measurement."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Sequence
from typing import Any

import torch

from ..core.device import default_device
from ..core.machine import processor, versions
from ..core.metrics import Metric
from ..core.results import Scores
from ..reports.results import Run

NAMED = 1000  # the most bad rows of a split that are listed with their reasons
_PACKAGES = (
    *("mmadapters", "torch", "transformers", "timm", "open_clip_torch", "torchaudio"),
    *("accelerate", "datasets", "torchvision"),
)


def metrics_of(run: Run) -> dict[str, Any]:
    """Returns the contents of the `metrics.json` of a run."""
    config = run.task.config
    return {
        "task": config.task,
        "name": config.name,
        "mode": config.trainer.mode,
        "backbone": config.backbone.name,
        "seed": config.seed,
        **run.facts,
        "splits": {name: figures(scores) for name, scores in run.scores.items()},
        "before": None if run.before is None else figures(run.before),
        **({"fusion_attention": run.attention} if run.attention else {}),
        "skipped": {split: len(problems) for split, problems in run.problems.items()},
        "bad_rows": {
            split: [[problem.index, problem.reason] for problem in problems[:NAMED]]
            for split, problems in run.problems.items()
            if problems
        },
        "findings": [dataclasses.asdict(finding) for finding in run.findings],
        "log": run.history,
        "environment": environment(),
    }


def figures(scores: Scores) -> dict[str, Any]:
    """Returns the metrics of a split by name, in total and by group, JSON-ready."""
    return {
        "metrics": _named(scores.metrics),
        "groups": {
            column: {value: _named(metrics) for value, metrics in values.items()}
            for column, values in scores.groups.items()
        },
    }


def _named(metrics: Sequence[Metric]) -> dict[str, dict[str, Any]]:
    return {metric.name: metric.to_dict() for metric in metrics}


def environment() -> dict[str, Any]:
    """Returns machine, threads and versions, JSON-ready."""
    device = default_device()
    name = torch.cuda.get_device_name() if device == "cuda" else device
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": name,
        "packages": versions(_PACKAGES),
    }
