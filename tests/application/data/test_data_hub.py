"""Hub data sets, whole and streamed, from a hub that this machine serves by HTTP."""

import http.server
import io
import json
import os
import re
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image

NAME = "team/pets"
COMMIT = "a" * 40
CLASSES = ["cat", "dog", "hen"]


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hugging Face hub's interface as reading one data set takes."""

    folder: ClassVar[Path]
    read: ClassVar[list[str]]

    def do_GET(self) -> None:
        status, headers, content = self.answer()
        if (wanted := self.headers.get("Range")) and status == 200:
            match = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted)
            assert match is not None
            start, stop, size = int(match[1]), int(match[2]) + 1, len(content)
            content, status = content[start:stop], 206
            headers["Content-Range"] = f"bytes {start}-{start + len(content) - 1}/{size}"
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_HEAD = do_GET

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        url = urllib.parse.urlparse(self.path)
        path = urllib.parse.unquote(url.path)
        if match := re.fullmatch(rf"/datasets/{NAME}/resolve/[^/]+/(.*)", path):
            file = self.folder / match[1]
            if not file.is_file():
                return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b""
            if self.command == "GET":
                self.read.append(match[1])
            return 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{match[1]}"'}, file.read_bytes()
        if match := re.fullmatch(rf"/api/datasets/{NAME}/tree/[^/]+(/.*)?", path):
            deep = "recursive=true" in url.query.lower()
            place = self.folder / (match[1] or "").strip("/")
            return self.json([self.entry(p) for p in place.glob("**/*" if deep else "*")])
        if re.fullmatch(rf"/api/datasets/{NAME}(/revision/[^/]+)?", path):
            names = [p.name for p in self.folder.rglob("*") if p.is_file()]
            return self.json(
                {"id": NAME, "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
            )
        return 404, {"X-Error-Code": "RepoNotFound"}, b""

    def entry(self, path: Path) -> dict[str, Any]:
        name = path.relative_to(self.folder).as_posix()
        kind = "file" if path.is_file() else "directory"
        return {"type": kind, "path": name, "size": path.stat().st_size, "oid": name}

    @staticmethod
    def json(content: Any) -> tuple[int, dict[str, str], bytes]:
        return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()

    def log_message(self, *parts: Any) -> None:
        pass


def table(count: int, start: int) -> pa.Table:
    def picture(i: int) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (2, 2), (i, 0, 0)).save(buffer, "PNG")
        return buffer.getvalue()

    def sound(i: int) -> bytes:
        buffer = io.BytesIO()
        soundfile.write(buffer, np.full(10, i / 256), 8000, format="WAV")
        return buffer.getvalue()

    numbers = range(start, start + count)
    storage = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "audio": datasets.Audio(),
            "label": datasets.ClassLabel(names=CLASSES),
            "sentence": datasets.Value("string"),
        }
    )
    columns = {
        "image": pa.array([{"bytes": picture(i), "path": "x.png"} for i in numbers], storage),
        "audio": pa.array([{"bytes": sound(i), "path": "x.wav"} for i in numbers], storage),
        "label": pa.array([i % 3 for i in numbers], pa.int64()),
        "sentence": pa.array([None if i == start + 3 else f"text {i}" for i in numbers]),
    }
    return pa.table(columns).replace_schema_metadata(features.arrow_schema.metadata)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its address; 60 training rows in two files and 30 of test."""
    folder = tmp_path_factory.mktemp("hub")
    (folder / "data").mkdir()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    for i in range(2):
        pq.write_table(table(30, 30 * i), folder / "data" / f"train-0000{i}-of-00002.parquet")
    pq.write_table(table(30, 100), folder / "data" / "test-00000-of-00001.parquet")
    Hub.folder, Hub.read = folder, []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


PROGRAM = """
import json
import datasets
from mmadapters.tasks.config.schema import DataConfig
from mmadapters.tasks.core.rows import Column
from mmadapters.tasks.core.task import Column
from mmadapters.tasks.data import media
from mmadapters.tasks.data.load import load_splits

# It rests for 5 s after each pass, lest threads outlive the interpreter.
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.2

ROLES = {"image": Column("image"), "audio": Column("audio"), "text": Column("text"),
         "label": Column("label")}

def load(source="team/pets", **settings):
    config = DataConfig(source=source, columns={"text": "sentence"}, **settings)
    return load_splits(config, ROLES)

def told(row):
    red = media.read_image(row["image"]).getpixel((0, 0))[0]
    level = round(256 * float(media.read_audio(row["audio"], 8000)[0]))
    return [red, level, row["text"], row["label"]]

def refused(**settings):
    try:
        load(**settings)
    except ValueError as error:
        return str(error)

print(json.dumps(main()))
"""


def on_hub(hub: str, home: Path, main: str) -> Any:
    """What the body of `main` returns in a process of its own that takes `hub` for the hub."""
    body = "\n".join("    " + line for line in main.strip().splitlines())
    program = PROGRAM.replace("print(", f"def main():\n{body}\n\nprint(", 1)
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def rows(numbers: range, *, without: int) -> list[list]:
    return [[i, i, "" if i == without else f"text {i}", CLASSES[i % 3]] for i in numbers]


def test_hub_data_set(hub: str, tmp_path: Path) -> None:
    found = on_hub(
        hub,
        tmp_path,
        """
found = load(revision="main", name="default", limit={"train": 3}, fractions={"validation": 0.1})
return {
    "sizes": {split: len(rows) for split, rows in found.items()},
    "test": [told(row) for row in found["test"]],
    "on_disk": bool(found["test"].cache_files),
    "source": refused(source="team/pts"),
    "name": refused(name="defalt"),
    "column": refused(keep={"test": {"lable": ["cat"]}}),
}
""",
    )
    assert found["sizes"] == {"train": 3, "validation": 6, "test": 30}
    assert found["test"] == rows(range(100, 130), without=103)
    assert found["on_disk"]
    where = (
        "data.source: {!r} is not a local folder or file, and as a hub data set it cannot be read"
    )
    assert found["source"].startswith(where.format("team/pts"))
    assert "\n" not in found["source"]
    assert found["name"].startswith(where.format("team/pets"))
    assert "'defalt' not found. Available: ['default']" in found["name"]
    assert "no column 'lable'; did you mean 'label'" in found["column"]


def test_stream(hub: str, tmp_path: Path) -> None:
    Hub.read.clear()
    found = on_hub(
        hub,
        tmp_path,
        """
found = load(streaming=True, limit={"test": 4}, keep={"train": {"label": ["cat", "hen"]}})
stream = found["train"]
return {
    "columns": stream.column_names,
    "type": type(stream).__name__,
    "train": [told(row) for row in stream],
    "again": [told(row) for row in stream] == [told(row) for row in stream],
    "shuffled": [[row["text"] for row in stream.shuffle(10, seed)] for seed in (0, 0, 1)],
    "head": len(stream.head(5)),
    "test": [told(found["test"][i]) for i in range(len(found["test"]))],
    "test_again": [told(row) for row in load(streaming=True, limit={"test": 4})["test"]],
    "whole_test": [told(row) for row in load(streaming=True)["test"]],
    "limited": type(load(streaming=True, limit={"train": 7})["train"]).__name__,
    "fractions": refused(streaming=True, fractions={"validation": 0.1}),
    "column": refused(streaming=True, drop={"train": {"lable": ["cat"]}}),
    "split": refused(streaming=True, splits={"test": "tst"}),
    "by_column": refused(streaming=True, split_column="label"),
}
""",
    )
    expected = [row for row in rows(range(60), without=3) if row[3] != "dog"]
    expected = [[*row[:2], "" if row[0] == 33 else row[2], row[3]] for row in expected]
    assert found["type"] == "Stream"
    assert set(found["columns"]) == {"image", "audio", "text", "label"}
    assert found["train"] == expected
    assert found["again"]
    first, same, other = found["shuffled"]
    assert first == same != other
    assert sorted(first) == sorted(row[2] for row in expected) != first
    assert found["head"] == 5
    assert len(found["test"]) == 4
    assert found["test"] == found["test_again"]
    assert all(row in rows(range(100, 130), without=103) for row in found["test"])
    assert found["whole_test"] == rows(range(100, 130), without=103)
    assert found["limited"] == "Dataset"
    assert "no validation rows can be cut from a stream" in found["fractions"]
    assert "no column 'lable'; did you mean 'label'" in found["column"]
    assert "test is 'tst', which the data does not have; did you mean 'test'" in found["split"]
    assert "not with data.streaming" in found["by_column"]
    assert {Path(name).suffix for name in Hub.read} <= {".md", ".parquet"}


def test_stream_in_a_worker_process(hub: str, tmp_path: Path) -> None:
    found = on_hub(
        hub,
        tmp_path,
        """
import torch
class Texts(torch.utils.data.IterableDataset):
    def __init__(self, stream):
        self.stream = stream
    def __iter__(self):
        return (row["text"] for row in self.stream)
stream = load(streaming=True)["train"].shuffle(10, 0)
here = [row["text"] for row in stream]
loader = torch.utils.data.DataLoader(Texts(stream), batch_size=None, num_workers=1)
return [here, list(loader)]
""",
    )
    here, there = found
    assert len(here) == 60
    assert here == there
