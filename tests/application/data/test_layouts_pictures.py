"""Layouts of pictures with masks or outlines, as published data sets have them, and files that are
passed over."""

from __future__ import annotations

import base64
import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import nn

import mmadapters
from mmadapters.tasks.classification.task import ClassificationTask
from mmadapters.tasks.config.schema import DataConfig, Split
from mmadapters.tasks.core.findings import Finding
from mmadapters.tasks.core.rows import Rows
from mmadapters.tasks.data import media
from mmadapters.tasks.data.doctor import examine, look
from mmadapters.tasks.data.load import load_splits
from mmadapters.tasks.segmentation.config import SegmentationConfig
from mmadapters.tasks.segmentation.task import SegmentationTask

SIZE = (6, 8)  # height, width
SQUARE = [1, 1, 5, 1, 5, 5, 1, 5]  # x from 1 to 4, y from 1 to 4


def picture(file: Path, red: int = 1) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", SIZE[::-1], (red, 0, 0))
    image.putpixel((7, 5), (0, 200, 0))
    image.save(file, "PNG" if file.suffix == ".jpg" else None)  # lossless, whatever the name says
    return file


def mask(file: Path, value: int = 1, *, palette: bool = False) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("P" if palette else "L", SIZE[::-1], value)
    if palette:
        image.putpalette([*(0, 0, 0), *(128, 0, 0), *(0, 128, 0)] + [9] * (3 * 253))
        image.putpixel((0, 0), 255)
    for other in range(value):  # a GIF file keeps the ids that occur
        image.putpixel((1 + other, 0), other)
    image.save(file)
    return file


def write(file: Path, text: str = "") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


def load(source: Path, **settings: Any) -> dict[Split, Rows]:
    return load_splits(DataConfig(source=str(source), **settings), SegmentationTask.columns)


def classes(source: Path, **settings: Any) -> dict[Split, Rows]:
    return load_splits(DataConfig(source=str(source), **settings), ClassificationTask.columns)


def refused(message: str, source: Path, read: Any = load, **settings: Any) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read(source, **settings)
    assert "\n" not in str(caught.value)


def values(rows: Rows) -> list[tuple[int, int | None]]:
    """Returns the red of each picture, and the id in the middle of its mask."""
    pairs = []
    for row in rows:
        label = None if row["mask"] is None else int(media.read_mask(row["mask"])[3, 3])
        pairs.append((media.read_image(row["image"]).getpixel((0, 0))[0], label))
    return pairs


def every_pair(splits: dict[Split, Rows]) -> dict[str, list[tuple[int, int | None]]]:
    return {split: values(rows) for split, rows in splits.items()}


PAIRS = {"train": [(1, 1), (2, 2)], "validation": [(3, 3)]}


@cache
def encoder() -> nn.Module:
    return mmadapters.load_backbone("nano/vit")


def fitted(source: Path, **data: Any) -> tuple[SegmentationTask, dict[Split, Rows]]:
    config = SegmentationConfig(backbone={"name": "nano/vit"}, data={"source": str(source), **data})
    splits = load_splits(config.data, SegmentationTask.columns)
    task = SegmentationTask(config)
    task.fit(splits["train"], encoder())
    return task, splits


def drawn(task: SegmentationTask, rows: Rows) -> list[list[int]]:
    """Returns the classes that each row has."""
    return [sorted(set(task.labels.read(row, SIZE).ravel().tolist())) for row in rows]


# Pictures and masks that are paired by their names


@pytest.mark.parametrize(
    ("of_picture", "of_mask"),
    [
        ("img_dir/{split}/{n}.jpg", "ann_dir/{split}/{n}.png"),
        ("img_dir/{split}/{n}.jpg", "ann_dir/{split}/{n}_labelTrainIds.png"),
        ("img_dir/{split}/{n}_leftImg8bit.png", "ann_dir/{split}/{n}_gtFine_labelTrainIds.png"),
        ("{split}/{n}.jpg", "{split}_masks/{n}_mask.gif"),
        ("images/{split}/{n}.jpg", "masks/{split}/{n}-mask.png"),
        ("images/{split}/{n}.jpg", "masks/{n}_gt.png"),
        ("{split}/images/{n}.jpg", "{split}/labels/{n}_seg.png"),
        ("{split}/{n}.jpg", "{split}annot/{n}.png"),
        ("images/{split}/image_{n}.png", "masks/{split}/mask_{n}.png"),
        ("images/{split}/{n}.png", "annotations/trimaps/{split}/{n}.png"),
        ("images/{split}/{n}.png", "masks/{split}/{n}_lesion.png"),
        ("photos_{split}/{n}.png", "gt_{split}/{n}.png"),
        ("{split}/a/{n}.png", "{split}/b/{n}.png"),  # the masks have one channel
        ("images/{split}/{n}.png", "tumours/{split}/{n}.png"),
        ("raw/{split}/{n}.png", "masks/{split}/{n}.png"),
        ("{split}/{n}.jpg", "{split}/{n}_mask.png"),
        ("{split}/{n}_sat.jpg", "{split}/{n}_mask.png"),
        ("{split}/{n}.jpg", "{split}/{n}.png"),
    ],
)
def test_pairs_by_name(tmp_path: Path, of_picture: str, of_mask: str) -> None:
    for split, number in (("train", 1), ("train", 2), ("val", 3)):
        picture(tmp_path / of_picture.format(split=split, n=f"x_{number}"), number)
        mask(tmp_path / of_mask.format(split=split, n=f"x_{number}"), number)
    assert every_pair(load(tmp_path)) == PAIRS
    chosen = load(tmp_path, splits={"train": "val", "validation": "train"})
    assert every_pair(chosen) == {"train": PAIRS["validation"], "validation": PAIRS["train"]}


def test_ade20k(tmp_path: Path) -> None:
    folder = tmp_path / "ADEChallengeData2016"
    for split, name, number in (("training", "train", 1), ("validation", "val", 2)):
        picture(folder / "images" / split / f"ADE_{name}_0000000{number}.jpg", number)
        mask(folder / "annotations" / split / f"ADE_{name}_0000000{number}.png", number)
    write(folder / "sceneCategories.txt", "ADE_train_00000001 kitchen\n")
    assert every_pair(load(folder)) == {"train": [(1, 1)], "validation": [(2, 2)]}
    full = tmp_path / "full" / "training" / "kitchen"
    picture(full / "ADE_train_00000001.jpg")
    picture(full / "ADE_train_00000001_seg.png")
    refused("the full ADE20K, which holds classes in two channels: use", tmp_path / "full")


def test_ids_of_training_come_before_other_ids_and_colours_are_no_masks(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a.png")
    for value, name in enumerate(("a", "a_labelIds", "a_labelTrainIds", "a_color"), 3):
        mask(tmp_path / "labels" / f"{name}.png", value)
    assert every_pair(load(tmp_path)) == {"train": [(1, 5)]}


def test_several_masks_of_a_picture_are_refused(tmp_path: Path) -> None:
    picture(tmp_path / "benign" / "benign (1).png")
    for name in ("_mask", "_mask_1"):
        mask(tmp_path / "benign" / f"benign (1){name}.png")
    refused(r"benign \(1\).png has several masks \(.*_mask.png, .*_mask_1.png\): put", tmp_path)
    twice = tmp_path / "twice"
    for place in ("raw/a.png", "hq/a.png"):
        picture(twice / place)
    mask(twice / "masks" / "a.png")
    refused("masks/a.png fits several pictures .hq/a.png, raw/a.png.: leave one", twice)
    nuclei = tmp_path / "stage1"
    picture(nuclei / "abc" / "images" / "abc.png")
    for name in ("00f", "1ac"):
        mask(nuclei / "abc" / "masks" / f"{name}.png")
    refused("no image and mask have the same name .*put all objects of a picture", nuclei)


def test_folders_that_nothing_tells_apart_are_refused(tmp_path: Path) -> None:
    for place in ("a", "b"):
        picture(tmp_path / place / "1.png")
    refused("the folders a, b of .* hold files of the same names, .* rename", tmp_path)
    picture(tmp_path / "alone" / "cat" / "1.png")
    refused("nothing in .* is a mask of a picture .cat/1.png.: put the masks", tmp_path / "alone")
    write(tmp_path / "none" / "masks" / "1.npy")
    refused("holds no picture that can be read; it has 1 .npy", tmp_path / "none")
    picture(tmp_path / "none" / "images" / "1.png")
    refused("; 1 .npy among the masks are not read: put", tmp_path / "none")


def test_what_is_in_no_pair_is_told(tmp_path: Path) -> None:
    for number in (1, 2):
        picture(tmp_path / "train" / f"{number}.jpg", number)
        picture(tmp_path / "train_hq" / f"{number}.jpg", number)
        mask(tmp_path / "train_masks" / f"{number}_mask.gif", number)
        picture(tmp_path / "test" / f"{number}.jpg", number)
    mask(tmp_path / "train_masks" / "9_mask.gif")
    write(tmp_path / "train" / "3.heic")
    assert list(load(tmp_path)) == ["train"]  # the pictures of test are published without masks
    told = findings(*fitted(tmp_path))
    assert [str(finding) for finding in told][:3] == [
        f"2 pictures in {tmp_path} are passed over, since nothing in the same folder has a mask "
        "(train_hq/1.jpg, train_hq/2.jpg): move them elsewhere, or name their masks like them",
        f"1 mask in {tmp_path} is passed over, since no picture has such a name "
        "(train_masks/9_mask.gif): name each picture like its mask",
        f"1 .heic file in {tmp_path} is passed over (train/3.heic): convert them, as by magick "
        "3.heic 3.png",
    ]


def test_root_is_where_the_pictures_of_masks_lie(tmp_path: Path) -> None:
    for split, number in (("train", 1), ("train", 2), ("val", 3)):
        picture(tmp_path / "pictures" / split / f"{number}.png", number)
        mask(tmp_path / "drawn" / split / f"{number}_mask.png", number)
    splits = load(tmp_path / "drawn", root=str(tmp_path / "pictures"))
    assert every_pair(splits) == PAIRS


def test_carvana_and_its_tables(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "a_01.jpg", 4)
    frames = [Image.new("P", SIZE[::-1], value) for value in (1, 0)]
    for frame in frames:
        frame.putpalette([0, 0, 0, 255, 255, 255])
        frame.putpixel((0, 0), 0)
        frame.putpixel((1, 0), 1)
    place = tmp_path / "train_masks" / "a_01_mask.gif"
    place.parent.mkdir()
    frames[0].save(place, save_all=True, append_images=frames[1:])
    write(tmp_path / "train_masks.csv", "img,rle_mask\na_01.jpg,1 2\n")
    write(tmp_path / "metadata.csv", "id,year,make,model\na,2001,x,y\n")
    assert every_pair(load(tmp_path)) == {"train": [(4, 1)]}


# Published data sets


@pytest.fixture
def pascal(tmp_path: Path) -> Path:
    folder = tmp_path / "VOCdevkit" / "VOC2012"
    for number, value in (("2007_1", 1), ("2007_2", 2), ("2007_3", 1)):
        picture(folder / "JPEGImages" / f"{number}.jpg", int(number[-1]))
        mask(folder / "SegmentationClass" / f"{number}.png", value, palette=True)
    picture(folder / "JPEGImages" / "2007_4.jpg")
    lists = {"train": ("2007_1", "2007_2"), "val": ("2007_3",), "test": ("2007_4",)}
    for name, names in {**lists, "trainval": (*lists["train"], *lists["val"])}.items():
        write(folder / "ImageSets" / "Segmentation" / f"{name}.txt", "\n".join(names) + "\n")
    write(folder / "Annotations" / "2007_1.xml", "<annotation/>")
    return folder


def test_voc(pascal: Path) -> None:
    for source in (pascal, pascal.parent, pascal.parent.parent):
        splits = every_pair(load(source))
        assert splits == {"train": [(1, 1), (2, 2)], "validation": [(3, 1)]}
    assert len(load(pascal, splits={"train": "trainval"})["train"]) == 3
    task, splits = fitted(pascal, classes=["background", "aeroplane", "bicycle"])
    assert drawn(task, splits["train"]) == [
        [0, 1, 255],
        [0, 1, 2, 255],
    ]  # indices, and the border ignored
    refused("as PASCAL VOC, which task: segmentation reads, and this task", pascal, classes)
    (pascal / "SegmentationClass").rename(pascal / "SegmentationObject")
    refused("has no SegmentationClass/: from the boxes in Annotations/ no masks", pascal)


def test_voc_with_pictures_elsewhere_and_paths_in_its_lists(pascal: Path, tmp_path: Path) -> None:
    (pascal / "JPEGImages").rename(tmp_path / "pictures")
    name = "/JPEGImages/2007_2.jpg /SegmentationClass/2007_1.png\n"
    write(pascal / "ImageSets" / "Segmentation" / "train.txt", name)
    refused("say in data.root where JPEGImages/ lies", pascal)
    assert every_pair(load(pascal, root=str(tmp_path / "pictures")))["train"] == [(2, 1)]


def test_cityscapes(tmp_path: Path) -> None:
    for split, city, number in (("train", "aachen", 1), ("train", "bonn", 2), ("val", "ulm", 3)):
        name = f"{city}_000000_000019"
        picture(tmp_path / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", number)
        mask(tmp_path / "gtFine" / split / city / f"{name}_gtFine_labelIds.png", number)
        mask(tmp_path / "gtFine" / split / city / f"{name}_gtFine_color.png", 4)
    splits = load(tmp_path)
    assert every_pair(splits) == PAIRS
    assert splits["train"]["city"][:] == ["aachen", "bonn"]
    for file in list(tmp_path.glob("gtFine/*/*/*labelIds.png")):
        mask(Path(str(file).replace("labelIds", "labelTrainIds")), 0)
    assert {id_ for _, id_ in values(load(tmp_path)["train"])} == {0}
    (tmp_path / "leftImg8bit").rename(tmp_path.parent / f"{tmp_path.name}_pictures")
    root = str(tmp_path.parent / f"{tmp_path.name}_pictures")
    assert len(load(tmp_path, root=root)["validation"]) == 1
    refused("laid out as Cityscapes, which task: segmentation", tmp_path, classes, root=root)


CAT = {"id": 17, "name": "cat", "supercategory": "animal"}
DOG = {"id": 18, "name": "dog", "supercategory": "animal"}


def coco(file: Path, name: str = "1.png", **changes: Any) -> Path:
    crowd = np.zeros(SIZE, bool)
    crowd[:, 7] = True
    outlines: list[Any] = [[SQUARE], {"size": [*SIZE], "counts": [42, 6]}]
    notes = [
        {"id": 1, "image_id": 5, "category_id": 17, "segmentation": outlines[0], "iscrowd": 0},
        {"id": 2, "image_id": 5, "category_id": 18, "segmentation": outlines[1], "iscrowd": 1},
    ]
    images = [{"id": 5, "file_name": name, "height": SIZE[0], "width": SIZE[1]}]
    content = {"info": {}, "images": images, "annotations": notes, "categories": [CAT, DOG]}
    return write(file, json.dumps(content | changes))


def test_coco_instances(tmp_path: Path) -> None:
    for name in ("train2017", "val2017"):
        coco(tmp_path / "annotations" / f"instances_{name}.json")
        write(tmp_path / "annotations" / f"captions_{name}.json", '{"images": []}')
        picture(tmp_path / name / "1.png", 1 if name == "train2017" else 2)
    task, splits = fitted(tmp_path)
    assert list(splits) == ["train", "validation"]
    # Names come from the file, also those of classes that no row has.
    assert task.classes == ("background", "cat", "dog")
    for split, red in (("train", 1), ("validation", 2)):
        (row,) = splits[split]
        label = task.labels.read(row, SIZE)
        assert (label[2, 2], label[0, 0], label[0, 7]) == (1, 0, 255)
        assert media.read_image(row["image"]).getpixel((0, 0))[0] == red
    only = load(tmp_path, splits={"train": "val2017"}, limit={"train": 1})
    assert only["train"]["image_id"][:] == ["5"]
    one = tmp_path / "annotations" / "instances_val2017.json"
    assert len(load(one)["train"]) == 1
    (tmp_path / "val2017").rename(tmp_path / "elsewhere")
    assert len(load(one, root=str(tmp_path / "elsewhere"))["train"]) == 1
    refused("laid out as COCO's instances, which task: segmentation", one, classes)


def test_coco_by_ids_and_by_chosen_classes(tmp_path: Path) -> None:
    file = coco(tmp_path / "labels.json")
    picture(tmp_path / "data" / "1.png")
    task, splits = fitted(file, label_map={0: "background", 17: "animal", 18: "animal"})
    assert drawn(task, splits["train"]) == [[0, 1, 255]]
    task, splits = fitted(tmp_path, classes=["background", "dog", "cat"])
    assert drawn(task, splits["train"]) == [[0, 2, 255]]
    with pytest.raises(ValueError, match=r"have the id 0, which is the class 'cat', .*put 'backg"):
        fitted(file, classes=["cat", "dog"])
    task, splits = fitted(file, unsegmented=255)
    assert task.classes == ("cat", "dog")
    assert drawn(task, splits["train"]) == [[0, 255]]


def test_roboflows_export(tmp_path: Path) -> None:
    heading = {"id": 0, "name": "animals", "supercategory": "none"}
    for name in ("train", "valid", "test"):
        categories = [heading, CAT, DOG]
        coco(tmp_path / name / "_annotations.coco.json", categories=categories)
        picture(tmp_path / name / "1.png")
    write(tmp_path / "README.roboflow.txt")
    task, splits = fitted(tmp_path)
    assert list(splits) == ["train", "validation", "test"]
    assert task.classes == ("background", "cat", "dog")
    assert drawn(task, splits["test"]) == [[0, 1, 255]]
    assert list(load(tmp_path / "valid")["train"].features) == list(splits["train"].features)


def test_faults_of_coco_files_are_told(tmp_path: Path) -> None:
    picture(tmp_path / "1.png")
    file = tmp_path / "instances_all.json"
    note = {"image_id": 5, "category_id": 17}
    for message, changes in {
        "annotations 0 is of the image 9, and no image": {"annotations": [note | {"image_id": 9}]},
        "annotations 0 has the category 3, and no cat": {
            "annotations": [note | {"category_id": 3}]
        },
        "has boxes alone, from which no masks": {"annotations": [note | {"bbox": [0, 0, 1, 1]}]},
        "images 0 has no 'file_name'": {"images": [{"id": 5}]},
        "names the picture 2.png, .* data.root": {"images": [{"id": 5, "file_name": "2.png"}]},
    }.items():
        coco(file, **changes)
        refused(message, tmp_path)
    write(file, file.read_text()[:-9])
    refused("instances_all.json cannot be read: line 1, column .* is not valid JSON", tmp_path)
    panoptic = tmp_path / "panoptic" / "annotations" / "panoptic_val2017.json"
    write(panoptic, '{"images": [], "annotations": [], "categories": []}')
    refused("panoptic annotations, which are not read: convert", tmp_path / "panoptic")


def test_segments_without_an_outline_are_noted(tmp_path: Path) -> None:
    note = {"image_id": 5, "category_id": 17}
    notes = [note | {"segmentation": [SQUARE]}, note | {"segmentation": [], "bbox": [0, 0, 1, 1]}]
    coco(tmp_path / "instances_x.json", annotations=notes)
    picture(tmp_path / "1.png")
    task, splits = fitted(tmp_path)
    (problem,) = task.check(splits["train"])
    assert problem.reason.startswith("segments 1 have no outline")


def test_labelme(tmp_path: Path) -> None:
    def shape(label: str, points: Any, kind: str = "polygon", **more: Any) -> dict[str, Any]:
        return {"label": label, "points": points, "shape_type": kind, **more}

    def note(file: Path, *shapes: dict[str, Any], path: str = "") -> None:
        content = {"version": "5.4.1", "flags": {}, "shapes": shapes}
        content |= {"imagePath": path or f"{file.stem}.png", "imageData": "A" * 9000}
        write(file, json.dumps(content | {"imageHeight": SIZE[0], "imageWidth": SIZE[1]}))
        picture(file.with_suffix(".png"))

    square = np.array(SQUARE).reshape(-1, 2).tolist()
    data = io.BytesIO()
    Image.new("1", (2, 3), 1).save(data, "PNG")
    encoded = base64.b64encode(data.getvalue()).decode()
    note(tmp_path / "train" / "a.json", shape("cat", square), path="..\\elsewhere\\a.png")
    note(
        tmp_path / "train" / "b.json",
        shape("dog", [[1, 1], [3, 3]], "rectangle"),
        shape("cat", [[6, 3], [7, 3]], "circle"),
        shape("__ignore__", [[0, 0], [1, 2]], "mask", mask=encoded),
    )
    note(tmp_path / "val" / "c.json", shape("_background_", square))
    picture(tmp_path / "val" / "bare.png")
    task, splits = fitted(tmp_path)
    assert task.classes == ("background", "cat", "dog")
    assert drawn(task, splits["train"]) == [[0, 1], [0, 1, 2, 255]]
    assert drawn(task, splits["validation"]) == [[0]]
    label = task.labels.read(splits["train"][1], SIZE)
    assert (label[:3, :2] == 255).all()
    assert (label[3:, :2] != 255).all()
    assert "1 picture in" in str(findings(task, splits)[0])
    refused("laid out as LabelMe, which task: segmentation", tmp_path, classes)
    note(tmp_path / "train" / "d.json", shape("cat", [[1, 1], [2, 2]], "line"))
    refused("d.json: shape 0 is a line, which covers no pixels: draw it as a polygon", tmp_path)


def test_yolo_is_recognised_and_told(tmp_path: Path) -> None:
    for split in ("train", "val"):
        picture(tmp_path / "images" / split / "a.jpg")
        write(tmp_path / "labels" / split / "a.txt", "0 0.1 0.1 0.5 0.1 0.5 0.5\n")
    write(tmp_path / "data.yaml", "names: [cat]\n")
    refused("labels as YOLO writes them, which are not read: supervision", tmp_path)
    refused("labels as YOLO writes them", tmp_path, classes)
    write(tmp_path / "labels" / "train" / "a.txt", "0 0.5 0.5 0.1 0.1\n1 0.5 0.5 0.1 0.1\n")
    refused("YOLO writes them, of boxes, from which no masks can be made", tmp_path)


# Files that are passed over


def findings(task: Any, splits: dict[Split, Rows]) -> list[Finding]:
    """Returns the findings of doctor that the start of training has too."""
    told = examine(task, splits, workers=0).findings
    early = look(task, splits)
    return [finding for finding in told if finding in early]


def sorter(source: Path) -> tuple[ClassificationTask, dict[Split, Rows]]:
    from mmadapters.tasks.classification.config import ClassificationConfig

    config = ClassificationConfig(backbone={"name": "nano/vit"}, data={"source": str(source)})
    task = ClassificationTask(config)
    splits = load_splits(config.data, task.columns)
    task.fit(splits["train"], encoder())
    return task, splits


def test_files_that_are_passed_over_are_counted_and_lost_classes_named(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for number, name in enumerate(("cat", "cow")):
            picture(tmp_path / split / name / "1.png", number + 10 * (split == "val"))
    for number in range(4):
        write(tmp_path / "train" / "dog" / f"{number}.heic")
    write(tmp_path / "val" / "dog" / "1.m4a")
    write(tmp_path / "train" / "cat" / "notes.txt")
    write(tmp_path / "README.md")
    task, splits = sorter(tmp_path)
    assert set(splits["train"]["label"]) == {"cat", "cow"}
    told = [str(finding) for finding in findings(task, splits)]
    expected = [
        "the class 'dog' of train has no row: of 4 files there (4 .heic) none can be read: convert "
        "them, as by magick 0.heic 0.png",
        "the class 'dog' of val has no row: of 1 file there (1 .m4a) none can be read: convert "
        "them, as by ffmpeg -i 1.m4a 1.flac",
        f"4 .heic files in {tmp_path} are passed over (train/dog/0.heic, train/dog/1.heic, "
        "train/dog/2.heic, …): convert them, as by magick 0.heic 0.png",
        f"1 .txt file in {tmp_path} is passed over (train/cat/notes.txt): move them elsewhere, or "
        "convert them if they are data",
        f"1 .m4a file in {tmp_path} is passed over (val/dog/1.m4a): convert them, as by ffmpeg -i "
        "1.m4a 1.flac",
    ]
    assert sorted(told) == sorted(expected)


def test_a_folder_of_unread_files_alone_is_told(tmp_path: Path) -> None:
    for name in ("dog", "cat"):
        write(tmp_path / name / "1.m4a")
    refused(r"\(its files are 2 .m4a: convert them, as by ffmpeg.*; it has cat", tmp_path, classes)


def test_hidden_and_system_entries_are_nothing(tmp_path: Path) -> None:
    for number, name in enumerate(("cat", "dog")):
        picture(tmp_path / "train" / name / "1.png", number)
    junk = (
        *(".DS_Store", "train/.DS_Store", "train/cat/._1.png", "train/cat/Thumbs.db"),
        *("train/cat/desktop.ini", "train/.ipynb_checkpoints/1-checkpoint.png", "._train.csv"),
        *("__MACOSX/train/cat/._1.png", "__MACOSX/train/cat/1.png", "train/dog/@eaDir/1.png"),
        *("$RECYCLE.BIN/cat/1.png", "System Volume Information/x/1.png", ".git/a/1.png"),
    )
    for name in junk:
        picture(tmp_path / f"{name}.png").rename(tmp_path / name)
    task, splits = sorter(tmp_path)
    assert list(splits) == ["train"]
    assert sorted(splits["train"]["label"]) == ["cat", "dog"]
    assert findings(task, splits) == []
    mask(tmp_path / "s" / "masks" / "1.png")
    picture(tmp_path / "s" / "images" / "1.png")
    for name in ("images/._1.png", "masks/.ipynb_checkpoints/1.png", "__MACOSX/images/2.png"):
        picture(tmp_path / "s" / name)
    assert every_pair(load(tmp_path / "s")) == {"train": [(1, 1)]}
