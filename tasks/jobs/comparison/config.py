"""What a config of `mmadapters compare` may say, and the jobs that it speaks of.

    YAML -> `ComparisonConfig` -> one `JobConfig` for each method

Nothing here imports torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, field_validator, model_validator

from ...config.file import read_as, read_config
from ...config.schema import JobConfig, Section

NAME = re.compile(r"\w[\w+@ .-]*", re.ASCII)
# What must be the same for all methods, or they are not compared on one job and one budget.
_SHARED = ("data", "backbone", "evaluation", "seed", "augment", "transforms")
_BUDGET = ("epochs", "max_steps", "batch_size", "accumulation", "evaluate_every", "early_stopping")


class ComparisonConfig(Section):
    name: str = "comparison"
    """Of the run."""
    output: str = "runs/${name}"
    """The run directory; every training has a folder in it."""
    job: str
    """What all are trained for: a config of `mmadapters train`, a file or one that ships."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Changes to the job, for all alike, by dotted keys or in sections (trainer.epochs: 3)."""
    methods: dict[str, dict[str, Any]]
    """Changes that make each method of the job, by its name in the table, for instance
    {LoRA: {adapter: {method: lora, rank: 8}}}. Neither data nor budget may change."""
    references: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """The same for what is trained and shown but has no bottleneck of its size beside it:
    {head only: {trainer.mode: head}}."""
    baseline: dict[str, Any] = Field(default_factory=lambda: {"method": "double_seq_bn"})
    """The `adapter` section of the plain bottleneck, without its size: for each method it gets the
    size with which as many parameters are trained."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Every method and bottleneck is trained once with each."""
    learning_rates: tuple[float, ...] = ()
    """Tried with the first seed for every method and bottleneck; the one that is best on the
    validation split is kept. By default the job's own."""
    timed_steps: int = Field(default=10, ge=1)
    """Training steps whose median is shown, those of a method and of its bottleneck in turns."""

    @field_validator("methods", "references")
    @classmethod
    def _named(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name in value:
            if not NAME.fullmatch(name):
                raise ValueError(
                    f"{name!r} cannot name a folder: use letters, digits, spaces and + @ . - _"
                )
        return value

    @field_validator("seeds")
    @classmethod
    def _several(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(value) < 2 or len(set(value)) < len(value):
            raise ValueError("give at least two different seeds: one says nothing of their spread")
        return value

    @field_validator("learning_rates")
    @classmethod
    def _positive(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(rate <= 0 for rate in value) or len(set(value)) < len(value):
            raise ValueError("give different numbers above 0")
        return value

    @model_validator(mode="after")
    def _fits(self) -> ComparisonConfig:
        if not self.methods:
            raise ValueError("methods is empty: name at least one method to compare")
        if both := self.methods.keys() & self.references.keys():
            raise ValueError(f"{min(both)!r} is both a method and a reference: call one otherwise")
        for key in ("size", "reduction_factor"):
            if key in self.baseline:
                raise ValueError(
                    f"baseline has a {key}, but the bottleneck's size follows from each method's "
                    "parameters: take it out"
                )
        return self


def read_comparison(name_or_path: str, overrides: Sequence[str] = ()) -> ComparisonConfig:
    """The config of a YAML file, or of a name that ships with the package.

    Raises:
        ValueError: everything that is wrong, as `read_config` tells it.
    """
    return read_as(ComparisonConfig, name_or_path, overrides)


def read_contenders(config: ComparisonConfig) -> dict[str, JobConfig]:
    """The job of every method and reference, by name.

    Raises:
        ValueError: a job's config is wrong, or a method changes what all must share.
    """
    plain = make_job(config, {}, "job")
    found = {}
    for name, changes in {**config.methods, **config.references}.items():
        section = "methods" if name in config.methods else "references"
        try:
            job = make_job(config, changes, name)
        except ValueError as error:
            raise ValueError(f"{section}.{name}: {error}") from None
        own, shared = job.model_dump(mode="json"), plain.model_dump(mode="json")
        changed = [key for key in _SHARED if own.get(key) != shared.get(key)]
        changed += [
            f"trainer.{key}" for key in _BUDGET if own["trainer"][key] != shared["trainer"][key]
        ]
        if changed:
            raise ValueError(
                f"{section}.{name} changes {changed[0]}, and all are compared on one job and one "
                "budget: change it under overrides"
            )
        found[name] = job
    return found


def make_job(config: ComparisonConfig, changes: Mapping[str, Any], name: str) -> JobConfig:
    """The job with these changes.

    Raises:
        ValueError: as `read_config`.
    """
    given = {
        **{"trainer.tensorboard": False, "evaluation.pictures": 0, "evaluation.before": False},
        **config.overrides,
        **changes,
        **{"name": name, "output": f"{config.output}/{name}"},
    }
    return read_config(config.job, [f"{k}={json.dumps(v)}" for k, v in given.items()])
