"""What masks of every kind become: class ids, and what is refused."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmadapters.tasks.core.errors import BadRow
from mmadapters.tasks.data.media import read_image
from mmadapters.tasks.segmentation.config import SegmentationDataConfig
from mmadapters.tasks.segmentation.labels import Labels, class_names

IDS = np.array([[0, 1, 2], [2, 255, 0]])
SIZE = (2, 3)


class Masks:
    """Rows of masks."""

    column_names = ("image", "mask")

    def __init__(self, *masks: Any) -> None:
        self.masks = masks

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, key: Any) -> Any:
        return {"image": None, "mask": self.masks[key]}


def config(**options: Any) -> SegmentationDataConfig:
    return SegmentationDataConfig(source="none", **options)


def labels(*classes: str, **options: Any) -> Labels:
    own = config(classes=classes, **options)
    return Labels(own, class_names(own, None))


def png(ids: np.ndarray, *, mode: str) -> dict[str, bytes]:
    """A mask as a file: indexed with a palette, 8- or 16-bit grey, or grey saved as RGB."""
    if mode == "I;16":
        image = Image.fromarray(ids.astype(np.uint16))
    else:
        image = Image.fromarray(ids.astype(np.uint8))
    if mode == "P":
        image.putpalette([3 * i % 256 for i in range(768)])
    if mode == "RGB":
        image = image.convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue()}


@pytest.mark.parametrize("mode", ["P", "L", "I;16", "RGB"])
def test_ids_stay_ids_whatever_the_file(mode: str) -> None:
    read = labels("a", "b", "c").read({"mask": png(IDS, mode=mode)}, SIZE)
    assert read.dtype == np.uint8
    assert np.array_equal(read, IDS)


def test_sixteen_bits_hold_more_classes_than_a_byte() -> None:
    names = [f"class {number}" for number in range(847)]
    many = labels(*names, ignore_index=65535)
    ids = np.array([[0, 846], [300, 65535]])
    read = many.read({"mask": png(ids, mode="I;16")}, (2, 2))
    assert read.dtype == np.int32
    assert np.array_equal(read, ids)
    with pytest.raises(ValueError, match="set it to 65535"):
        labels(*names)


def test_reduce_zero_label_ignores_0_and_shifts_the_rest() -> None:
    reduced = labels("a", "b", reduce_zero_label=True)
    assert reduced.map(IDS).tolist() == [[255, 0, 1], [1, 255, 255]]
    assert labels("a", "b", "c").map(IDS).tolist() == IDS.tolist()


def test_label_map_says_what_ids_mean() -> None:
    """By name or number; 255 may be a class; what it does not list is refused."""
    both = labels("background", "nucleus", label_map={0: "background", 255: "nucleus", 7: "ignore"})
    assert both.map(np.array([[0, 255, 7]])).tolist() == [[0, 1, 255]]
    merged = labels("a", "b", label_map={3: 0, 9: 1, 4: 1})
    assert merged.map(np.array([[3, 9, 4, 255]])).tolist() == [[0, 1, 1, 255]]
    with pytest.raises(BadRow, match=r"holds 0, 1, where ids are what data\.label_map lists"):
        merged.map(np.array([[0, 1, 3]]))


def test_colours_are_those_of_the_palette() -> None:
    palette = {"road": [128, 64, 128], "sky": [70, 130, 180], "ignore": [224, 224, 192]}
    coloured = labels(palette=palette)
    assert coloured.classes == ("road", "sky")
    mask = np.array([[palette["sky"], palette["road"]], [palette["ignore"], palette["sky"]]])
    assert coloured.map(mask.astype(np.uint8)).tolist() == [[1, 0], [255, 1]]
    mask[0, 0] = (1, 2, 3)
    with pytest.raises(BadRow, match=r"does not name the mask's \(1, 2, 3\)"):
        coloured.map(mask.astype(np.uint8))
    # An indexed mask keeps its ids beside a palette.
    assert coloured.map(np.array([[1, 0, 255]])).tolist() == [[1, 0, 255]]


def test_a_mask_in_colours_needs_a_palette() -> None:
    mask = np.zeros((2, 2, 3), dtype=np.uint8)
    mask[0, 0] = (9, 0, 0)
    with pytest.raises(BadRow, match=r"data\.palette"):
        labels("a", "b").map(mask)


def test_unmapped_ids_are_named_the_commonest_first() -> None:
    mask = np.array([[9, 9, 9, 4], [4, 0, 1, -1]])
    with pytest.raises(BadRow, match=r"holds 9, 4, -1, where ids are 0 to 1 and 255 \(ignored\)"):
        labels("a", "b").map(mask)
    lossy = np.arange(2, 102).reshape(10, 10)
    with pytest.raises(BadRow, match=r"and 95 more.*saved as JPEG"):
        labels("a", "b").map(lossy)


def test_another_size_than_the_image_is_refused() -> None:
    with pytest.raises(BadRow, match="mask has 2×3 pixels, the image 3×2"):
        labels("a", "b", "c").read({"mask": png(IDS, mode="L")}, (3, 2))


def test_segments_take_the_place_of_a_mask() -> None:
    row = {
        "mask": None,
        "segments": [{"category_id": 18, "segmentation": [[0, 0, 2, 0, 2, 2, 0, 2]]}],
    }
    mapped = labels("background", "dog", label_map={0: 0, 18: "dog"})
    assert mapped.read(row, SIZE).tolist() == [[1, 1, 0], [1, 1, 0]]
    with pytest.raises(BadRow, match="neither a mask nor segments"):
        mapped.read({"mask": None, "segments": None}, SIZE)


def test_names_come_from_the_config_or_from_the_masks() -> None:
    assert class_names(config(classes=["a", "b"]), None) == ["a", "b"]
    assert class_names(config(palette={"x": [0, 0, 0], "y": [1, 1, 1]}), None) == ["x", "y"]
    assert class_names(config(label_map={0: "x", 4: "y", 5: "x", 6: "ignore"}), None) == ["x", "y"]
    assert class_names(config(label_map={0: 0, 4: 2, 5: 1}), None) == ["0", "1", "2"]
    rows = Masks(png(IDS, mode="P"), None, {"bytes": b"broken"})
    assert class_names(config(), rows) == ["0", "1", "2"]
    assert class_names(config(reduce_zero_label=True), rows) == ["0", "1"]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (None, {}, "name the classes by data.classes"),
        (Masks(np.array([[0, 255]])), {}, r"only one class.*255: object"),
        (Masks(np.full((2, 2, 3), [1, 2, 3], dtype=np.uint8)), {}, r"data\.palette"),
        (None, {"classes": ["alone"]}, "only one class, 'alone'"),
    ],
)
def test_no_task_without_two_classes(rows: Any, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        class_names(config(**options), rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ["a", "a"]}, "same name"),
        ({"classes": ["a", "ignore"]}, "'ignore'"),
        ({"reduce_zero_label": True, "label_map": {0: 0}}, "label_map alone"),
        ({"classes": ["a", "b"], "palette": {"c": [0, 0, 0]}}, "'c' is none of the classes"),
        ({"palette": {"a": [0, 0, 0], "b": [0, 0, 0]}}, "same colour"),
        ({"palette": {"a": [0, 0, 256]}}, "less than or equal to 255"),
    ],
)
def test_configs_that_contradict_themselves_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_a_label_map_to_nowhere_names_the_nearest_class() -> None:
    with pytest.raises(ValueError, match=r"'nucleas' is none of the 2 classes.*'nucleus'"):
        labels("background", "nucleus", label_map={1: "nucleas"})


def test_masks_of_the_real_data_are_read(shared_dir: Path) -> None:
    folder = shared_dir / "data" / "nuclei"
    if not folder.is_dir():
        pytest.skip("no nuclei data")
    real = labels("background", "nucleus")
    with Image.open(folder / "images" / "0000.jpg") as image:
        size = (image.height, image.width)
    mask = real.read({"mask": str(folder / "masks" / "0000.png")}, size)
    assert set(np.unique(mask)) == {0, 1}


# Pictures that are turned by their EXIF data


def turned_picture(orientation: int, size: tuple[int, int]) -> tuple[dict[str, bytes], np.ndarray]:
    """A picture as a file, and its stored pixels: a class in each corner."""
    ids = np.zeros(size, dtype=np.uint8)
    ids[0, 0], ids[0, -1], ids[-1, 0] = 1, 2, 3
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(ids).save(buffer, "PNG", exif=exif)
    return {"bytes": buffer.getvalue()}, ids


def upright(picture: dict[str, bytes]) -> np.ndarray:
    return np.asarray(read_image(picture))[:, :, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_masks_of_stored_pixels_are_turned_with_the_picture(orientation: int) -> None:
    picture, ids = turned_picture(orientation, (4, 6))
    truth = upright(picture)
    stored = {"image": picture, "mask": png(ids, mode="L")}
    drawn = {"image": picture, "mask": png(truth, mode="L")}
    itself = {"image": picture, "mask": picture}
    names = ("a", "b", "c", "d")
    auto, after, before = (labels(*names, drawn_on=how) for how in ("auto", "upright", "stored"))
    for reader, row in ((before, stored), (auto, drawn), (after, drawn), (before, itself)):
        np.testing.assert_array_equal(reader.read(row, truth.shape), truth)
    np.testing.assert_array_equal(auto.read(itself, truth.shape), truth)
    if orientation >= 5:  # the sides are exchanged, so sizes tell
        np.testing.assert_array_equal(auto.read(stored, truth.shape), truth)
        with pytest.raises(BadRow, match="the mask has 4×6 pixels, the image 6×4"):
            after.read(stored, truth.shape)


def test_segments_of_stored_pixels_are_turned_with_the_picture() -> None:
    picture, _ = turned_picture(6, (4, 6))
    box = [[0, 0, 6, 0, 6, 1, 0, 1]]  # the upper line of the stored picture, right when upright
    counts = [0, 1, 3, 1, 3, 1, 3, 1, 3, 1, 3, 1, 3]
    rle = {"size": [4, 6], "counts": counts}
    expected = np.zeros((6, 4), np.uint8)
    expected[:, 3] = 1
    auto, before = labels("a", "b"), labels("a", "b", drawn_on="stored")
    for shape, reader, more in (
        (box, auto, {}),  # too wide for the upright picture
        (box, auto, {"height": 4, "width": 6}),
        (rle, auto, {}),
        (box, before, {}),
    ):
        segments = [{"category_id": 1, "segmentation": shape}]
        row = {"image": picture, "segments": segments, **more}
        np.testing.assert_array_equal(reader.read(row, (6, 4)), expected)
    row = {"image": picture, "segments": [{"category_id": 1, "segmentation": box}]}
    stated = {**row, "height": 6, "width": 4}
    assert auto.read(stated, (6, 4))[0].tolist() == [1, 1, 1, 1]
