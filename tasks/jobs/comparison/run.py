"""Compares methods with plain bottlenecks of as many parameters, on one job, budget and encoder.

Every method is trained with several seeds. So is, for each method, a bottleneck whose size makes it
train as many parameters. `results` defines the intervals; `cost` measures step time and memory, of
a method and its bottleneck in turns.

config.yaml      the resolved config
comparison.json  figures with intervals, parameters, step times, memory, seeds and environment
comparison.md    the table as Markdown; comparison.png is its chart
report.html      both, on a page that opens offline
METHOD/          a run directory for every training, in folders by learning rate and seed
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmadapters.files import write_text
from mmadapters.suggest import nearest

from ...config.schema import SPLITS, JobConfig, Split
from ...core.metrics import Metric
from ...core.rows import Rows
from ...data.load import load_splits
from ...registry import task_class
from ..ending import measured_split, process_state
from ..folder import RunFolder, make_folder, run_folder
from ..metrics import environment
from ..model import make_model, rows_to_fit
from ..run import begin, end, train_model
from .config import ComparisonConfig, make_job, read_contenders
from .cost import costs
from .report import write_comparison_report
from .results import Comparison, Duel, Entrant, TrainingScore

RESULT, SCORE = "comparison.json", "cell.json"
Splits = dict[Split, Rows]


def compare(
    config: ComparisonConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    only: Sequence[str] = (),
    tell: Callable[[str, int, int], None] = lambda what, done, of: None,
) -> Comparison | None:
    """Trains and measures all entrants and writes the run directory.

    Args:
        resume: keep finished trainings of the same config.
        overwrite: replace an earlier run in the run directory.
        only: train only these methods and references, with their bottlenecks, and return None.
            Several processes may do so at once; a last call with `resume` collects all.
        tell: is called before each training with its description, the number of trainings done,
            and their total number.

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
    with run_folder(
        Path(config.output),
        config,
        resume=resume or bool(only),
        overwrite=overwrite and not only,
        first=not only,
        result=RESULT,
        again=True,
    ) as folder:
        done = _compare(config, jobs, folder, only=only, tell=tell)
        if done is not None:
            end(folder)
            done.folder = folder.path
    return done


def _compare(
    config: ComparisonConfig,
    jobs: Mapping[str, JobConfig],
    folder: RunFolder,
    *,
    only: Sequence[str],
    tell: Callable[[str, int, int], None],
) -> Comparison | None:
    first = next(iter(jobs.values()))
    splits: Splits = load_splits(first.data, task_class(first.task)(first).columns, SPLITS)
    measured_split(splits)
    if config.learning_rates and "validation" not in splits:
        raise ValueError("learning_rates are chosen on a validation split, and there is none")
    sizes = _Sizes(config, splits)
    pairs = {name: sizes.bottleneck(jobs[name]) for name in config.methods}
    # A bottleneck of several methods is trained with the first of them.
    owner = {job.name: name for name, job in reversed(pairs.items())}
    bottlenecks = {job.name: job for job in pairs.values()}
    everyone = {
        name: job
        for name, job in {**jobs, **bottlenecks}.items()
        if not only or owner.get(name, name) in only
    }
    # Several processes with `only` share the folder, so none of them may empty it.
    begin(replace(folder, goes_on=True) if only else folder)
    each = max(len(config.learning_rates), 1) + len(config.seeds) - 1
    entrants, total = {}, each * len(everyone)
    for place, (name, job) in enumerate(everyone.items()):
        runner = _Runner(
            config, job, folder, splits, lambda what, n: tell(what, n, total), place * each
        )
        entrants[name] = runner.enter(sizes.trained(job))
    if only:
        return None
    done = Comparison(config, folder.place, first.task, first.backbone.name)
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


@dataclass
class _Sizes:
    """Counts the trained parameters of jobs, and finds bottlenecks that train as many."""

    config: ComparisonConfig
    splits: Splits
    _known: dict[str, int] = field(default_factory=dict)

    def trained(self, job: JobConfig) -> int:
        """Returns the number of trained parameters of adapter, head and encoder together."""
        if job.name not in self._known:
            _, model = make_model(job, rows_to_fit(self.splits.get("train")))
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            self._known[job.name] = trained
        return self._known[job.name]

    def bottleneck(self, job: JobConfig) -> JobConfig:
        """Returns the job of the bottleneck whose trained parameters are closest to those of `job`.

        Its size is a whole number.
        """
        one, two = (self.trained(self._sized(size)) for size in (1, 2))
        size = max(1, round(1 + (self.trained(job) - one) / (two - one)))
        return self._sized(size)

    def _sized(self, size: int) -> JobConfig:
        adapter = {**self.config.baseline, "size": size}
        return make_job(self.config, {"adapter": adapter}, f"bottleneck {size}")


@dataclass
class _Runner:
    """Trains one entrant with all seeds, at the learning rate that is best on validation."""

    config: ComparisonConfig
    job: JobConfig
    folder: RunFolder
    splits: Splits
    tell: Callable[[str, int], None]
    done: int

    def enter(self, parameters: int) -> Entrant:
        first, *others = self.config.seeds
        rates = self.config.learning_rates or (self.job.trainer.learning_rate,)
        tried = {rate: self._train(rate, first) for rate in rates}
        best = max(rates, key=lambda rate: _merit(tried[rate]))
        trainings = [tried[best], *(self._train(best, seed) for seed in others)]
        return Entrant(self.job.name, parameters, best, tuple(trainings))

    def _train(self, rate: float, seed: int) -> TrainingScore:
        self.tell(f"{self.job.name}, learning rate {rate:g}, seed {seed}", self.done)
        self.done += 1
        job = _at(self.job, rate, seed)
        folder = self.folder.inside(job.output)
        file = folder / SCORE
        if not file.is_file():
            shutil.rmtree(folder, ignore_errors=True)  # the rest of a training that was killed
            make_folder(folder, job)
            task, model = make_model(job, rows_to_fit(self.splits.get("train")))
            run = train_model(task, model, self.splits, folder=folder, quiet=True)
            validation = run.scores.get("validation")
            training = TrainingScore(
                run.headline, None if validation is None else validation[task.metric].value
            )
            write_text(file, json.dumps(_to_data(training)))
        return _from_data(json.loads(file.read_text("utf-8")))


def _at(job: JobConfig, rate: float, seed: int) -> JobConfig:
    """Returns the job with a learning rate and a seed, in a folder of its own."""
    trainer = job.trainer.model_copy(update={"learning_rate": rate})
    output = f"{job.output}/{rate:g}/{seed}"
    return job.model_copy(update={"trainer": trainer, "seed": seed, "output": output})


def _merit(training: TrainingScore) -> float:
    value = training.validation
    if value is None or not np.isfinite(value):
        return -np.inf
    return value if training.test.greater_is_better else -value


def _to_data(training: TrainingScore) -> dict[str, Any]:
    samples = training.test.samples
    return {
        "test": training.test.to_dict(),
        "samples": None if samples is None else samples.tolist(),
        "validation": training.validation,
    }


def _from_data(data: Mapping[str, Any]) -> TrainingScore:
    samples = None if data["samples"] is None else np.array(data["samples"])
    return TrainingScore(Metric(**data["test"], samples=samples), data["validation"])


def _write(done: Comparison) -> None:
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
        "by_seed": [training.test.value for training in entrant.trainings],
    }
