"""What `mmadapters bench` says of an encoder: measured in one run, the same in every report."""

from __future__ import annotations

import json
import math
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from mmadapters.tasks.bench.cases import Settings, step_cases
from mmadapters.tasks.bench.checks import Target, checks
from mmadapters.tasks.bench.encoders import (
    PRESETS,
    choose,
    find_preset,
    make_inputs,
    measure_towers,
    pooled,
)
from mmadapters.tasks.bench.environments import Environment, WorkerError, environments
from mmadapters.tasks.bench.limits import FULL, TowerSize, cached_limit, first_block, step_limit
from mmadapters.tasks.bench.results import Bench, BenchRow, Missing, Spread
from mmadapters.tasks.cli.app import app

PEERS = Path(__file__).resolve().parents[3] / "benchmarks" / "peers"
OPTIONS = (
    *("--device", "cpu", "--batches", "1,8", "--train-batch", "2", "--seconds", "0.5"),
    *("--blocks", "0,half", "--size", "14", "--repeats", "3", "--threads", "1", "--quiet"),
)
VIT_B = TowerSize(name="vision", blocks=12, tokens=197, width=768)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "240"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reports of a run on two shipped encoders, and what the command printed."""
    folder = tmp_path_factory.mktemp("bench")
    result = call("nano-vit", "nano-wav2vec2", *OPTIONS, "--out", str(folder))
    assert result.exit_code == 0, result.output
    (folder / "printed.txt").write_text(result.output)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "bench.json").read_text())


def row_of(found: dict[str, Any], preset: str, **wanted: object) -> dict[str, Any]:
    fitting = [
        row
        for row in found["rows"]
        if row["preset"] == preset and all(row[key] == value for key, value in wanted.items())
    ]
    (row,) = fitting
    return row


def as_bench(found: dict[str, Any], missing: list[Missing]) -> Bench:
    rows = []
    for row in found["rows"]:
        spreads = {
            key: None if row[key] is None else Spread(**row[key])
            for key in ("seconds", "ratio", "reached")
        }
        rows.append(BenchRow(**{**row, **spreads, "rounds": tuple(row["rounds"])}))
    settings = Settings(encoders=("nano-vit", "nano-wav2vec2"), train_batch=2)
    return Bench(settings, found["machine"], rows, missing, {})


@pytest.mark.parametrize(
    ("start", "step", "cached"),
    [("0", 1.954, 1.954), ("half", 1.434, 0.934), ("9", 1.174, 0.424), ("11", 1.0, 1 / 12)],
)
def test_limits_of_vit_b_are_those_of_the_formula(start: str, step: float, cached: float) -> None:
    assert VIT_B.attention == pytest.approx(0.041, abs=1e-4)
    assert step_limit([VIT_B], start) == pytest.approx(step, abs=1e-3)
    assert cached_limit([VIT_B], start) == pytest.approx(cached, abs=1e-3)
    assert step_limit([VIT_B], start) < FULL == 3


def test_a_front_end_costs_a_forward_pass_and_nothing_from_the_cache() -> None:
    speech = replace(VIT_B, share=0.6)
    assert step_limit([speech], "11") == 1
    assert cached_limit([speech], "half") == pytest.approx(0.6 * cached_limit([VIT_B], "half"))


def test_towers_share_the_limit_by_their_operations() -> None:
    halves = [replace(VIT_B, share=0.5), replace(VIT_B, name="text", blocks=6, share=0.5)]
    both = step_limit([VIT_B], "half") + step_limit([replace(VIT_B, blocks=6)], "half")
    assert step_limit(halves, "half") == pytest.approx(both / 2)


@pytest.mark.parametrize(("start", "blocks", "first"), [("half", 7, 3), ("three-quarters", 8, 6)])
def test_first_blocks_go_by_name(start: str, blocks: int, first: int) -> None:
    assert first_block(start, blocks) == first


@pytest.mark.parametrize(
    ("preset", "towers"),
    [
        ("nano-vit", {"vision": (8, 65, 224, 0.98, 1.0)}),
        ("nano-wav2vec2", {"audio": (8, 49, 224, 0.4, 0.6)}),
        ("nano-clip", {"vision": (8, 65, 224, 0.8, 0.95), "text": (4, 48, 128, 0.05, 0.2)}),
    ],
)
def test_an_encoder_tells_its_towers(preset: str, towers: dict[str, tuple]) -> None:
    model = choose(find_preset(preset)).make()
    measured = measure_towers(model, make_inputs(model, 1, seconds=1.0))
    assert {tower.name for tower in measured} == set(towers)
    for tower in measured:
        blocks, tokens, width, least, most = towers[tower.name]
        assert (tower.blocks, tower.tokens, tower.width) == (blocks, tokens, width)
        assert least < tower.share < most


@pytest.mark.parametrize("preset", ["nano-vit", "nano-wav2vec2", "nano-clip"])
def test_twins_give_the_same_pooled_features(preset: str) -> None:
    encoders = [*PRESETS[preset].encoders, *filter(None, [PRESETS[preset].twin])]
    features = []
    for encoder in encoders:
        model = encoder.make()
        with torch.no_grad():
            features.append(pooled(make_inputs(model, 3, seconds=0.5)(model)))
    assert all(feature.shape[0] == 3 and feature.dim() == 2 for feature in features)
    again = pooled(make_inputs(model, 3, seconds=0.5)(encoders[-1].make())).detach()
    torch.testing.assert_close(features[-1], again)


def test_every_contender_has_its_row(found: dict[str, Any]) -> None:
    for preset in ("nano-vit", "nano-wav2vec2"):
        for batch in (1, 8):
            merged = ("lora merged", "parallel merged")
            for method in ("bare", "double_seq_bn", "seq_bn", "lora", *merged):
                row_of(found, preset, kind="forward", method=method, batch=batch)
        for method in ("double_seq_bn", "seq_bn", "lora"):
            row_of(found, preset, kind="mixed", method=method, batch=8)
            row_of(found, preset, kind="switch", method=method)
            row_of(found, preset, kind="load", method=method)
        row_of(found, preset, kind="forward", method="bare", phase="step")
        row_of(found, preset, kind="step", method="full")
        for start in ("0", "half"):
            row_of(found, preset, kind="step", method="double_seq_bn", start=start)
            row_of(found, preset, kind="cached", method="double_seq_bn", start=start)


def test_figures_are_finite_and_positive(found: dict[str, Any]) -> None:
    for row in found["rows"]:
        seconds = row["seconds"]
        assert 0 < seconds["low"] <= seconds["median"] <= seconds["high"] < math.inf
        assert len(row["rounds"]) == 3
        assert statistics.median(row["rounds"]) == seconds["median"]


def test_ratios_and_limits_are_taken_round_by_round(found: dict[str, Any]) -> None:
    towers = [TowerSize(**tower) for tower in found["encoders"]["nano-wav2vec2"]]
    frozen = row_of(found, "nano-wav2vec2", method="bare", phase="step")["rounds"]
    full = row_of(found, "nano-wav2vec2", method="full")["rounds"]
    for kind, limit in (("step", step_limit), ("cached", cached_limit)):
        row = row_of(found, "nano-wav2vec2", kind=kind, method="double_seq_bn", start="half")
        own = row["rounds"]
        ratio = statistics.median(a / b for a, b in zip(own, full, strict=True))
        assert row["ratio"]["median"] == pytest.approx(ratio)
        reached = [limit(towers, "half") * f / s for f, s in zip(frozen, own, strict=True)]
        assert row["reached"]["median"] == pytest.approx(statistics.median(reached))


def test_a_step_keeps_less_the_later_it_starts(found: dict[str, Any]) -> None:
    for preset in ("nano-vit", "nano-wav2vec2"):
        full = row_of(found, preset, method="full")
        low, half = (
            row_of(found, preset, kind="step", method="double_seq_bn", start=start)
            for start in ("0", "half")
        )
        cached = row_of(found, preset, kind="cached", start="half")
        assert full["kept"] > low["kept"] > half["kept"] > 0
        assert half["kept"] == pytest.approx(cached["kept"], rel=0.05)
        assert low["parameters"] == 2 * half["parameters"]
        assert full["peak"] is None


def test_markdown_says_what_json_says(folder: Path, found: dict[str, Any]) -> None:
    lines = [line for line in (folder / "bench.md").read_text().splitlines() if " | " in line]
    for row in found["rows"]:
        place = f"| {row['environment']}: {row['encoder']} |"
        fitting = [line for line in lines if line.startswith(f"| {row['name']}") and place in line]
        cells = [cell for line in fitting for cell in line.split(" | ")]
        medians = [float(c.partition(" [")[0].replace(",", "")) for c in cells if c.endswith("]")]
        wanted = 1e3 * row["seconds"]["median"]
        assert any(median == pytest.approx(wanted, rel=6e-3) for median in medians), row["name"]
    printed = (folder / "printed.txt").read_text()
    assert "from cached trunk" in printed
    assert "Training step, batch 2" in printed


def test_peers_that_are_not_there_are_said_to_be_missing(
    folder: Path, found: dict[str, Any]
) -> None:
    assert {entry["what"] for entry in found["missing"]} == {"peft", "AdapterHub's adapters"}
    assert {row["library"] for row in found["rows"]} == {"torch", "mmadapters"}
    text = (folder / "bench.md").read_text()
    assert "| all | peft | it is not installed here" in text


def test_reports_name_no_path_of_the_machine(folder: Path) -> None:
    for name in ("bench.json", "bench.md"):
        text = (folder / name).read_text()
        assert sys.prefix not in text
        assert str(folder) not in text


def test_chart_is_a_png_of_twelve_inches(folder: Path) -> None:
    with Image.open(folder / "bench.png") as image:
        assert image.format == "PNG"
        assert image.size[0] == 12 * 160
        assert image.size[1] > 600


def test_targets_hold_or_miss_or_are_not_measured(found: dict[str, Any]) -> None:
    rows = as_bench(found, []).rows
    target = Target(what="", device="cpu", preset="nano-vit", kind="step", start="half", most=100)
    assert target.check(rows).holds is True
    assert replace(target, most=1e-3).check(rows).holds is False
    assert replace(target, kind="cached", most=None, least=1e-3).check(rows).holds is True
    assert replace(target, kind="cached", most=None, least=1e3).check(rows).holds is False
    assert replace(target, start="three-quarters").check(rows).holds is None
    assert replace(target, preset="vit-s16").check(rows).holds is None


def test_a_case_of_ours_that_cannot_run_is_a_miss(found: dict[str, Any]) -> None:
    assert checks(as_bench(found, []))[-1].holds
    broken = Missing("nano-vit", "ours lora, step, eager, batch 2 (here)", "RuntimeError: no")
    assert checks(as_bench(found, [broken]))[-1].holds is False


def test_a_peer_that_is_faster_is_a_miss(found: dict[str, Any]) -> None:
    bench = as_bench(found, [])
    mine = next(row for row in bench.rows if row.method == "lora" and row.kind == "step")
    for factor, holds in ((0.5, False), (2.0, True)):
        rounds = tuple(factor * seconds for seconds in mine.rounds)
        peer = replace(mine, library="peft", name="peft lora", rounds=rounds)
        beside = replace(bench, rows=[*bench.rows, peer])
        (check,) = [c for c in checks(beside) if "peft lora" in c.what]
        assert check.holds is holds


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("vit-s17",), "'vit-s17' is no preset; did you mean 'vit-s16'?"),
        (("timm/vit_nowhere",), "timm/vit_nowhere cannot be measured: ValueError: timm has no"),
        (("nano-vit", "--device", "cuda"), "torch sees no GPU here"),
        (("nano-vit", "--device", "tpu"), "--device must be one of cpu, cuda, not 'tpu'"),
        (("nano-vit", "--precision", "fp8"), "--precision must be one of fp32, bf16, not 'fp8'"),
        (("nano-vit", "--method", "ia3"), "--method must be one of double_seq_bn, seq_bn, lora"),
        (("nano-vit", "--batches", "one"), "--batches is a list of numbers like 1,32,256"),
        (("nano-vit", "--batches", "0"), "--batches must be 1 or more, not 0"),
        (("nano-vit", "--blocks", "third"), "half or three-quarters, not 'third'"),
        (("nano-vit", "--blocks", "8"), "the first block 8 is none of 8"),
        (("nano-vit", "--blocks", ","), "--blocks names no block"),
        (("nano-vit", "--repeats", "0"), "--repeats must be 1 or more, not 0"),
        (("nano-vit", "--seconds", "0"), "--seconds must be above 0"),
        (("nano-vit", "--peers", "no-python"), "no-python cannot be started: No such file"),
        (("nano-vit", "--peers", sys.executable), "has neither peft nor adapters"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = call("--device", "cpu", *arguments, "--out", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert words in result.output.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_a_worker_outlives_what_it_cannot_do() -> None:
    worker = Environment.start(sys.executable)
    try:
        place = {"device": "cpu", "precision": "fp32", "seconds": 0.5, "size": 14, "threads": 1}
        worker.ask("set_encoder", name="nano/vit", options={}, **place)
        case = step_cases(Settings(encoders=("nano-vit",)), ["own"])[-1]
        with pytest.raises(WorkerError, match="ModuleNotFoundError: No module named 'peft'"):
            worker.ask("open", key=0, case={**case.to_dict(), "library": "peft"})
        worker.ask("open", key=1, case={**case.to_dict(), "batch": 2})
        assert worker.ask("time", key=1) > 0
    finally:
        worker.stop()


@pytest.mark.parametrize("peer", ["peft", "adapters"])
def test_a_peer_has_as_many_parameters(peer: str) -> None:
    python = PEERS / f".venv-{peer}" / "bin" / "python"
    if not python.exists():
        pytest.skip("`make peers` makes its environment")
    with environments([str(python)]) as there:
        worker = there[-1]
        options = {"library": "hf"}
        place = {"device": "cpu", "precision": "fp32", "seconds": 0.5, "size": 14, "threads": 1}
        worker.ask("set_encoder", name="nano/vit", options=options, **place)
        opened = {}
        for key, case in enumerate(step_cases(Settings(encoders=("",), train_batch=2), [peer])):
            facts = worker.ask("open", key=key, case=case.to_dict())
            opened[case.library, case.method] = facts["parameters"]
        theirs = {method: count for (library, method), count in opened.items() if library == peer}
        assert theirs
        for method, count in theirs.items():
            assert opened["mmadapters", method] == count
