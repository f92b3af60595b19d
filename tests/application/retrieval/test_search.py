"""Embeddings, similarity tables and indexes of files and texts, as the command line gives them."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from application.endings import Told, until_error

from mmadapters.tasks.core.errors import BadInputs
from mmadapters.tasks.retrieval.index import build_index, fingerprint, search_index
from mmadapters.tasks.retrieval.model import RetrievalModel
from mmadapters.tasks.retrieval.queries import Item, items
from mmadapters.tasks.retrieval.task import RetrievalTask

from .conftest import SceneRows, job, task_and_model

Pair = tuple[RetrievalTask, RetrievalModel]


def texts_of(known: SceneRows, count: int) -> list[str]:
    return [captions[0] for captions in known["captions"][:count]]


def predicted(pair: Pair, inputs: list, out: Path | None = None) -> list[dict]:
    task, model = pair
    return list(task.predict(model, [str(value) for value in inputs], out=out))


def test_inputs_are_pictures_texts_and_files_of_texts(files: list[Path], tmp_path: Path) -> None:
    lines = tmp_path / "queries.txt"
    lines.write_text("a star\n\n  a ring \n", "utf-8")
    found = items([str(files[0]), "two crosses", str(lines)])
    assert found == [
        Item("image", str(files[0])),
        Item("text", "two crosses"),
        Item("text", "a star"),
        Item("text", "a ring"),
    ]
    assert items(["word " * 200])[0].kind == "text"  # longer than a file name may be


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such/picture.png", "there is no file no/such/picture.png"),
        ("queries.txt", "there is no file queries.txt"),
        ("  ", "a query is empty"),
    ],
)
def test_an_input_that_is_not_there_is_one_sentence(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        items([name])


def test_a_file_that_is_no_picture_or_no_text_is_named(zero_shot: Pair, tmp_path: Path) -> None:
    broken, empty, binary = (tmp_path / name for name in ("a.png", "b.txt", "c.txt"))
    broken.write_bytes(b"no picture")
    empty.write_text("\n \n")
    binary.write_bytes(b"\xff\xfe\x00\x80")
    for path, message in ((broken, "a.png"), (empty, "holds no text"), (binary, "UTF-8")):
        with pytest.raises(ValueError, match=message):
            predicted(zero_shot, [path])


def test_each_picture_finds_its_own_caption(
    zero_shot: Pair, files: list[Path], known: SceneRows
) -> None:
    texts = texts_of(known, 4)
    results = predicted(zero_shot, [*files, *texts])
    assert [result["kind"] for result in results] == ["image"] * 4 + ["text"] * 4
    for number, result in enumerate(results[:4]):
        assert result["matches"][0]["text"] == texts[number]
        similarities = [match["similarity"] for match in result["matches"]]
        assert similarities == sorted(similarities, reverse=True)
    for number, result in enumerate(results[4:]):
        assert result["matches"][0]["image"] == str(files[number])
    json.dumps(results)


def test_vectors_are_returned_or_written_and_their_products_are_the_similarities(
    zero_shot: Pair, files: list[Path], known: SceneRows, tmp_path: Path
) -> None:
    inputs = [*files[:2], *texts_of(known, 2)]
    returned = predicted(zero_shot, inputs)
    out = tmp_path / "out"
    written = predicted(zero_shot, inputs, out)
    vectors = np.stack([np.load(result["embedding"], allow_pickle=False) for result in written])
    np.testing.assert_allclose(vectors, [r["embedding"] for r in returned], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    with open(out / "similarities.csv", newline="", encoding="utf-8") as file:
        head, *lines = csv.reader(file)
    assert head[1:] == inputs[2:]
    assert [line[0] for line in lines] == [str(path) for path in files[:2]]
    table = np.array([[float(cell) for cell in line[1:]] for line in lines])
    np.testing.assert_allclose(table, vectors[:2] @ vectors[2:].T, atol=1e-5)
    assert not list(out.rglob(".*.tmp"))


def test_one_kind_alone_has_no_table(zero_shot: Pair, files: list[Path], tmp_path: Path) -> None:
    results = predicted(zero_shot, [*files], tmp_path / "out")
    assert all("matches" not in result for result in results)
    assert not (tmp_path / "out" / "similarities.csv").exists()


faiss = pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("faiss") is None, reason="FAISS is not installed"
)


@faiss
def test_an_index_finds_pictures_by_text_and_by_picture(
    zero_shot: Pair, files: list[Path], known: SceneRows, tmp_path: Path
) -> None:
    task, model = zero_shot
    (files[0].parent / "notes.md").write_text("not a picture")
    out, seen = tmp_path / "index", []
    count = build_index(
        task, model, [str(files[0].parent)], out, progress=lambda *done: seen.append(done)
    )
    assert count == 4
    assert seen == [(4, 4)]
    for number, text in enumerate(texts_of(known, 4)):
        found = search_index(task, model, out, text, count=3)
        assert len(found) == 3
        assert found[0]["image"] == str(files[number])
        assert found[0]["kind"] == "image"
    same = search_index(task, model, out, str(files[2]))
    assert len(same) == 4
    assert same[0]["image"] == str(files[2])
    assert same[0]["similarity"] == pytest.approx(1, abs=1e-5)


@faiss
def test_an_index_of_texts_is_searched_by_picture(
    zero_shot: Pair, files: list[Path], known: SceneRows, tmp_path: Path
) -> None:
    task, model = zero_shot
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(texts_of(known, 20)), "utf-8")
    assert build_index(task, model, [str(texts)], tmp_path / "index") == 20
    found = search_index(task, model, tmp_path / "index", str(files[3]), count=1)
    assert found[0] == {
        "kind": "text",
        "text": texts_of(known, 4)[3],
        "similarity": found[0]["similarity"],
    }


@faiss
def test_a_text_of_an_index_may_hold_line_separators(
    zero_shot: Pair, files: list[Path], tmp_path: Path
) -> None:
    texts = ["a star\u2028below a ring", "two\x85crosses", "a\x0cmoon"]
    (tmp_path / "texts.txt").write_text("\r\n".join(texts), "utf-8")
    assert build_index(*zero_shot, [str(tmp_path / "texts.txt")], tmp_path / "index") == 3
    results = search_index(*zero_shot, tmp_path / "index", str(files[0]), count=9)
    assert {result["text"] for result in results} == {*texts}


@faiss
def test_an_index_of_another_adapter_is_refused(
    zero_shot: Pair, files: list[Path], known: SceneRows, tmp_path: Path
) -> None:
    task, model = zero_shot
    build_index(task, model, [str(files[0])], tmp_path / "index")
    other_task, other = task_and_model(job(), known)
    with pytest.raises(ValueError, match=r"another model .*'scenes' on nano/clip"):
        search_index(other_task, other, tmp_path / "index", "a star")


def test_a_fingerprint_is_of_all_that_makes_an_embedding(known: SceneRows) -> None:
    task, model = task_and_model(job(), known, adapter=False)
    first = fingerprint(task, model)
    assert fingerprint(*task_and_model(job(), known, adapter=False)) == first
    sentence = job(data={"source": "builtin/scenes", "template": "a drawing of {}"})
    assert fingerprint(RetrievalTask(sentence, task.state), model) != first
    resized = {**task.state, "preprocessing": {**task.state["preprocessing"], "height": 32}}
    assert fingerprint(RetrievalTask(task.config, resized), model) != first
    with torch.no_grad():
        model.head.text.up.weight[0, 0] += 1e-3
    assert fingerprint(task, model) != first


@faiss
def test_what_is_no_index_is_neither_read_nor_replaced(
    zero_shot: Pair, files: list[Path], tmp_path: Path
) -> None:
    task, model = zero_shot
    with pytest.raises(FileNotFoundError, match="is no index"):
        search_index(task, model, tmp_path, "a star")
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="is no index"):
        build_index(task, model, [str(files[0])], other)
    assert (other / "letter.txt").read_text() == "dear"
    index = tmp_path / "index"
    build_index(task, model, [str(files[0])], index)
    build_index(task, model, [str(path) for path in files], index)
    assert len(search_index(task, model, index, "a star")) == 4
    (index / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match=r"letter\.txt, which would be lost"):
        build_index(task, model, [str(files[0])], index)


@faiss
def test_an_index_is_checked_before_faiss_reads_it(
    zero_shot: Pair, files: list[Path], tmp_path: Path
) -> None:
    task, model = zero_shot
    index = tmp_path / "index"
    build_index(task, model, [str(path) for path in files], index)
    good, about = (
        (index / "index.faiss").read_bytes(),
        json.loads((index / "index.json").read_text()),
    )

    def said(data: bytes, **changes: Any) -> str:
        (index / "index.faiss").write_bytes(data)
        (index / "index.json").write_text(json.dumps({**about, **changes}))
        with pytest.raises(ValueError) as caught:
            search_index(task, model, index, "a star")
        return str(caught.value)

    for at in (0, 8, 15, 37, 45, len(good) - 1):
        changed = bytearray(good)
        changed[at] ^= 1
        assert "its checksum differs" in said(bytes(changed))
    # Without checksums, as earlier versions wrote it.
    assert "is not the kind of index" in said(b"IxF2" + good[4:], sha256={})
    assert "are damaged" in said(good[:8] + b"\xff" * 7 + good[15:], sha256={})
    for changes in (
        {"count": "4"},
        {"width": None},
        {"model": 3},
        {"sha256": []},
        {"format": True},
    ):
        assert "build the index again" in said(good, **changes)
    (index / "index.faiss").write_bytes(good)
    (index / "index.json").write_text(json.dumps({**about, "sha256": {}}))
    assert len(search_index(task, model, index, "a star")) == 4


@faiss
@pytest.mark.parametrize("name", ["index.faiss", "items.jsonl", "index.json"])
def test_a_damaged_index_is_said_so(
    zero_shot: Pair, files: list[Path], tmp_path: Path, name: str
) -> None:
    task, model = zero_shot
    index = tmp_path / "index"
    build_index(task, model, [str(path) for path in files], index)
    data = (index / name).read_bytes()
    (index / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="build the index again"):
        search_index(task, model, index, "a star")


@faiss
def test_a_failed_build_leaves_the_old_index_and_nothing_else(
    zero_shot: Pair, files: list[Path], tmp_path: Path
) -> None:
    task, model = zero_shot
    index = tmp_path / "index"
    build_index(task, model, [str(files[0])], index)
    files[3].write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"3\.png"):
        build_index(task, model, [str(path) for path in files], index)
    assert len(search_index(task, model, index, "a star")) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"index", "pictures"}


@faiss
def test_queries_and_inputs_of_an_index_are_checked(
    zero_shot: Pair, files: list[Path], tmp_path: Path
) -> None:
    task, model = zero_shot
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="there is no picture in"):
        build_index(task, model, [str(empty)], tmp_path / "index")
    with pytest.raises(ValueError, match="nothing to index"):
        build_index(task, model, [], tmp_path / "index")
    build_index(task, model, [str(files[0])], tmp_path / "index")
    several = tmp_path / "several.txt"
    several.write_text("a star\na ring")
    with pytest.raises(ValueError, match="give one query, not the 2"):
        search_index(task, model, tmp_path / "index", str(several))


def test_without_faiss_the_extra_is_named(
    zero_shot: Pair, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match=r"pip install 'mmadapters\[index\]'"):
        build_index(*zero_shot, [str(files[0])], tmp_path / "index")


def test_a_bad_input_does_not_end_the_others(
    zero_shot: Pair, files: list[Path], tmp_path: Path
) -> None:
    task, model = zero_shot
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    inputs = [str(broken), str(files[0]), "gone.png", "a star"]
    results, reasons = until_error(task.predict(model, inputs, out=None, bad=(told := Told())))
    assert told.names == ["gone.png", str(broken)]
    assert results == predicted(zero_shot, [files[0], "a star"])
    assert reasons[0] == "there is no file gone.png"
    assert reasons[1].startswith(f"{broken}: the image file is in no format")
    with pytest.raises(BadInputs, match=r"gone\.png"):
        predicted(zero_shot, ["gone.png"])
