"""The report: what is in it, that it is safe, and that it needs nothing else."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmadapters.tasks.core.errors import Problem
from mmadapters.tasks.core.metrics import Metric
from mmadapters.tasks.core.results import Figure, Scores, Table
from mmadapters.tasks.reports.charts import learning_curves, series
from mmadapters.tasks.reports.page import (
    REASONS,
    RunReport,
    cell_text,
    interval_text,
    reasons,
    render,
    value_text,
    write_report,
)
from mmadapters.tasks.reports.tables import group_table, metric_rows, scale_of

ATTACK = "<script>alert('x')</script>"
HISTORY = [
    {"loss": 2.0, "learning_rate": 1e-3, "step": 10},
    {"eval_WER": 0.5, "eval_runtime": 1.0, "step": 10},
    {"loss": 1.0, "learning_rate": 5e-4, "step": 20},
    {"eval_WER": 0.2, "eval_runtime": 1.0, "step": 20},
    {"loss": 0.5, "learning_rate": 0.0, "step": 30},
    {"eval_WER": 0.3, "eval_runtime": 1.0, "step": 30},
    {"train_runtime": 9.0, "step": 30},
]


def picture(colour: int = 0, dpi: int = 192) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.full((20, 40, 3), colour, np.uint8)).save(data, "PNG", dpi=(dpi, dpi))
    return data.getvalue()


def wer(value: float, low: float | None = None, high: float | None = None, n: int = 10) -> Metric:
    return Metric("WER", value, low, high, count=n, greater_is_better=False)


def report(**changes: Any) -> RunReport:
    scores = Scores(
        [wer(0.25, 0.2, 0.3, 150), Metric("CER", 0.1, 0.05, 0.15, greater_is_better=False)],
        {"accent": {"us": [wer(0.1, 0.05, 0.2)], "scotland": [wer(0.4, 0.3, 0.5), wer(0.2)]}},
        [Table("Commonest confusions", ("said", "heard"), [("three", "free")])],
    )
    before = Scores([wer(0.6)], {"accent": {"us": [wer(0.12)], "scotland": [wer(0.7)]}})
    given: dict[str, Any] = {
        "title": "asr_accent",
        "task": "asr",
        "metric": "WER",
        "scores": {"test": scores, "validation": Scores([wer(0.22, 0.2, 0.24, 60)])},
        "before": before,
        "summary": ["An adapter was trained."],
        "facts": {"trained of the encoder": "4.1 %"},
        "figures": [
            Figure("Alignments", picture(), "Two of them."),
            Table(
                "Worst utterances",
                ("row", "rate", "words", "sound"),
                [(17, 0.83333, "the cat\nA cat", Figure("Row 17", picture(255)))],
                "Capitals differ.",
            ),
        ],
        "history": HISTORY,
        "best_step": 20,
        "problems": {"train": [Problem(3, "the transcript is empty")], "test": []},
        "environment": {"python": "3.11", "packages": {"torch": "2.14", "mmadapters": "0.1.0"}},
        "config": "task: asr\nname: asr_accent\n",
        "created": datetime(2030, 1, 2, 3, 4),
    }
    return RunReport(**(given | changes))


class Page(HTMLParser):
    """Elements with their attributes, and the text of the page."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(render(report()))


def test_the_page_is_well_formed_and_ids_are_unique(page: Page) -> None:
    assert page.open == []
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = {str(a["href"])[1:] for a in page.all("a")}
    assert links == {"training", "metrics", "groups", "examples", "skipped", "run"} & set(ids)


def test_the_page_loads_and_runs_nothing(page: Page) -> None:
    tags = {tag for tag, _ in page.elements}
    assert tags.isdisjoint({"script", "link", "iframe", "object", "embed", "form", "base"})
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            address = attributes.get(name) or "#"
            assert address.startswith(("#", "data:image/png;base64,")), address
    policy = next(m["content"] for m in page.all("meta") if "http-equiv" in m)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    text = render(report())
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_text_from_data_is_shown_and_never_read_as_html() -> None:
    scores = Scores(
        [wer(0.25)],
        {ATTACK: {ATTACK: [wer(0.1)], "b": [wer(0.2)]}},
        [Table(ATTACK, (ATTACK,), [(ATTACK,), (Figure(ATTACK, picture(), ATTACK),)], ATTACK)],
    )
    text = render(
        report(
            title=ATTACK,
            task=ATTACK,
            scores={ATTACK: scores},
            before=None,
            summary=[ATTACK],
            facts={ATTACK: ATTACK},
            figures=[Figure(ATTACK, picture(), ATTACK)],
            problems={ATTACK: [Problem(0, ATTACK)]},
            environment={ATTACK: ATTACK, "packages": {ATTACK: ATTACK}},
            config=f"name: {ATTACK}\n",
        )
    )
    assert "<script" not in text
    shown = Page(text)
    assert {tag for tag, _ in shown.elements} & {"script", "alert"} == set()
    assert shown.text.count(ATTACK) >= 18
    assert f"name: {ATTACK}" in shown.text


def test_the_head_says_the_figure_its_interval_and_where_it_came_from(page: Page) -> None:
    assert page.text.startswith("asr_accent · WER 25.0 % asr · 02 January 2030, 03:04 asr_accent")
    assert (
        "25.0 % WER on test, 150 examples; smaller is better 95 % interval 20.0 – 30.0 % before "
        "training 60.0 % An adapter was trained. trained of the encoder 4.1 %"
    ) in page.text


def test_the_metric_table_has_every_metric_on_every_split(page: Page) -> None:
    assert (
        "metric test, before test 95 % interval validation 95 % interval examples "
        "WER ↓ 60.0 % 25.0 % 20.0 – 30.0 % 22.0 % 20.0 – 24.0 % 150 "
        "CER ↓ — 10.0 % 5.0 – 15.0 % —"
    ) in page.text


def test_the_deciding_metric_comes_first() -> None:
    scores = {"test": Scores([Metric("mIoU", 0.5), Metric("accuracy", 0.9)])}
    rows = metric_rows("accuracy", scores, None)
    assert [row.name for row in rows] == ["accuracy", "mIoU"]


def test_groups_come_worst_first_and_bars_lie_where_their_numbers_say(page: Page) -> None:
    scores = report().scores["test"]
    table = group_table("accent", scores, report().before)
    assert [row.name for row in table.rows] == ["scotland", "us"]
    assert (table.scale.start, table.scale.end) == (0.0, pytest.approx(0.7))
    bars = [i for i, (tag, a) in enumerate(page.elements) if a.get("class") == "bar"]
    assert [page.elements[i][1]["aria-label"] for i in bars] == [
        "scotland: 40.0 %, interval 30.0 – 50.0 %",
        "us: 10.0 %, interval 5.0 – 20.0 %",
    ]
    parts = {a["class"]: a for _, a in page.elements[bars[0] + 1 : bars[1]] if "class" in a}
    for part, attribute, value in (
        *(("dot", "cx", 0.4), ("before", "cx", 0.7), ("total", "x1", 0.25)),
        *(("interval", "x1", 0.3), ("interval", "x2", 0.5)),
    ):
        place = float(str(parts[part][attribute]).removesuffix("%"))
        assert place == pytest.approx(100 * value / 0.7, abs=0.01)


def test_where_greater_is_better_the_smallest_group_is_the_worst() -> None:
    groups = {"type": {"colour": [Metric("acc", 0.9)], "count": [Metric("acc", 0.3)]}}
    table = group_table("type", Scores([Metric("acc", 0.5)], groups), None)
    assert [row.name for row in table.rows] == ["count", "colour"]
    assert not table.compared


def test_a_scale_holds_all_values_between_round_ends() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        size = 10.0 ** rng.integers(-4, 5)
        numbers = np.sort(rng.normal(size=(4, 3)) * size, axis=1)
        metrics = [Metric("x", b, a, c, unit="") for a, b, c in numbers.tolist()]
        scale = scale_of(metrics)
        places = [scale.percent(value) for value in numbers.ravel().tolist()]
        assert all(place is not None and -1e-6 <= place <= 100 + 1e-6 for place in places)
        # No more than twice as wide as what it shows, or the bars would be a dot.
        assert scale.end - scale.start <= 2 * (numbers.max() - numbers.min())


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_a_scale_of_one_value_has_a_width_and_shares_stay_between_0_and_1(value: float) -> None:
    scale = scale_of([Metric("x", value)])
    assert 0 <= scale.start <= value <= scale.end <= 1
    assert scale.start < scale.end


def test_pictures_are_the_given_data_at_their_printed_size_and_have_words(page: Page) -> None:
    images = page.all("img")
    data = [base64.b64decode(str(image["src"]).partition("base64,")[2]) for image in images]
    assert data == [picture(), picture(255)]
    assert [image["alt"] for image in images] == ["Alignments. Two of them.", "Row 17"]
    assert (images[0]["width"], images[0]["height"]) == ("20", "10")


def test_tables_show_numbers_as_numbers_and_lines_as_lines(page: Page) -> None:
    cells = page.all("td")
    assert {"class": "lines"} in cells
    assert "17 0.8333 the cat A cat" in page.text
    assert "Capitals differ." in page.text
    assert "Commonest confusions said heard three free" in page.text


def test_curves_show_loss_validation_and_rate_and_mark_what_was_kept(page: Page) -> None:
    labels = [a["aria-label"] for a in page.all("svg") if a.get("class") == "chart"]
    assert labels == [
        "Training loss: 2 at step 10, 0.5 at step 30",
        "validation WER: best 20.0 % at step 20",
        "Learning rate: 0.001 at step 10, 0 at step 30",
    ]


def test_without_a_step_the_best_of_the_history_is_marked_by_the_metrics_direction() -> None:
    (_, smaller, _) = learning_curves(HISTORY, wer(0.2), None)
    assert "best 20.0 % at step 20" in smaller
    greater = replace(wer(0.2), greater_is_better=True)
    assert "best 50.0 % at step 10" in learning_curves(HISTORY, greater, None)[1]


def test_a_run_without_training_has_no_curves_and_no_empty_sections() -> None:
    bare = RunReport(title="x", task="asr", metric="WER", scores={"test": Scores([wer(0.5)])})
    shown = Page(render(bare))
    assert [a["href"] for a in shown.all("a")] == ["#metrics", "#run"]
    assert [a["id"] for a in shown.all("section")] == ["metrics", "run"]


def test_losses_that_are_not_finite_leave_a_gap() -> None:
    history = [{"step": 1, "loss": float("inf")}, {"step": 2, "loss": 1.0}]
    steps, values = series(history, "loss")
    assert steps == [1, 2]
    assert np.isnan(values[0])
    nothing = [{"step": 1, "eval_WER": float("nan")}]
    (chart,) = learning_curves(nothing, wer(0.2), None)
    assert "best" not in chart


def test_what_was_logged_again_after_a_resume_counts_once() -> None:
    again = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "loss": 1.5}]
    assert series(again, "loss") == ([1, 2], [3.0, 1.5])


def test_skipped_rows_are_counted_by_reason(page: Page) -> None:
    found = reasons([Problem(i, "empty") for i in (9, 8, 7, 6, 5, 4)] + [Problem(1, "broken")])
    assert [(reason.text, reason.count, reason.first) for reason in found] == [
        *(("empty", 6, [4, 5, 6, 7, 8]), ("broken", 1, [1])),
    ]
    many = reasons([Problem(i, f"file {i} is broken") for i in range(100)])
    assert len(many) == REASONS + 1
    assert (many[-1].text, many[-1].count) == ("other reasons", 100 - REASONS)
    assert "train: 1 row could not be used" in page.text
    assert "test: " not in page.text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((3, "3"), (12345, "12,345"), (0.123456, "0.1235"), (1234.5, "1,234"), (None, "—")),
        *((True, "yes"), (float("nan"), "nan"), (("a", 2), "a, 2"), (wer(0.5), "50.0 %")),
    ],
)
def test_cells(value: Any, text: str) -> None:
    assert cell_text(value) == text


def test_figures_that_are_no_shares_have_no_percent_sign() -> None:
    rank = Metric("median rank", 3.0, 2.0, 4.5, unit="", greater_is_better=False)
    assert (value_text(rank), interval_text(rank)) == ("3", "2 – 4.5")
    assert value_text(Metric("x", float("nan"))) == "—"


def test_a_report_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, report())
    first = path.read_text("utf-8")
    assert first == render(report())
    with pytest.raises(ValueError, match="a report needs the deciding metric, mIoU"):
        write_report(path, report(metric="mIoU"))
    assert path.read_text("utf-8") == first
    assert list(tmp_path.iterdir()) == [path]
