"""Turns the ids or colours of masks into class ids 0 … classes − 1 and the ignore index."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mmadapters.suggest import nearest

from ..core.errors import BadRow
from ..core.rows import Rows
from ..data.media import image_size, read_mask
from .coco import category_ids, category_names, draw_segments
from .config import IGNORE, SegmentationDataConfig
from .orientation import Drawn, drawn_mask, drawn_segments

SHOWN = 5  # most unknown ids that a message names


class Labels:
    """Reads the masks of a data set.

    Attributes:
        classes: names by id.
        ignore: the value of ignored pixels, above every class id.
        dtype: dtype of the returned masks: uint8, or int32 for an ignore index above 255.

    Raises:
        ValueError: the config maps to a class that does not exist.
    """

    def __init__(self, config: SegmentationDataConfig, classes: Sequence[str]) -> None:
        if len(classes) > config.ignore_index:
            raise ValueError(
                f"data.ignore_index {config.ignore_index} is the id of a class, as there are "
                f"{len(classes)}: set it to 65535"
            )
        self.config, self.classes, self.ignore = config, tuple(classes), config.ignore_index
        self.dtype = np.uint8 if self.ignore <= 255 else np.int32
        table = self._id_table()
        self._ids = _sorted_table(table)
        # The id that a segment has whose category says the name of a class.
        self._named = {self.classes[c]: i for i, c in table.items() if c < len(self.classes)}
        self._colours = _sorted_table(
            {
                int(_codes(np.array(colour))): self._number(name, "palette")
                for name, colour in config.palette.items()
            }
        )

    def _id_table(self) -> dict[int, int]:
        """Maps each id in a file to a class or the ignore index."""
        config = self.config
        table = {config.ignore_index: self.ignore}
        if config.label_map:
            return table | {i: self._number(to, "label_map") for i, to in config.label_map.items()}
        if config.reduce_zero_label:
            return table | {0: self.ignore} | {i + 1: i for i in range(len(self.classes))}
        return table | {i: i for i in range(len(self.classes))}

    def _number(self, name: int | str, key: str) -> int:
        if name == IGNORE or name == self.ignore:
            return self.ignore
        if isinstance(name, int) and 0 <= name < len(self.classes):
            return name
        if name in self.classes:
            return self.classes.index(str(name))
        raise ValueError(
            f"data.{key}: {name!r} is none of the {len(self.classes)} classes"
            f"{nearest(str(name), self.classes)}"
        )

    def read(self, row: Mapping[str, Any], size: tuple[int, int]) -> np.ndarray:
        """Reads the class of each pixel from a row's mask or COCO segments.

        Args:
            size: (H, W) of the row's image, upright.

        Returns:
            (H, W) in `dtype`.

        Raises:
            BadRow: the mask cannot be read, has another size than the image, or holds an unknown
                id or colour.
        """
        if row.get("mask") is not None:
            values = read_mask(row["mask"])
            shape = (values.shape[0], values.shape[1])
            values = drawn_mask(row, shape, size, self.config.drawn_on).upright(values)
            if values.shape[:2] != tuple(size):
                raise BadRow(
                    f"the mask has {values.shape[0]}×{values.shape[1]} pixels, the image "
                    f"{size[0]}×{size[1]} (height × width)"
                )
        elif row.get("segments") is not None:
            drawn = drawn_segments(row, size, self.config.drawn_on)
            values = draw_segments(
                row["segments"],
                drawn.size,
                unsegmented=self.config.unsegmented,
                crowd=self.ignore,
                named=self._named,
            )
            values = drawn.upright(values)
        else:
            raise BadRow("there is neither a mask nor segments")
        return self.map(values)

    def drawn(self, row: Mapping[str, Any], size: tuple[int, int], *, guesses: bool) -> Drawn:
        """Returns how a row's mask or segments were drawn; see `orientation`.

        Raises:
            BadRow: they cannot be read.
        """
        if row.get("mask") is None:
            return drawn_segments(row, size, self.config.drawn_on, guesses=guesses)
        shape = image_size(row["mask"])
        if shape is None:  # an array
            shape = read_mask(row["mask"]).shape[:2]
        return drawn_mask(row, shape, size, self.config.drawn_on, guesses=guesses)

    def map(self, values: np.ndarray) -> np.ndarray:
        """Maps the ids (H, W) or colours (H, W, 3) uint8 of a file to classes (H, W).

        Raises:
            BadRow: an id or a colour is unknown.
        """
        if values.ndim == 3:
            if self.config.palette:
                return self._look_up(_codes(values), self._colours, colours=True)
            if (values != values[:, :, :1]).any():
                raise BadRow("the mask is in colours: say what they mean in data.palette")
            values = values[:, :, 0].astype(np.int64)
        return self._look_up(values, self._ids, colours=False)

    def _look_up(
        self, codes: np.ndarray, table: tuple[np.ndarray, np.ndarray], *, colours: bool
    ) -> np.ndarray:
        keys, numbers = table
        places = np.searchsorted(keys, codes)
        places[places == len(keys)] = 0
        if (strange := keys[places] != codes).any():
            raise BadRow(self._strange(codes[strange], colours=colours))
        return numbers[places].astype(self.dtype)

    def _strange(self, codes: np.ndarray, *, colours: bool) -> str:
        unknown, counts = np.unique(codes, return_counts=True)
        ordered = unknown[np.argsort(-counts, kind="stable")].tolist()
        named = [str(_colour(code)) if colours else str(code) for code in ordered[:SHOWN]]
        more = f" and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else ""
        lossy = "; was it saved as JPEG?" if len(ordered) > 20 else ""
        if colours:
            return f"data.palette does not name the mask's {', '.join(named)}{more}{lossy}"
        last = len(self.classes) - 1 + self.config.reduce_zero_label
        listed = "what data.label_map lists" if self.config.label_map else f"0 to {last}"
        return (
            f"the mask holds {', '.join(named)}{more}, where ids are {listed} and "
            f"{self.config.ignore_index} (ignored){lossy or '; map them by data.label_map'}"
        )


def class_names(config: SegmentationDataConfig, rows: Rows | None) -> list[str]:
    """Returns the classes of a config, or those of the training masks if it has none.

    Args:
        rows: training rows, or None.

    Raises:
        ValueError: neither has classes, or there is only one.
    """
    names = list(config.classes)
    names = names or [name for name in config.palette if name != IGNORE]
    names = names or _mapped(config.label_map.values())
    if not names and rows is not None:
        names = _categories_of(rows)
        if names and config.unsegmented != config.ignore_index:
            outside = config.background or "background"
            names = [outside, *(name for name in names if name != outside)]
    if not names and rows is not None and hasattr(rows, "__len__"):
        names = [str(number) for number in range(_highest(config, rows) + 1)]
    if not names:
        raise ValueError(
            "name the classes by data.classes: there are no training masks to find them in"
        )
    if len(names) < 2:
        raise ValueError(
            f"there is only one class, {names[0]!r}: name all by data.classes, the "
            "background too; where masks hold 0 and 255, by data.label_map: {0: background, 255: "
            "object}"
        )
    return names


def check_outside(config: SegmentationDataConfig, names: Sequence[str], rows: Rows | None) -> None:
    """Checks that the pixels outside of all segments do not count as a class of segments.

    Args:
        names: the classes.
        rows: training rows, or None.

    Raises:
        ValueError: they do.
    """
    if rows is None or not config.classes or config.label_map:
        return
    place = config.unsegmented - config.reduce_zero_label
    outside = names[place] if 0 <= place < len(names) else None
    if outside is not None and outside != config.background and outside in _categories_of(rows):
        raise ValueError(
            f"data.classes: pixels outside of all segments have the id {config.unsegmented}, which "
            f"is the class {outside!r}, and segments have that class too: put "
            f"{config.background or 'background'!r} before it, or set data.unsegmented: "
            f"{config.ignore_index} to ignore those pixels"
        )


def _categories_of(rows: Rows) -> list[str]:
    """Returns the names of the categories of COCO segments, as far as the rows say them.

    The feature of a column `categories` has all of them; otherwise those of the segments are taken.
    """
    feature = (getattr(rows, "features", None) or {}).get("categories")
    if names := getattr(getattr(feature, "feature", None), "names", None):
        return list(names)
    if "segments" not in rows.column_names or not hasattr(rows, "__len__"):
        return []
    there: set[str] = set()
    for segments in rows["segments"]:
        try:
            names = category_names(segments)
        except BadRow:
            continue
        if None in names:
            return []
        there.update(map(str, names))
    return sorted(there)


def _mapped(targets: Iterable[int | str]) -> list[str]:
    """Returns the classes that a label_map names."""
    named = dict.fromkeys(to for to in targets if to != IGNORE)
    if all(isinstance(to, int) for to in named):
        return [str(number) for number in range(max(map(int, named), default=-1) + 1)]
    return [str(to) for to in named]


def _highest(config: SegmentationDataConfig, rows: Rows) -> int:
    """Returns the highest class in the training masks, or −1 if there is none."""
    highest = -1
    for index in range(len(rows)):
        try:
            ids = _ids_of(rows[index], config)
        except BadRow:
            continue
        valid = ids[ids != config.ignore_index]
        highest = max(highest, int(valid.max(initial=-1)) - config.reduce_zero_label)
    return highest


def _ids_of(row: Mapping[str, Any], config: SegmentationDataConfig) -> np.ndarray:
    """Returns the ids in a row's mask or segments, in any shape."""
    if row.get("mask") is None:
        return category_ids(row.get("segments"), unsegmented=config.unsegmented)
    values = read_mask(row["mask"])
    if values.ndim == 2:
        return values
    if (values != values[:, :, :1]).any():
        raise ValueError("the masks are in colours: say what they mean in data.palette")
    return values[:, :, 0].astype(np.int64)


def _sorted_table(table: Mapping[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the sorted keys, for a binary search, and their values."""
    keys = np.array(sorted(table), dtype=np.int64)
    return keys, np.array([table[key] for key in keys.tolist()], dtype=np.int64)


def _codes(colours: np.ndarray) -> np.ndarray:
    """Encodes colours (…, 3) uint8 as numbers (…) int64."""
    red, green, blue = np.moveaxis(colours.astype(np.int64), -1, 0)
    return (red << 16) | (green << 8) | blue


def _colour(code: int) -> tuple[int, int, int]:
    return code >> 16, code >> 8 & 255, code & 255
