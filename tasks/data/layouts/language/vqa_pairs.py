"""Files of questions and files of annotations, as those of VQA (Goyal et al. 2017) and OK-VQA."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...parts import Parts
from ...wanted import FILE, Wanted
from ..media_folders import from_rows
from .documents import (
    as_text,
    document,
    file_parts,
    has_tables,
    head,
    json_files,
    objects,
    reads,
    split_in,
)
from .image_folders import image_paths

if TYPE_CHECKING:
    from datasets import Dataset

_FOLDERS = ("questions", "annotations")  # where some keep them, beside each other
_KEYS = ("question_id", "image_id", "questions", "question", "annotations", "answer")
_KINDS = re.compile(r"open-?ended|multiple-?choice|questions?|annotations?")


def vqa_pairs(wanted: Wanted, path: Path) -> Parts | None:
    """Returns the rows of pairs of files: a row for each question, with all its `answers`.

    The source is a folder, or one file of a pair. Pairs belong together by their names. In a
    folder, questions of a test split without annotations, as they are published, are passed over.

    Raises:
        ValueError: a file has no partner.
    """
    if not reads(wanted, "question") or has_tables(path):
        return None
    if path.is_dir():
        places = [path, *(path / name for name in _FOLDERS if (path / name).is_dir())]
        files = [file for place in places for file in json_files(place)]
    else:
        files = json_files(path)
    kinds = {file: kind for file in files if (kind := _kind(head(wanted, file)))}
    if not kinds:
        return None
    if path.is_file():
        kinds |= {file: kind for file in _beside(path) if (kind := _kind(head(wanted, file)))}
    questions = [file for file, kind in kinds.items() if kind == "questions"]
    annotations = [file for file, kind in kinds.items() if kind == "annotations"]
    pairs: dict[Path, Path] = {}
    for file in [path] if path.is_file() else [*questions, *annotations]:
        is_question = kinds[file] == "questions"
        others = [o for o in (annotations if is_question else questions) if _key(o) == _key(file)]
        if not others:
            if path.is_dir() and is_question and split_in(_key(file)) == "test":
                continue
            missing = "annotations" if is_question else "questions"
            raise ValueError(
                f"data.source: {file} has no partner: put the file of its {missing}, "
                f"{_partner(file)}, into the same folder"
            )
        pairs[file if is_question else others[0]] = others[0] if is_question else file
    if not pairs:
        raise ValueError(f"data.source: {questions[0]} has the questions of a test without answers")
    return file_parts(list(pairs), lambda file: _read(wanted, file, pairs[file]))


def _kind(start: str) -> str | None:
    """Returns "questions" or "annotations", or None if a file is a table or something else."""
    has = {key for key in _KEYS if f'"{key}"' in start}
    if not start.lstrip().startswith("{") or not {"question_id", "image_id"} <= has:
        return None
    if {"questions", "question"} <= has:
        return None if "answer" in has else "questions"
    return "annotations" if "annotations" in has and "question" not in has else None


def _beside(file: Path) -> list[Path]:
    """Returns the files that may be the partner of a file."""
    folder = file.absolute().parent
    places = [folder, *(folder.parent / name for name in _FOLDERS)]
    files = [other for place in places if place.is_dir() for other in json_files(place)]
    return [other for other in files if _key(other) == _key(file)]


def _key(file: Path) -> str:
    """Returns what the names of a pair have in common (v2 mscoco train2014)."""
    return " ".join(re.findall(r"[a-z0-9-]+", _KINDS.sub(" ", file.stem.lower().replace("_", " "))))


def _partner(file: Path) -> str:
    """Returns the name that the partner of a file has in the published data."""
    words = file.stem.split("_")
    if "questions" in words:
        plain = [word for word in words if word.lower() not in ("openended", "multiplechoice")]
        return "_".join("annotations" if word == "questions" else word for word in plain) + ".json"
    start = 1 if words[0] == "v2" else 0
    words.insert(start, "OpenEnded")
    return "_".join("questions" if word == "annotations" else word for word in words) + ".json"


def _read(wanted: Wanted, file: Path, annotations: Path) -> Dataset:
    content = document(wanted, file)
    questions = objects(file, content, "questions", "question_id", "image_id", "question")
    notes = document(wanted, annotations)
    by_id = {n["question_id"]: n for n in objects(annotations, notes, "annotations", "question_id")}
    answered = [by_id.get(question["question_id"], {}) for question in questions]
    if not any(answered):
        raise ValueError(f"{annotations} has no annotation of a question in {file}")
    subset = as_text(content.get("data_subtype")) or _subset(file)
    paths = image_paths(wanted, file, *_namings(questions, subset))
    rows = []
    for question, note, path in zip(questions, answered, paths, strict=True):
        row: dict[str, Any] = {FILE: path, "question": as_text(question["question"])}
        row["answers"] = _answers(annotations, note)
        row["image_id"] = as_text(question["image_id"])
        row["question_id"] = as_text(question["question_id"])
        rows.append(row | {n: note[n] for n in ("question_type", "answer_type") if n in note})
    return from_rows(rows)


def _answers(file: Path, note: dict[str, Any]) -> list[str]:
    answers = note.get("answers", [note["answer"]] if "answer" in note else [])
    if not isinstance(answers, list):
        raise ValueError(f"{file}: the answers to {note['question_id']} are no list")
    return [as_text(a.get("answer") if isinstance(a, dict) else a) for a in answers]


def _subset(file: Path) -> str:
    """Returns the part of COCO that a file's name holds (train2014), or ""."""
    match = re.search(r"(train|val|test)(-dev)?\d{4}", file.stem)
    return match[0] if match else ""


def _namings(questions: Sequence[dict[str, Any]], subset: str) -> list[list[str | None]]:
    """Returns the names that the pictures of all questions may have."""
    subset = subset.replace("-dev", "")
    ids = [question["image_id"] for question in questions]
    numbers = [as_text(i).zfill(12) for i in ids]
    return [
        [f"COCO_{subset}_{number}.jpg" for number in numbers],
        [f"{number}.jpg" for number in numbers],
        [f"abstract_v002_{subset}_{number}.png" for number in numbers],
        [f"{as_text(i)}.jpg" for i in ids],
        [f"{as_text(i)}.png" for i in ids],
        [as_text(i) for i in ids],
    ]
