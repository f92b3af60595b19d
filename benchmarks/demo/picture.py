"""Draws the picture of the README from what `make demo` left in out/demo.

    python benchmarks/demo/picture.py [out/demo] [docs/demo.png]

Left: test pictures of the segmentation job (drawn scenes, synthetic), with the head alone and with
adapters. Right: the figures of the tasks that were run, with their 95 % intervals.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from mmadapters.files import write_bytes
from mmadapters.tasks.artifact import open_directory
from mmadapters.tasks.core.plots import LIGHT, figure_png
from mmadapters.tasks.data.load import load_splits
from mmadapters.tasks.data.media import read_image
from mmadapters.tasks.segmentation.pictures import colours_of, painted

ROWS = (2, 5, 11)  # of the test split; chosen before any prediction was seen
TASKS = {
    "segmentation": "segmentation, mIoU ↑",
    "asr": "speech in a new accent, WER ↓",
    "vqa": "questions about pictures, accuracy ↑",
    "retrieval": "retrieval, mean R@1 ↑",
}
MODES = {"head": ("head only", LIGHT.second), "adapter": ("adapters", LIGHT.accent)}


def panels(demo: Path) -> dict[str, list[np.ndarray]]:
    """Returns the columns of pictures, (H, W, 3) uint8 each, by their titles."""
    columns: dict[str, list[np.ndarray]] = {"picture": [], "truth": []}
    for mode, (title, _) in MODES.items():
        opened = open_directory(demo / "segmentation" / mode, device="cpu")
        task: Any = opened.task
        rows = load_splits(task.config.data, task.columns, ("test",))["test"]
        colours = colours_of(task.classes, {})
        columns[title] = []
        with TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "out").mkdir()
            for number in ROWS:
                read_image(rows[number]["image"]).save(folder / f"{number}.png")
            inputs = [str(folder / f"{number}.png") for number in ROWS]
            results = list(task.predict(opened.model, inputs, out=folder / "out"))
            for number, result in zip(ROWS, results, strict=True):
                image = read_image(rows[number]["image"])
                classes = np.asarray(Image.open(result["mask"]))
                columns[title].append(painted(classes, colours))
                if mode == "adapter":
                    truth = task.labels.read(rows[number], (image.height, image.width))
                    columns["picture"].append(np.asarray(image.convert("RGB")))
                    columns["truth"].append(painted(truth, colours))
    return columns


def draw_figures(axes: Axes, demo: Path) -> None:
    """Draws each task's test figure and interval for both modes."""
    ran = {
        task: title
        for task, title in TASKS.items()
        if (demo / task / "adapter/report.html").is_file()
    }
    for place, (task, title) in enumerate(ran.items()):
        for shift, (mode, (_, colour)) in zip((0.17, -0.17), MODES.items(), strict=True):
            written = json.loads((demo / task / mode / "metrics.json").read_text())
            metric = next(iter(written["splits"]["test"]["metrics"].values()))
            value, low, high = (100 * metric[key] for key in ("value", "low", "high"))
            y = -place + shift
            axes.plot([low, high], [y, y], color=colour, lw=5, alpha=0.35, solid_capstyle="butt")
            axes.plot([value], [y], "o", color=colour, ms=6)
            axes.annotate(
                f"{value:.1f}",
                (high, y),
                (5, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        axes.annotate(title, (0, -place + 0.42), fontsize=9, color=LIGHT.ink, va="center")
    axes.set(
        xlim=(0, 108), ylim=(0.45 - len(ran), 0.65), yticks=[], xlabel="%, with 95 % intervals"
    )
    axes.spines[["left", "right", "top"]].set_visible(False)
    handles = [
        Line2D([], [], color=colour, marker="o", lw=5, alpha=0.8, label=name)
        for name, colour in MODES.values()
    ]
    axes.legend(handles=handles, loc="lower right", frameon=False, fontsize=8)


def main(demo: Path, out: Path) -> None:
    columns = panels(demo)
    figure = Figure(figsize=(10.5, 3.9), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.45, 1))
    grid = left.subplots(len(ROWS), len(columns))
    for column, (title, pictures) in enumerate(columns.items()):
        for row, picture in enumerate(pictures):
            grid[row, column].imshow(picture, interpolation="nearest")
            grid[row, column].set_axis_off()
        grid[0, column].set_title(title, fontsize=9)
    draw_figures(right.subplots(), demo)
    write_bytes(out, figure_png(figure, dpi=130))


if __name__ == "__main__":
    given = [Path(argument) for argument in sys.argv[1:]]
    defaults = [Path("out/demo"), Path("docs/demo.png")]
    main(*given, *defaults[len(given) :])
