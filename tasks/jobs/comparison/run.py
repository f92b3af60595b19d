"""Methods against the plain bottleneck of as many parameters, on one job, budget and encoder.

Every method is trained with several seeds, and so is, for each, a bottleneck whose size makes it
train as many parameters. What a difference's interval holds is in `difference`; step time and
memory are measured apart, a method and its bottleneck in turns, in `comparison_cost`.

config.yaml      the resolved config
comparison.json  figures with intervals, parameters, step times, memory, seeds and environment
comparison.md    the table as Markdown; comparison.png is its chart
report.html      both, on a page that opens offline
METHOD/          the run directory of every training, below its learning rate and seed
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mmadapters.files import write_text
from mmadapters.suggest import nearest

from ...config.schema import SPLITS, JobConfig, Split
from ...core.metrics import Metric, interval
from ...core.task import Rows
from ...data.load import load_splits
from ...registry import task_class
from ..run import (
    CONFIG,
    check_folder,
    environment,
    make_folder,
    make_model,
    measured_split,
    process_state,
    rows_to_fit,
    train_model,
)
from .config import ComparisonConfig, make_job, read_contenders
from .cost import Cost, costs

RESULT, CELL = "comparison.json", "cell.json"
Splits = dict[Split, Rows]
Verdict = Literal["better", "worse", "no difference"]


@dataclass(frozen=True)
class Cell:
    """One training: its metric on the test split, and on the validation split, by which learning
    rates are chosen."""

    test: Metric
    validation: float | None


@dataclass(frozen=True)
class Entrant:
    """A method, a reference or a bottleneck: what it trains, and how it did with each seed.

    `parameters`: all that is trained, the head's included; `rate`: the learning rate it got.
    """

    name: str
    parameters: int
    rate: float
    cells: tuple[Cell, ...]

    @functools.cached_property
    def metric(self) -> Metric:
        """The mean over seeds; its interval is of test examples and seeds together."""
        values = np.array([cell.test.value for cell in self.cells])
        found = _over_seeds(self.cells[0].test, values, _mean_samples(self.cells))
        if found.unit == "%" and found.low is not None:
            return replace(found, low=max(found.low, 0.0))
        return found


@dataclass(frozen=True)
class Duel:
    """A method, the bottleneck of its size, and what both cost."""

    method: Entrant
    bottleneck: Entrant
    cost: Cost
    bottleneck_cost: Cost

    @functools.cached_property
    def difference(self) -> Metric:
        return difference(self.method.cells, self.bottleneck.cells)

    @property
    def verdict(self) -> Verdict:
        """Whether the interval of the difference leaves zero out."""
        found = self.difference
        if found.low is None or found.high is None or found.low <= 0 <= found.high:
            return "no difference"
        return "better" if (found.low > 0) is found.greater_is_better else "worse"


@dataclass
class Comparison:
    """What came out."""

    config: ComparisonConfig
    folder: Path
    task: str
    backbone: str
    duels: list[Duel] = field(default_factory=list)
    references: list[tuple[Entrant, Cost]] = field(default_factory=list)


def difference(cells: Sequence[Cell], others: Sequence[Cell]) -> Metric:
    """The mean over seeds of a metric less that of the others, with its 95 % interval.

    Test examples are resampled for both together; to that comes the spread of the seeds' own
    differences, with Student's t for so few of them. Both errors are independent: the one is of the
    examples that happen to be in the test split, the other of the draws of training.
    """
    values = np.array(
        [a.test.value - b.test.value for a, b in zip(cells, others, strict=True)], dtype=float
    )
    samples = None
    mine, theirs = _mean_samples(cells), _mean_samples(others)
    if mine is not None and theirs is not None and mine.shape == theirs.shape:
        samples = mine - theirs
    return _over_seeds(cells[0].test, values, samples)


def _over_seeds(like: Metric, values: np.ndarray, samples: np.ndarray | None) -> Metric:
    """The mean of `values` (seeds,) as a metric like another, with the interval of `spread`."""
    low, high = interval(spread(values, samples))
    return replace(like, value=float(values.mean()), low=low, high=high, samples=None)


def spread(values: np.ndarray, samples: np.ndarray | None, *, seed: int = 1) -> np.ndarray:
    """(S,) draws of the mean of `values` (seeds,): around the samples of the test split goes the
    error of a mean of so few seeds, t-distributed with one degree of freedom less than there are.
    """
    if samples is None:
        samples = np.full(1000, values.mean())
    error = values.std(ddof=1) / np.sqrt(len(values))
    draws = np.random.default_rng(seed).standard_t(len(values) - 1, size=len(samples))
    return samples + error * draws


def _mean_samples(cells: Sequence[Cell]) -> np.ndarray | None:
    found = [cell.test.samples for cell in cells]
    given = [samples for samples in found if samples is not None]
    return np.mean(given, axis=0) if len(given) == len(found) else None


def compare(
    config: ComparisonConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    only: Sequence[str] = (),
    tell: Callable[[str, int, int], None] = lambda what, done, of: None,
) -> Comparison | None:
    """Trains and measures all, writes the run directory, and returns what came out.

    Args:
        resume: keep the trainings that are there already with the same config.
        only: train these methods and references alone, with their bottlenecks, and return None;
            several processes may do so at once, and a last one with `resume` collects all.
        tell: is given what is trained next, how many trainings are done, and of how many.

    Raises:
        ValueError: a job, its data or the run directory does not fit.
    """
    jobs = read_contenders(config)
    for name in only:
        if name not in jobs:
            raise ValueError(f"there is no method {name!r}{nearest(name, jobs)}")
    first = next(iter(jobs.values()))
    if process_state(first).num_processes > 1:
        raise ValueError("compare runs in one process: start it without torchrun or accelerate")
    folder = Path(config.output)
    _prepare(folder, config, resume=resume or bool(only), overwrite=overwrite)
    splits: Splits = load_splits(first.data, task_class(first.task)(first).columns, SPLITS)
    measured_split(splits)
    if config.learning_rates and "validation" not in splits:
        raise ValueError("learning_rates are chosen on a validation split, and there is none")
    sizes = _Sizes(config, splits)
    pairs = {name: sizes.bottleneck(jobs[name]) for name in config.methods}
    # A bottleneck that several methods share is trained with the first of them.
    owner = {job.name: name for name, job in reversed(pairs.items())}
    bottlenecks = {job.name: job for job in pairs.values()}
    everyone = {
        name: job
        for name, job in {**jobs, **bottlenecks}.items()
        if not only or owner.get(name, name) in only
    }
    each = max(len(config.learning_rates), 1) + len(config.seeds) - 1
    entrants, total = {}, each * len(everyone)
    for place, (name, job) in enumerate(everyone.items()):
        runner = _Runner(config, job, splits, lambda what, n: tell(what, n, total), place * each)
        entrants[name] = runner.enter(sizes.trained(job))
    if only:
        return None
    done = Comparison(config, folder, first.task, first.backbone.name)
    for name, other in pairs.items():
        tell(f"timing {name}", total, total)
        both = [_at(job, entrants[job.name].rate, config.seeds[0]) for job in (jobs[name], other)]
        cost, plain = costs(both, splits, steps=config.timed_steps)
        done.duels.append(Duel(entrants[name], entrants[other.name], cost, plain))
    for name in config.references:
        (cost,) = costs([jobs[name]], splits, steps=config.timed_steps)
        done.references.append((entrants[name], cost))
    _write(done)
    return done


def _prepare(folder: Path, config: ComparisonConfig, *, resume: bool, overwrite: bool) -> None:
    check_folder(folder, config, resume=resume, overwrite=overwrite)
    if (folder / CONFIG).is_file():
        if resume:
            return
        shutil.rmtree(folder)
    make_folder(folder, config)


@dataclass
class _Sizes:
    """How many parameters a job trains, and which bottleneck trains as many."""

    config: ComparisonConfig
    splits: Splits
    _known: dict[str, int] = field(default_factory=dict)

    def trained(self, job: JobConfig) -> int:
        """All that is trained of adapter, head and encoder."""
        if job.name not in self._known:
            _, model = make_model(job, rows_to_fit(self.splits.get("train")))
            found = sum(p.numel() for p in model.parameters() if p.requires_grad)
            self._known[job.name] = found
        return self._known[job.name]

    def bottleneck(self, job: JobConfig) -> JobConfig:
        """The plain job with the bottleneck with which it trains what `job` does, as nearly as a
        whole size can."""
        one, two = (self.trained(self._sized(size)) for size in (1, 2))
        size = max(1, round(1 + (self.trained(job) - one) / (two - one)))
        return self._sized(size)

    def _sized(self, size: int) -> JobConfig:
        adapter = {**self.config.baseline, "size": size}
        return make_job(self.config, {"adapter": adapter}, f"bottleneck {size}")


@dataclass
class _Runner:
    """Trains one entrant with all seeds, at the learning rate that does best on validation."""

    config: ComparisonConfig
    job: JobConfig
    splits: Splits
    tell: Callable[[str, int], None]
    done: int

    def enter(self, parameters: int) -> Entrant:
        first, *others = self.config.seeds
        rates = self.config.learning_rates or (self.job.trainer.learning_rate,)
        tried = {rate: self._train(rate, first) for rate in rates}
        best = max(rates, key=lambda rate: _merit(tried[rate]))
        cells = [tried[best], *(self._train(best, seed) for seed in others)]
        return Entrant(self.job.name, parameters, best, tuple(cells))

    def _train(self, rate: float, seed: int) -> Cell:
        self.tell(f"{self.job.name}, learning rate {rate:g}, seed {seed}", self.done)
        self.done += 1
        job = _at(self.job, rate, seed)
        folder = Path(job.output)
        cell = folder / CELL
        if not cell.is_file():
            make_folder(folder, job)
            task, model = make_model(job, rows_to_fit(self.splits.get("train")))
            run = train_model(task, model, self.splits, quiet=True)
            validation = run.scores.get("validation")
            found = Cell(
                run.headline, None if validation is None else validation[task.metric].value
            )
            write_text(cell, json.dumps(_to_data(found)))
        return _from_data(json.loads(cell.read_text("utf-8")))


def _at(job: JobConfig, rate: float, seed: int) -> JobConfig:
    """A job at a learning rate and seed, in a folder of its own."""
    trainer = job.trainer.model_copy(update={"learning_rate": rate})
    output = f"{job.output}/{rate:g}/{seed}"
    return job.model_copy(update={"trainer": trainer, "seed": seed, "output": output})


def _merit(cell: Cell) -> float:
    value = cell.validation
    if value is None or not np.isfinite(value):
        return -np.inf
    return value if cell.test.greater_is_better else -value


def _to_data(cell: Cell) -> dict[str, Any]:
    samples = cell.test.samples
    return {
        "test": cell.test.to_dict(),
        "samples": None if samples is None else samples.tolist(),
        "validation": cell.validation,
    }


def _from_data(found: Mapping[str, Any]) -> Cell:
    samples = None if found["samples"] is None else np.array(found["samples"])
    return Cell(Metric(**found["test"], samples=samples), found["validation"])


def _write(done: Comparison) -> None:
    from .report import write_comparison_report

    around = environment()
    write_text(
        done.folder / RESULT,
        json.dumps(
            {
                "task": done.task,
                "backbone": done.backbone,
                "seeds": list(done.config.seeds),
                "methods": [_duel_data(duel) for duel in done.duels],
                "references": [
                    {**_entrant_data(entrant), "cost": cost.to_dict()}
                    for entrant, cost in done.references
                ],
                "environment": around,
            },
            indent=2,
            ensure_ascii=False,
        )
        + "\n",
    )
    write_comparison_report(done, around)


def _duel_data(duel: Duel) -> dict[str, Any]:
    return {
        **_entrant_data(duel.method),
        "cost": duel.cost.to_dict(),
        "bottleneck": {
            **_entrant_data(duel.bottleneck),
            "cost": duel.bottleneck_cost.to_dict(),
        },
        "difference": duel.difference.to_dict(),
        "verdict": duel.verdict,
    }


def _entrant_data(entrant: Entrant) -> dict[str, Any]:
    return {
        "name": entrant.name,
        "parameters": entrant.parameters,
        "learning_rate": entrant.rate,
        "metric": entrant.metric.to_dict(),
        "by_seed": [cell.test.value for cell in entrant.cells],
    }
