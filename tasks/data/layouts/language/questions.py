"""Lists of questions about pictures: LLaVA (Liu et al. 2023) and SLAKE (Liu et al. 2021)."""

from __future__ import annotations

from functools import partial
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
    is_mapped,
    json_files,
    objects,
    reads,
)
from .image_folders import image_paths

if TYPE_CHECKING:
    from datasets import Dataset

_ASKS = ("human", "user")
_ANSWERS = ("gpt", "assistant")
_PICTURE = "<image>"  # where LLaVA puts the picture into the text


def llava(wanted: Wanted, path: Path) -> Parts | None:
    """Returns the splits of lists of conversations: a row for each question and its answer."""
    if not _asked(wanted, path):
        return None
    files = [f for f in json_files(path, ".json", ".jsonl") if _is_llava(head(wanted, f))]
    if not files:
        return None
    return file_parts(files, partial(_llava, wanted))


def slake(wanted: Wanted, path: Path) -> Parts | None:
    """Returns the splits of SLAKE: train.json, validate.json and test.json beside imgs/."""
    if not _asked(wanted, path):
        return None
    files = [f for f in json_files(path) if _is_slake(head(wanted, f))]
    if not files:
        return None
    return file_parts(files, partial(_slake, wanted))


def _asked(wanted: Wanted, path: Path) -> bool:
    if has_tables(path, (".csv", ".tsv", ".parquet")):
        return False
    return reads(wanted, "question") and not is_mapped(
        wanted, "image", "question", "answer", "answers"
    )


def _is_llava(start: str) -> bool:
    # A table may have conversations beside the questions and answers.
    return _has(start, "conversations", "from", "value") and not _has(start, "question", "answer")


def _is_slake(start: str) -> bool:
    return _has(start, "img_name", "question", "answer") and not (
        _has(start, "image") or _has(start, FILE)
    )


def _has(start: str, *keys: str) -> bool:
    """Returns whether a file of rows begins with one that has these keys."""
    return start.lstrip()[:1] in ("[", "{") and all(f'"{key}"' in start for key in keys)


def _llava(wanted: Wanted, file: Path) -> Dataset:
    content = document(wanted, file)
    if isinstance(content, dict):
        content = [content]  # JSON lines of a single row
    rows: list[dict[str, Any]] = []
    names: list[str | None] = []
    for number, entry in enumerate(objects(file, content, None, "conversations")):
        image = entry.get("image")
        if isinstance(image, list):
            if len(image) > 1:
                raise ValueError(
                    f"{file}: row {number} has {len(image)} pictures, and a question is about one:"
                    " leave such rows out"
                )
            image = image[0] if image else None
        for question, answer in _turns(file, number, entry["conversations"]):
            rows.append({"question": question, "answer": answer, "id": as_text(entry.get("id"))})
            names.append(as_text(image) or None)
    paths = image_paths(wanted, file, names)
    return from_rows([{FILE: path, **row} for path, row in zip(paths, rows, strict=True)])


def _turns(file: Path, number: int, conversation: Any) -> list[tuple[str, str]]:
    """Returns the questions of a conversation and their answers; "" for a missing one."""
    turns: list[tuple[str, str]] = []
    where = f"{file}: row {number}"
    for turn in conversation if isinstance(conversation, list) else [conversation]:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise ValueError(f"{where} has a turn without 'from' and a text 'value': {turn!r:.60}")
        speaker, text = turn.get("from"), turn["value"].replace(_PICTURE, "").strip()
        if speaker in _ASKS:
            turns.append((text, ""))
        elif speaker in _ANSWERS:
            if not turns or turns[-1][1]:
                raise ValueError(f"{where} has an answer without a question: {text[:60]!r}")
            turns[-1] = (turns[-1][0], text)
        elif speaker != "system":
            raise ValueError(
                f"{where} has a turn of {speaker!r}, which is none of "
                f"{', '.join((*_ASKS, *_ANSWERS))}"
            )
    return turns


def _slake(wanted: Wanted, file: Path) -> Dataset:
    entries = objects(file, document(wanted, file), None, "img_name", "question", "answer")
    paths = image_paths(wanted, file, [as_text(entry["img_name"]) for entry in entries])
    rows = []
    for entry, path in zip(entries, paths, strict=True):
        plain = {n: as_text(v) for n, v in entry.items() if not isinstance(v, list | dict)}
        image = as_text(entry.get("img_id", entry["img_name"]))
        rows.append({**plain, FILE: path, "image_id": image})
    return from_rows(rows)
