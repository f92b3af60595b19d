"""Data sets of recordings that consist of tables and folders of files.

| data set     | tables                          | files          |
|--------------|---------------------------------|----------------|
| Common Voice | train.tsv, dev.tsv, test.tsv, validated.tsv: path, sentence | clips/ |
| LJSpeech     | metadata.csv without a header: id, text, normalised text | wavs/ |
| ESC-50       | meta/esc50.csv: filename, fold, category | audio/ |
| UrbanSound8K | metadata/UrbanSound8K.csv: slice_file_name, fold, class | audio/foldN/ |
| NeMo         | manifests of JSON lines: audio_filepath, text, offset, duration | anywhere |
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....config.schema import DataConfig
from ...parts import Parts, Piece
from ...splits import KNOWN
from ...tables.read import read_tables
from ...tables.shards import table_shards
from ...wanted import Wanted

if TYPE_CHECKING:
    from datasets import Dataset

# other.tsv and invalidated.tsv hold recordings that nobody has confirmed, or that were refused.
COMMON_VOICE = ("train", "dev", "test", "validated")


def common_voice(wanted: Wanted, path: Path) -> Parts | None:
    """Reads a language of Common Voice, or one of its tables.

    Raises:
        ValueError: the folder holds languages.
    """
    files = [path] if path.suffix == ".tsv" else [path / f"{name}.tsv" for name in COMMON_VOICE]
    folder = path.parent if path.suffix == ".tsv" else path
    files = [file for file in files if file.is_file() and _has_columns(file, "path", "sentence")]
    if not (folder / "clips").is_dir() or not files:
        if path.is_dir() and (languages := _languages(path)):
            raise ValueError(
                f"data.source: {path} holds languages of Common Voice, {', '.join(languages)}: "
                f"say data.source: {path / languages[0]}"
            )
        return None
    columns = {"audio": "path", "text": "sentence"}
    pieces = {
        file.stem: [_table(wanted, file, folder / "clips", columns, quoting=False, separator="\t")]
        for file in files
    }
    return pieces if len(pieces) > 1 else {"": next(iter(pieces.values()))}


def _languages(path: Path) -> list[str]:
    inside = sorted(path.iterdir())
    return [p.name for p in inside if (p / "clips").is_dir() and (p / "validated.tsv").is_file()]


def ljspeech(wanted: Wanted, path: Path) -> Parts | None:
    """Reads metadata.csv beside wavs/; the text is the normalised one."""
    if path.name != "metadata.csv" or not (path.parent / "wavs").is_dir():
        return None
    cells = _first_line(path).split("|")
    if len(cells) < 2 or not (path.parent / "wavs" / f"{cells[0]}.wav").is_file():
        return None
    names = ("id", "text", "normalized_text", *(f"column_{i}" for i in range(4, len(cells) + 1)))
    header = names[: len(cells)]
    columns = {"audio": "file_name", "text": header[min(2, len(cells) - 1)]}
    options = {"quoting": False, "separator": "|", "header": header}

    def read() -> Dataset:
        rows = read_tables(_with(wanted, options), [path])
        return rows.add_column("file_name", [f"{name}.wav" for name in rows["id"]])

    return {"": [Piece(read, wanted.root(path.parent / "wavs"), columns)]}


def esc50(wanted: Wanted, path: Path) -> Parts | None:
    """Reads ESC-50. Its folds become splits by data.split_column: fold."""
    file = path / "meta" / "esc50.csv"
    if not file.is_file() or not (path / "audio").is_dir():
        return None
    columns = {"audio": "filename", "label": "category"}
    return {"": [_table(wanted, file, path / "audio", columns)]}


def urbansound8k(wanted: Wanted, path: Path) -> Parts | None:
    """Reads UrbanSound8K. Its folds become splits by data.split_column: fold."""
    file = path / "metadata" / "UrbanSound8K.csv"
    if not file.is_file() or not (path / "audio").is_dir():
        return None

    def read() -> Dataset:
        rows = read_tables(wanted, [file])
        cells = zip(rows["fold"], rows["slice_file_name"], strict=True)
        return rows.add_column("file_name", [f"fold{fold}/{name}" for fold, name in cells])

    columns = {"audio": "file_name", "label": "class"}
    return {"": [Piece(read, wanted.root(path / "audio"), columns)]}


def nemo(wanted: Wanted, path: Path) -> Parts | None:
    """Reads one manifest of NeMo, or a folder of manifests whose names hold their splits."""
    files = sorted(path.glob("*manifest*.json*")) if path.is_dir() else [path]
    files = [file for file in files if file.suffix in (".json", ".jsonl")]
    if not files or not all('"audio_filepath"' in _first_line(file) for file in files):
        return None
    parts: Parts = {}
    for file in files:
        words = re.split(r"[^a-z]+", file.stem.lower())
        split = next((word for word in words if word in KNOWN), file.stem)
        piece = _table(wanted, file, file.parent, {"audio": "audio_filepath"})
        parts.setdefault(split, []).append(piece)
    return parts if len(files) > 1 else {"": parts.popitem()[1]}


def _table(
    wanted: Wanted, file: Path, folder: Path, columns: Mapping[str, str], **options: Any
) -> Piece:
    wanted = _with(wanted, options)
    return Piece(
        lambda: read_tables(wanted, [file]),
        wanted.root(folder),
        dict(columns),
        shards=functools.partial(table_shards, wanted, (file,)),
    )


def _with(wanted: Wanted, options: Mapping[str, Any]) -> Wanted:
    """Returns the request with other options of reading, where the user has given none."""
    given: DataConfig = wanted.config
    new = {name: value for name, value in options.items() if getattr(given, name) is None}
    return Wanted(given.model_copy(update=new), wanted.columns)


def _first_line(file: Path) -> str:
    if not file.is_file():
        return ""
    with open(file, encoding="utf-8-sig", errors="replace") as lines:
        return next((line.rstrip("\r\n") for line in lines if line.strip()), "")


def _has_columns(file: Path, *names: str) -> bool:
    header: Sequence[str] = _first_line(file).split("\t")
    return set(names) <= set(header)
