"""The report of a run, made from its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..core import plots
from ..core.capabilities import ReportPictures, capability
from ..core.results import Figure
from ..core.rows import Record, Rows
from .page import RunReport, write_report
from .results import Run

_PLACES = {"memory": "in memory", "disk": "on disk"}


def write_run_report(
    path: Path,
    run: Run,
    *,
    splits: Mapping[Any, Rows],
    records: Mapping[Any, Sequence[Record]],
    environment: Mapping[str, Any],
) -> None:
    """Writes the report of an evaluated run; its pictures are of the test split if there is one.

    Args:
        path: the HTML file.
        splits: the rows by split.
        records: the records of `evaluate` by split.
        environment: the environment as in `metrics.json`.
    """
    config = run.task.config
    order = [split for split in ("test", "validation") if split in run.scores]
    count = config.evaluation.pictures
    pictures = capability(run.task, ReportPictures)
    figures = (
        [*pictures.illustrate(run.model, splits[order[0]], records[order[0]], count=count)]
        if count and order
        else []
    )
    figures += [
        Figure(
            title=f"Who contributes where: AdapterFusion of {name}",
            image=plots.figure_png(plots.fusion_map(sites, members=name.split(","))),
            caption="The mean attention on each member at each site, over all tokens of "
            f"{order[0]}; rows add up to 100 %.",
        )
        for name, sites in run.attention.items()
    ]
    report = RunReport(
        title=config.name,
        task=config.task,
        metric=run.task.metric,
        scores={split: run.scores[split] for split in order},
        before=run.before,
        summary=summary(run, splits),
        facts=facts(run),
        figures=figures,
        history=run.history,
        best_step=run.facts.get("best_step"),
        problems=run.problems,
        findings=run.findings,
        environment=environment,
        config=yaml.safe_dump(config.to_save(), sort_keys=False, allow_unicode=True),
    )
    write_report(path, report)


def summary(run: Run, splits: Mapping[Any, Rows]) -> list[str]:
    """Returns sentences that say what was trained, on how many rows."""
    config = run.task.config
    mode = config.trainer.mode
    method = config.adapter.get("method") if mode == "adapter" else mode
    ways = {
        "full": "fine-tuned as a whole",
        "head": "frozen, with a trained head",
        "none": "as it is, nothing trained",
        "fusion": f"frozen, with a fusion of {', '.join(config.members)}",
    }
    how = ways.get(mode, f"frozen, with {method} adapters")
    sizes = [f"{len(rows):,} {split}" for split, rows in splits.items() if hasattr(rows, "__len__")]
    return [
        f"{config.backbone.name}, {how}.",
        f"Rows: {', '.join(sizes)}. The best checkpoint was chosen on the validation split."
        if "validation" in splits and run.history
        else f"Rows: {', '.join(sizes)}.",
    ]


def facts(run: Run) -> dict[str, str]:
    """Returns the figures of the page's head, label -> text."""
    known = run.facts
    texts = {
        "trained of the encoder": f"{100 * known['trained_share']:.2f} %",
        "adapter": f"{known['adapter_parameters']:,} parameters",
        "head": f"{known['head_parameters']:,} parameters",
    }
    if "adapter_bytes" in known:
        texts["on disk"] = f"{known['adapter_bytes'] / 1024:,.0f} kB"
    if "train_seconds" in known:
        texts["training"] = f"{known['steps']:,} steps in {known['train_seconds']:,.0f} s"
        texts["waited for data"] = f"{100 * known['waited_for_data']:.1f} % of the time"
    if known.get("cache"):
        texts["frozen trunk"] = cache_text(known["cache"])
    return texts


def cache_text(cache: Mapping[str, Any]) -> str:
    """Describes the cache of the frozen trunk in a line.

    Args:
        cache: as `TrunkCache.facts`.
    """
    if cache["where"] == "off":
        return f"run in every pass: {cache['reason']}"
    towers = ", ".join(
        f"{name} up to block {part['block']} of {part['blocks']}"
        for name, part in cache["towers"].items()
    )
    parts = [cache["train"]]
    if isinstance(cache.get("validation"), Mapping):
        parts.append(cache["validation"])
    size, seconds, read = (sum(p[key] for p in parts) for key in ("bytes", "seconds", "read"))
    views = cache["train"]["views"]
    computed = f"computed once ({towers}), {size / 2**20:,.0f} MiB {_PLACES[cache['where']]}"
    computed += f" for {views} views of each row" if views > 1 else ""
    return f"{computed}, filled in {seconds:,.1f} s and read {read:,} times"
