"""Doctor says what a person would stop at: of pictures, recordings, texts, labels and masks."""

from __future__ import annotations

import io
import struct
import time
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import pyarrow as pa
import pytest
import soundfile
import yaml
from application.data.test_doctor import ReadingTask, noise, png, printed
from PIL import Image
from typer.testing import CliRunner

from mmadapters.tasks.classification.config import ClassificationConfig
from mmadapters.tasks.classification.labels import fit_labels
from mmadapters.tasks.classification.task import ClassificationTask
from mmadapters.tasks.cli.app import app
from mmadapters.tasks.config.schema import DataConfig, Split
from mmadapters.tasks.core.capabilities import DataChecks
from mmadapters.tasks.core.findings import Finding
from mmadapters.tasks.core.rows import Column, Rows
from mmadapters.tasks.data import media
from mmadapters.tasks.data.doctor import DataReport, examine, look
from mmadapters.tasks.data.doctor.texts import unseen_characters
from mmadapters.tasks.data.load import load_splits
from mmadapters.tasks.segmentation.config import SegmentationConfig
from mmadapters.tasks.segmentation.task import SegmentationTask

RATE = 8000


class Anything(ReadingTask):
    """Reads the columns that it is given."""

    def __init__(self, bits: int | None = None, **kinds: str) -> None:
        super().__init__()
        self.columns = {role: Column(kind) for role, kind in kinds.items()}  # type: ignore[misc]
        data = self.config.data.model_copy(update={"bits": bits})
        self.config = self.config.model_copy(update={"data": data})

    def example(self, row: Any, *, train: bool) -> dict[str, Any]:
        return {}


def table(**columns: list[Any]) -> datasets.Dataset:
    return datasets.Dataset(pa.table(columns))


def both(task: Any, **splits: Rows) -> list[list[str]]:
    """The findings of an examination, and those of a look, without those about missing splits."""
    told: list[list[Finding]] = [examine(task, splits, workers=0).findings, look(task, splits)]  # type: ignore[arg-type]
    return [[str(f) for f in some if "there is no" not in f.sentence] for some in told]


def image(data: bytes) -> dict[str, Any]:
    return {"bytes": data, "path": None}


def tone(seconds: float = 0.3, *, level: float = 0.5) -> np.ndarray:
    return level * np.sin(np.arange(int(seconds * RATE)) / 5)


def wav(samples: np.ndarray, subtype: str = "PCM_16") -> dict[str, Any]:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, RATE, format="WAV", subtype=subtype)
    return {"bytes": buffer.getvalue(), "path": None}


# Pictures


def test_blank_pictures_are_named_and_others_are_not() -> None:
    blank = Image.new("RGB", (64, 64), (7, 8, 9))
    buffer = io.BytesIO()
    blank.save(buffer, "JPEG")
    rows = table(
        image=[image(png(noise(0))), image(png(np.asarray(blank))), image(buffer.getvalue())]
    )
    for told in both(Anything(image="image"), train=rows):
        assert told == [
            "2 of the 3 pictures of train are of one colour (rows 1, 2): look at them, and leave "
            "out those that show nothing"
        ]


def test_twelve_bits_in_sixteen_are_told_with_the_key() -> None:
    deep = [(noise(seed).astype(np.uint16) * 16)[:, :, 0] for seed in range(3)]
    rows = table(image=[image(png(pixels)) for pixels in deep])
    for told in both(Anything(image="image"), train=rows):
        (text,) = told
        assert "3 of the 3 pictures of train have 16 bits a channel, and no value above" in text
        assert "scaled from 4,095, the range of 12 bits: write data.bits: 12" in text
    for bits in (12, 16):
        assert both(Anything(bits, image="image"), train=rows) == [[], []]
    whole = table(image=[image(png(pixels * 16)) for pixels in deep])
    assert both(Anything(image="image"), train=whole) == [[], []]
    dark = table(image=[image(png(pixels * 4)) for pixels in deep])
    for told in both(Anything(image="image"), train=dark):
        assert "they are dark: say the number of bits in use, such as data.bits: 14" in told[0]


# Recordings


def test_silence_clipping_and_ranges_are_heard() -> None:
    clipped = np.clip(tone(level=3.0), -1, 1)
    recordings = [
        wav(tone()),
        wav(np.zeros(800)),
        wav(np.full(800, 0.25)),
        wav(clipped),
        wav(tone(level=0.99)),
        wav(tone() * 32768, "FLOAT"),
    ]
    for told in both(Anything(audio="audio"), train=table(audio=recordings)):
        assert [text.partition(":")[0] for text in told] == [
            "2 of the 6 recordings of train are silent (rows 1, 2)",
            "1 of the 6 recordings of train is clipped",
            "1 of the 6 recordings of train is stored as floats that go up to 1.638e+04 and not to "
            "1 (row 5)",
        ]
        assert "(row 3)" in told[1]
        assert "divide them by 32768" in told[2]


def test_arrays_of_floats_and_integers_are_heard() -> None:
    samples = (tone() * 32768).astype(np.int16)
    rows = [
        {"audio": {"array": samples, "sampling_rate": RATE}},
        {"audio": {"array": samples.astype(np.float32), "sampling_rate": RATE}},
        {"audio": {"array": tone(level=1.5), "sampling_rate": RATE}},
    ]
    (told,) = {tuple(some) for some in both(Anything(audio="audio"), train=Listed(rows))}
    (text,) = told
    assert "2 of the 3 recordings of train are stored as floats that go up to 1.638e+04" in text
    assert "(rows 1, 2)" in text


class Listed:
    """Rows that are no data set."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows, self.column_names = rows, list(rows[0])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Any) -> Any:
        return [row[key] for row in self.rows] if isinstance(key, str) else self.rows[key]


@pytest.mark.parametrize("unit", [1.0, 1000.0, float(RATE)])
def test_a_column_of_durations_is_compared_with_the_files(unit: float) -> None:
    seconds = [0.5, 1.0, 1.5, 2.0]
    recordings = [wav(tone(length)) for length in seconds]
    right = [unit * length for length in seconds]
    task = Anything(audio="audio")
    assert both(task, train=table(audio=recordings, duration=right)) == [[], []]
    wrong = table(audio=recordings, duration=[*right[:3], unit * 9.0])
    for told in both(task, train=wrong):
        assert told[0].startswith(
            "1 of the 4 recordings of train have another duration than the column 'duration' says: "
            "9.00 s are stated and 2.00 s are there (row 3)"
        )


# Texts


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a\u200bcat", "zero width space U+200B"),
        ("\ufeffa cat", "byte order mark U+FEFF"),
        ("a\xa0cat", "no-break space U+00A0"),
        ("a c\xadat", "soft hyphen U+00AD"),
        ("a \x07cat", "control character U+0007"),
        ("a c\ufffdt", "replacement character U+FFFD"),
    ],
)
def test_invisible_characters_are_named(text: str, name: str) -> None:
    for kind, value in (("text", text), ("label", text), ("texts", ["a dog", text])):
        rows = table(words=["a dog" if kind != "texts" else ["a dog"], value])
        for told in both(Anything(words=kind), train=rows):
            (one,) = told
            assert one.startswith("1 of the 2 rows of train has invisible or broken characters in ")
            assert f"{name} (row 1)" in one


def test_characters_that_belong_to_a_script_are_let_be() -> None:
    for text in ("می‌خواهم", "क्‍ष", "👩‍💻", "東京　駅", "naïve café", "a 'quoted' – dash…"):
        assert not unseen_characters(text), text
    assert unseen_characters("cat\u200d") == {"\u200d"}


def test_line_breaks_inside_of_texts_are_told() -> None:
    rows = table(caption=["a cat", "a dog\na cow", "a\tsheep", "a hen\n"])
    for told in both(Anything(caption="text"), train=rows):
        (text,) = told
        assert "2 of the 4 rows of train have a line break or a tab inside of caption" in text
        assert "(rows 1, 2)" in text


# Files and labels


def test_the_same_file_with_two_labels_and_in_two_splits(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(png(noise(number)))
    lines = ["file_name,label,split", "0.png,cat,train", "1.png,dog,train", "0.png,dog,train"]
    lines += ["2.png,cat,validation", "1.png,dog,test", "3.png,dog,test"]
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    task = Anything(image="image", label="label")
    splits = load_splits(DataConfig(source=str(tmp_path)), task.columns)
    for told in both(task, **splits):
        assert told == [
            "1 of 2 rows of test have the same image as a row of train: 0 (1.png) = 1 (1.png): "
            "leave them out of one of the two, since figures on test are too good",
            "1 row of train repeat the image of another row with another label: 2 (0.png) 'dog' "
            "and 0 (0.png) 'cat': give each image one row with its right label",
        ]


def test_pieces_of_one_recording_are_not_the_same_recording() -> None:
    whole = wav(tone())
    rows = table(audio=[whole, whole], text=["one", "two"], offset=[0.0, 0.1])
    assert both(Anything(audio="audio", text="text"), train=rows) == [[], []]
    rows = table(audio=[whole, whole], text=["one", "two"])
    told, _ = both(Anything(audio="audio", text="text"), train=rows)
    assert "another transcript" in told[0]


def classifier(rows: Rows, **data: Any) -> ClassificationTask:
    config = ClassificationConfig.model_validate(
        {"backbone": {"name": "nano/vit"}, "data": {"source": "none", **data}}
    )
    labels, counts = fit_labels(rows, names=config.data.labels, separator=None)
    return ClassificationTask(config, {"labels": labels.to_state(), "counts": counts})


def test_labels_that_look_alike_and_classes_without_rows() -> None:
    train = table(label=["cat", "Cat", "red  car", "red car", "dog", "dog"])
    test = table(label=["cow", "dog", "cow"])
    task = classifier(train, labels=("cat", "Cat", "red  car", "red car", "dog", "cow"))
    findings = task.findings({"train": train, "test": test}, whole=True)
    assert [finding.sentence for finding in findings] == [
        "no row of train has the label 'cow', but 2 of test",
        "labels that differ only by case, blanks or invisible characters are different classes: "
        "'cat' (1 rows) and 'Cat' (1 rows); 'red  car' (1 rows) and 'red car' (1 rows)",
    ]
    fine = table(label=["cat", "dog"])
    assert classifier(fine).findings({"train": fine}, whole=True) == []


# Masks

PREPROCESSING = {
    **{"height": 16, "width": 16, "mean": [0.5] * 3, "std": [0.5] * 3},
    **{"interpolation": "bilinear", "resize": "squash", "crop": 1.0},
}
TWO = ("background", "nucleus")


def segmenter(*classes: str, **data: Any) -> SegmentationTask:
    config = SegmentationConfig.model_validate(
        {
            "backbone": {"name": "nano/vit"},
            "data": {"source": "none", "classes": classes or TWO, **data},
        }
    )
    names = list(classes or TWO)
    return SegmentationTask(config, {"classes": names, "preprocessing": PREPROCESSING})


def masks(*values: np.ndarray) -> datasets.Dataset:
    return table(
        image=[image(png(noise(i, *mask.shape, 3))) for i, mask in enumerate(values)],
        mask=[image(png(mask.astype(np.uint8))) for mask in values],
    )


def halves(low: int, high: int, count: int = 4, side: int = 16) -> list[np.ndarray]:
    """Masks with the one value above, and the other below."""
    mask = np.full((side, side), low)
    mask[side // 2 :] = high
    return [mask] * count


def test_masks_of_0_and_255_are_unusable_and_the_remedy_is_told() -> None:
    """mmsegmentation#1609: 255 is ignored, so the target has no pixel."""
    rows = masks(*halves(0, 255))
    report = examine(segmenter(), {"train": rows, "validation": rows.select([0])}, workers=0)
    (finding, *_) = [f for f in report.findings if "never occurs" in f.sentence]
    assert str(finding) == (
        "in the 4 masks of train 'nucleus' never occurs, and 50.0 % of the pixels are ignored (id "
        "255), more than all classes but the background have together (0.0 %): if 255 is a class, "
        "say which one: data.label_map: {0: background, 255: nucleus}"
    )
    assert report.verdict == "unusable"
    assert "Verdict: unusable." in printed(report)
    mended = segmenter(label_map={0: "background", 255: "nucleus"})
    assert mended.findings({"train": rows}, whole=True) == []


def test_borders_that_are_ignored_are_no_object() -> None:
    rows = masks(*halves(0, 1))
    bordered = np.array(halves(0, 1)[0])
    bordered[7:9] = 255
    assert segmenter().findings({"train": rows}, whole=True) == []
    assert segmenter().findings({"train": masks(*[bordered] * 3)}, whole=True) == []


def test_a_class_that_only_the_test_split_has() -> None:
    task = segmenter("background", "cat", "dog")
    splits: dict[Split, Rows] = {
        "train": masks(*halves(0, 1, 20)),
        "test": masks(*halves(0, 2, 2)),
    }
    (finding,) = task.findings(splits, whole=True)
    assert finding.severity == "suspicious"
    assert finding.sentence == "in the 20 masks of train 'dog' never occurs (but in test)"
    assert "the ids in the masks are 0, 1" in finding.remedy
    # In a sample a class is missed only where the sample is large enough to show it.
    (sampled,) = task.findings(splits, whole=False)
    assert "in the 20 masks looked at in train 'dog' never occurs" in sampled.sentence
    few: dict[Split, Rows] = {"train": masks(*halves(0, 1, 4))}
    assert task.findings(few, whole=False) == []


def turned_picture(orientation: int, size: tuple[int, int]) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(noise(0, *size, 3)).save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


def test_masks_that_sizes_do_not_place_are_told() -> None:
    mask = png(halves(0, 1, side=16)[0].astype(np.uint8))
    square = turned_picture(6, (16, 16))
    rows = table(image=[image(square)] * 2, mask=[image(mask)] * 2)
    (finding,) = segmenter().findings({"train": rows}, whole=True)
    assert "2 pictures of train are turned by their EXIF data, and sizes do not say" in str(finding)
    assert "set data.drawn_on: stored" in finding.remedy
    for drawn_on in ("stored", "upright"):
        assert segmenter(drawn_on=drawn_on).findings({"train": rows}, whole=True) == []


# Verdicts


def test_verdicts_are_fine_suspicious_and_unusable() -> None:
    task = Anything(image="image")
    good, blank = image(png(noise(0))), image(png(np.zeros((8, 8, 3), np.uint8)))
    one, two = table(image=[good]), table(image=[image(png(noise(1)))])
    fine = examine(task, {"train": one, "validation": two}, workers=0)
    assert (fine.verdict, fine.findings) == ("fine", [])
    assert "Every row can be used. Verdict: fine." in printed(fine)
    odd = examine(task, {"train": one, "validation": table(image=[blank])}, workers=0)
    assert odd.verdict == "suspicious"
    assert odd.ok
    text = printed(odd)
    assert "warning: 1 of the 1 pictures of validation is of one colour (row 0)" in text
    assert "Every row can be used. Verdict: suspicious, see the warning above." in text
    assert DataReport([]).verdict == "unusable"


def test_the_command_exits_with_1_for_unusable_data_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, high in (("unusable", 255), ("suspicious", 1), ("fine", 1)):
        lines = ["image,mask,split"]
        for i, mask in enumerate(halves(0, high, 3)):
            pixels = noise(0 if name == "suspicious" else i, 16, 16, 3)
            Path(f"{name}{i}.png").write_bytes(png(pixels))
            Path(f"{name}{i}_mask.png").write_bytes(png(mask.astype(np.uint8)))
            split = ("train", "validation", "test")[i]
            lines.append(f"{name}{i}.png,{name}{i}_mask.png,{split}")
        Path(f"{name}.csv").write_text("\n".join(lines))
        job = {
            "task": "segmentation",
            "backbone": {"name": "nano/vit"},
            "data": {"source": f"{name}.csv", "classes": list(TWO)},
        }
        Path(f"{name}.yaml").write_text(yaml.safe_dump(job))
        result = CliRunner().invoke(app, ["doctor", f"{name}.yaml"])
        assert result.exit_code == (1 if name == "unusable" else 0), result.output
        assert f"Verdict: {name}" in result.output


# The look at the start of training


def test_training_names_what_is_suspicious_and_the_report_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = ["file_name,label,split"]
    for i in range(12):
        pixels = noise(i, 16, 16, 3) if i != 2 else np.full((16, 16, 3), 9, np.uint8)
        Path(f"{i}.png").write_bytes(png(pixels))
        lines.append(f"{i}.png,{('cat', 'dog')[i % 2]},{('train', 'test')[i > 7]}")
    Path("metadata.csv").write_text("\n".join(lines))
    job = {
        "task": "classification",
        "name": "odd",
        "backbone": {"name": "nano/vit"},
        "data": {"source": str(tmp_path)},
        "trainer": {"mode": "head", "max_steps": 1, "batch_size": 4, "tensorboard": False},
        "evaluation": {"bootstrap": 0, "pictures": 0},
    }
    Path("job.yaml").write_text(yaml.safe_dump(job))
    result = CliRunner().invoke(app, ["train", "job.yaml", "--quiet"])
    assert result.exit_code == 0, result.output
    sentence = "1 of the 8 pictures of train is of one colour (row 2 (2.png))"
    assert f"warning: {sentence}" in result.output
    page = Path("runs/odd/report.html").read_text()
    assert 'id="data"' in page
    assert sentence in page


class Slow(Anything, DataChecks):
    seen: ClassVar[list[int]] = []

    def findings(self, splits: Any, *, whole: bool) -> list[Finding]:
        self.seen[:] = [len(rows) for rows in splits.values()]
        assert not whole
        return []


def test_a_look_is_short_and_says_what_it_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Listed([{"image": np.zeros((4, 4, 3), np.uint8)} for _ in range(5000)])
    (finding,) = look(Slow(image="image"), {"train": rows})  # type: ignore[arg-type]
    assert finding.sentence.startswith(
        "64 of 64 pictures looked at, of the 5,000 of train, are of one colour (rows "
    )
    assert Slow.seen == [64]
    started = time.perf_counter()
    look(Slow(image="image"), {"train": rows}, seconds=0.0)  # type: ignore[arg-type]
    assert time.perf_counter() - started < 1.0
    assert Slow.seen == [4]


def test_a_look_never_ends_a_training() -> None:
    class Broken(Anything, DataChecks):
        def findings(self, splits: Any, *, whole: bool) -> list[Finding]:
            raise KeyError("x")

    (told,) = look(Broken(image="image"), {"train": table(image=[image(png(noise(0)))])})
    assert str(told) == "a look at the data failed: KeyError: 'x': run mmadapters doctor"


# 16 bits, decided once for a data set


def deep_rgb(values: np.ndarray, *, key: tuple[int, ...] | None = None) -> bytes:
    """A PNG of 16 bits a channel, (H, W, 3) or (H, W, 4), which PIL does not write."""
    import zlib

    height, width, channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    chunks = [(b"IHDR", header)]
    chunks += [(b"tRNS", struct.pack(">HHH", *key))] if key else []
    chunks += [(b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def test_the_range_is_decided_by_the_data_set_or_the_config() -> None:
    dim = np.full((4, 4), 100, np.uint16)
    bright = np.full((4, 4), 4000, np.uint16)
    rows = table(image=[image(png(dim)), image(png(bright))])
    free = DataConfig(source="x")
    assert media.picture_bits(free, rows) == {"bits": 12}
    assert media.picture_bits(free, rows.select([0])) == {"bits": 8}
    assert media.picture_bits(DataConfig(source="x", bits=14), rows) == {"bits": 14}
    assert media.picture_bits(DataConfig(source="x", bits=16), rows) == {}
    assert media.picture_bits(free, None) == {}
    assert media.picture_bits(free, table(image=[image(png(noise(0)))])) == {}
    colours = np.full((4, 4, 3), 1000, np.uint16)
    assert media.picture_bits(free, table(image=[image(deep_rgb(colours))])) == {"bits": 10}
