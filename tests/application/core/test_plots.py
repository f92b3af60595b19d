"""Charts and picture grids: what is drawn is what was given."""

from __future__ import annotations

import html
import io
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from PIL import Image

from mmadapters.tasks.core.metrics import Metric
from mmadapters.tasks.core.plots import (
    LIGHT,
    PAGE,
    RIGHT,
    WRONG,
    bars_with_intervals,
    curve,
    figure_png,
    figure_svg,
    grid,
)

POINTS = ([1, 2, 3], [0.5, 0.25, 0.125])


def parsed(svg: str) -> ElementTree.Element:
    # In a page the parser of HTML knows both namespaces; that of XML must be told.
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return ElementTree.fromstring(svg.replace("<svg ", f"<svg {spaces} ", 1))


def test_a_curve_goes_through_its_points_in_percent_where_they_are_shares() -> None:
    (axes,) = curve(*POINTS, title="share", percent=True).axes
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[1, 50], [2, 25], [3, 12.5]])
    assert axes.get_title(loc="left") == "share, %"


def test_steps_have_no_fractions() -> None:
    (axes,) = curve([10, 20, 30], [1.0, 2.0, 3.0], title="loss").axes
    assert {tick % 1 for tick in axes.get_xticks()} == {0}


def test_a_mark_points_out_one_point() -> None:
    (axes,) = curve(*POINTS, title="loss", mark=(2, 0.25, "best 0.25")).axes
    np.testing.assert_array_equal(axes.lines[2].get_xydata(), [[2, 0.25]])
    assert axes.get_title(loc="right") == "best 0.25"


def test_bars_are_as_long_as_values_with_lines_over_their_intervals() -> None:
    metrics = {
        "us": Metric("WER", 0.25, 0.2, 0.3, count=1200),
        "scotland": Metric("WER", 0.5, count=3),
    }
    (axes,) = bars_with_intervals(metrics, title="word error rate").axes
    assert [bar.get_width() for bar in axes.patches] == [25, 50]
    assert [line.get_xdata().tolist() for line in axes.lines] == [[20, 30]]
    assert [text.get_text() for text in axes.get_yticklabels()] == [
        *("us (n = 1,200)", "scotland (n = 3)"),
    ]
    top, bottom = axes.get_ylim()[1], axes.get_ylim()[0]
    assert top < bottom  # the first on top


def test_a_grid_shows_each_picture_over_its_words_in_its_frame() -> None:
    images = [np.full((8, 8, 3), value, dtype=np.uint8) for value in (10, 20, 30)]
    figure = grid(images, ["what?\nred", "a price of $3 and $4", ""], 2, right=[True, False, None])
    shown = [axes for axes in figure.axes if axes.axison]
    assert [axes.images[0].get_array()[0, 0, 0] for axes in shown] == [10, 20, 30]
    assert shown[0].get_xlabel() == "what?\nred"
    assert shown[0].spines["top"].get_edgecolor() == to_rgba(RIGHT)
    assert shown[1].spines["top"].get_edgecolor() == to_rgba(WRONG)
    assert not shown[2].spines["top"].get_visible()
    assert figure_png(figure).startswith(b"\x89PNG")  # dollar signs are no formulas


def test_long_words_are_wrapped_and_cut() -> None:
    figure = grid([np.zeros((4, 4))], ["word " * 200], 1)
    lines = figure.axes[0].get_xlabel().split("\n")
    assert len(lines) == 6
    assert max(map(len, lines)) <= 26
    assert lines[-1].endswith(" …")


@pytest.mark.parametrize("dpi", [80, 160])
def test_png_data_have_the_size_and_resolution_that_were_asked_for(dpi: int) -> None:
    image = Image.open(io.BytesIO(figure_png(curve(*POINTS, title="loss"), dpi=dpi)))
    assert image.size == (4.0 * dpi, 2.5 * dpi)
    assert image.info["dpi"] == pytest.approx((dpi, dpi), abs=0.1)


def test_svg_keeps_text_and_takes_its_colours_from_the_page() -> None:
    title = 'validation <b> & "R@1" $x_1$'
    svg = figure_svg(curve(*POINTS, title=title, colours=PAGE), title=title)
    root = parsed(svg)
    assert title in [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert root.get("aria-label") == title
    assert "var(--accent)" in svg
    assert not any(colour in svg for colour in vars(PAGE).values())
    assert "<style" not in svg  # one in the picture would be one of the whole page


def test_svg_of_one_page_share_no_id_and_refer_to_their_own() -> None:
    charts = [
        figure_svg(curve(*POINTS, title=name, colours=LIGHT), title=name) for name in ("a", "b")
    ]
    seen: set[str] = set()
    for chart in charts:
        root = parsed(chart)
        ids = {element.get("id") for element in root.iter() if element.get("id")}
        uses = [e.get("{http://www.w3.org/1999/xlink}href") for e in root.iter()]
        clips = [e.get("clip-path") for e in root.iter()]
        assert {use[1:] for use in uses if use} <= ids
        assert {clip[5:-1] for clip in clips if clip} <= ids
        assert ids.isdisjoint(seen)
        seen |= ids


def test_svg_of_the_same_chart_is_the_same() -> None:
    one, two = (figure_svg(curve(*POINTS, title="loss"), title="loss") for _ in range(2))
    assert one == two


def test_all_text_is_drawn_as_it_is_written() -> None:
    figure = Figure(figsize=(2, 2), layout="constrained")
    axes = figure.subplots()
    formula = "$\\frac$"  # no formula that can be drawn
    axes.plot([0, 1], label=formula)
    axes.set(title=formula, xlabel=formula, ylabel=formula)
    axes.set_xticks([0, 1], [formula, "$x$"])
    axes.text(0, 0, formula)
    figure.legend()
    assert figure_png(figure)
    assert html.escape(formula) in figure_svg(figure, title=formula)
