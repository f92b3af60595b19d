"""A folder of pictures or texts that can be searched by text or picture: FAISS over embeddings.

index.faiss     unit vectors, compared by inner product (exact)
items.jsonl     the item of each vector, one JSON object a line: "kind", and "image" or "text"
index.json      format, width, count, the checksums of both other files, and the fingerprint of the
                model that made the vectors

Shape legend: N items, E width of the embeddings.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmadapters.errors import first_line
from mmadapters.files import replacing_directory

from ..core.files import is_system_entry
from ..core.model import TaskModel
from ..core.task import Task
from ..data.media import IMAGE_SUFFIXES
from .model import RetrievalModel
from .queries import Item, items
from .task import RetrievalTask

FORMAT = 1
VECTORS, ITEMS, ABOUT = "index.faiss", "items.jsonl", "index.json"
AT_A_TIME = 256
# The head of FAISS's flat indexes: kind, width, count, two unused numbers, a flag, metric, values.
_HEADER = struct.Struct("<4siqqqBiQ")
_KINDS = (b"IxFI", b"IxFl")


class About(BaseModel):
    """The contents of index.json."""

    model_config = ConfigDict(strict=True)

    format: Literal[1]
    model: str
    adapter: str
    backbone: str
    width: Annotated[int, Field(ge=1)]
    count: Annotated[int, Field(ge=1)]
    sha256: dict[str, str] = Field(default_factory=dict)


def build_index(
    task: Task,
    model: TaskModel,
    inputs: Sequence[str],
    out: Path,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Writes an index of image files, folders of them, .txt files of texts, and texts.

    The index is written whole or not at all. It replaces an older index in the same folder.
    Pictures are remembered by the paths that were given.

    Args:
        task: as `artifact.open_directory` gives it.
        model: as `artifact.open_directory` gives it.
        inputs: paths and texts.
        out: the folder of the index.
        progress: is called with the number of items that are done and the number of all items.

    Returns:
        N, the number of items.

    Raises:
        ValueError: FAISS is not installed, the adapter is for another task, there is no input, an
            input cannot be read, or `out` holds something other than an index.
    """
    faiss = _faiss()
    task, model = _retrieval(task, model)
    _check_replaceable(out)
    entries = items([name for given in inputs for name in _pictures(given)])
    if not entries:
        raise ValueError("there is nothing to index: give image files, folders, or a .txt of texts")
    index = faiss.IndexFlatIP(model.towers.width)
    model.eval()
    embedder = task.embedder(model)
    for start in range(0, len(entries), AT_A_TIME):
        index.add(embedder.embed(entries[start : start + AT_A_TIME]).numpy())
        progress(min(start + AT_A_TIME, len(entries)), len(entries))
    about = {
        "format": FORMAT,
        "model": fingerprint(task, model),
        "adapter": task.config.name,
        "backbone": task.config.backbone.name,
        "width": model.towers.width,
        "count": len(entries),
    }
    with replacing_directory(out) as fresh:
        faiss.write_index(index, str(fresh / VECTORS))
        lines = [json.dumps(_line(item)) for item in entries]  # U+2028 would end a line for some
        (fresh / ITEMS).write_text("\n".join(lines) + "\n", "utf-8")
        about["sha256"] = {name: file_digest(fresh / name) for name in (VECTORS, ITEMS)}
        (fresh / ABOUT).write_text(json.dumps(about, indent=2) + "\n", "utf-8")
    return len(entries)


def search_index(
    task: Task, model: TaskModel, index: Path, query: str, *, count: int = 10
) -> list[dict[str, Any]]:
    """Returns the items of an index that are most like a query, the best first.

    Args:
        task: as `artifact.open_directory` gives it.
        model: as `artifact.open_directory` gives it.
        index: the folder of the index.
        query: a text, or the path of a picture.
        count: the most items that are returned.

    Returns:
        For each item its "kind", its "image" or "text", and the "similarity" (the cosine).

    Raises:
        FileNotFoundError: there is no index.
        ValueError: FAISS is not installed, the index was made by another model, is damaged or has
            another format, or the query cannot be read.
    """
    faiss = _faiss()
    task, model = _retrieval(task, model)
    about = _about(index)
    _check_files(index, about)
    if about["model"] != fingerprint(task, model):
        raise ValueError(
            f"{index} was made by another model (adapter {about['adapter']!r} on "
            f"{about['backbone']}): search it with that model, or build the index again with this "
            "one"
        )
    lines = read_items(index / ITEMS)
    try:
        vectors = faiss.read_index(str(index / VECTORS))
    except (ValueError, RuntimeError):
        raise ValueError(f"the files of {index} are damaged: build the index again") from None
    if not vectors.ntotal == len(lines) == about["count"] or vectors.d != about["width"]:
        raise ValueError(f"the files of {index} do not fit each other: build the index again")
    queries = items([query])
    if len(queries) != 1:
        raise ValueError(f"give one query, not the {len(queries)} of {query}")
    model.eval()
    scores, numbers = vectors.search(
        task.embedder(model).embed(queries).numpy(), min(count, vectors.ntotal)
    )
    return [
        {**lines[number], "similarity": round(float(score), 6)}
        for number, score in zip(numbers[0], scores[0], strict=True)
    ]


def fingerprint(task: RetrievalTask, model: TaskModel) -> str:
    """Returns a SHA-256 of every tensor, the preprocessing and the sentence around a caption.

    Models with equal fingerprints compute equal embeddings.
    """
    digest = hashlib.sha256()
    backbone = task.config.backbone.model_dump(
        mode="json", include={"name", "options", "processor"}
    )
    about = {"state": task.state, "backbone": backbone, "template": task.sentence("{}")}
    digest.update(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        values = tensor.detach().cpu().contiguous()
        digest.update(values.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _retrieval(task: Task, model: TaskModel) -> tuple[RetrievalTask, RetrievalModel]:
    if not isinstance(task, RetrievalTask) or not isinstance(model, RetrievalModel):
        raise ValueError(f"an index needs an adapter for retrieval; this one is for {task.name}")
    return task, model


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise ValueError(
            "an index needs FAISS, which is not installed: pip install 'mmadapters[index]'"
        ) from None
    return faiss


def _pictures(given: str) -> Iterator[str]:
    """Yields the picture files in a folder and below it, by path; else the input as it is."""
    if not os.path.isdir(given):
        yield given
        return
    pictures = sorted(
        path
        for path in Path(given).rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not any(map(is_system_entry, path.relative_to(given).parts))
    )
    if not pictures:
        raise ValueError(f"there is no picture in {given} ({', '.join(IMAGE_SUFFIXES)})")
    yield from map(str, pictures)


def _line(item: Item) -> dict[str, str]:
    return {"kind": item.kind, item.kind: item.value}


def _about(index: Path) -> dict[str, Any]:
    missing = [name for name in (ABOUT, ITEMS, VECTORS) if not (index / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{index} is no index: it has no {missing[0]}")
    try:
        about = json.loads((index / ABOUT).read_text("utf-8"))
    except ValueError:
        about = None
    if not isinstance(about, dict) or about.get("format") != FORMAT or about["format"] is True:
        raise ValueError(f"{index / ABOUT} is not of format {FORMAT}: build the index again")
    try:
        return About.model_validate(about).model_dump()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise ValueError(
            f"{index / ABOUT}: {key} cannot be used ({first['msg']}): build the index again"
        ) from None


def _check_files(index: Path, about: dict[str, Any]) -> None:
    """Checks the files of an index before FAISS reads one: it trusts all numbers in it.

    Indexes of earlier versions have no checksums. For them the kind of index and the size of the
    file are checked, so that FAISS reads no more than is there.

    Raises:
        ValueError: a file is not the one that was written, or is another kind of index.
    """
    for name, digest in about["sha256"].items():
        if name in (VECTORS, ITEMS) and file_digest(index / name) != digest:
            raise ValueError(
                f"{index / name} is not the file that was written (its checksum differs): build "
                "the index again"
            )
    file = index / VECTORS
    with open(file, "rb") as stream:
        head = stream.read(_HEADER.size)
    if len(head) < _HEADER.size:
        raise ValueError(f"the files of {index} are damaged: build the index again")
    kind, width, count, _, _, _, metric, values = _HEADER.unpack(head)
    size = file.stat().st_size
    if kind not in _KINDS or metric != 0:
        raise ValueError(f"{file} is not the kind of index that is read here: build it again")
    if width * count != values or _HEADER.size + 4 * values != size:
        raise ValueError(f"the files of {index} are damaged: build the index again")


def read_items(file: Path) -> list[dict[str, Any]]:
    """Reads the items of an index.

    Raises:
        ValueError: a line is no item.
    """
    items = []
    try:
        for number, line in enumerate(file.read_text("utf-8").split("\n"), 1):
            if not line:
                continue
            item = json.loads(line)
            kind = item.get("kind") if isinstance(item, dict) else None
            if kind not in ("image", "text") or not isinstance(item.get(kind), str):
                raise ValueError(f"line {number} is no item of an index")
            items.append(item)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: {first_line(error)}: build the index again") from None
    return items


def file_digest(file: Path) -> str:
    """Returns the SHA-256 of a file."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_replaceable(out: Path) -> None:
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() and not (out.is_dir() and (out / ABOUT).is_file()):
        raise ValueError(f"{out} is there and is no index: choose another name")
    foreign = (
        [p.name for p in out.iterdir() if p.name not in (VECTORS, ITEMS, ABOUT)]
        if out.exists()
        else []
    )
    if foreign:
        raise ValueError(f"{out} also holds {foreign[0]}, which would be lost: choose another name")
