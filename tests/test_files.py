"""Files and directories are replaced whole; both names exist at every moment."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from mmadapters import files
from mmadapters.adapters import storage
from mmadapters.files import exchange, read_directory, replacing_directory, write_text


def made(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "text").write_text(text)
    return path


@pytest.mark.parametrize("at_once", [True, False])
def test_directories_are_exchanged(
    at_once: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not at_once:
        monkeypatch.setattr(files, "exchange_at_once", lambda one, two: False)
    elif not sys.platform.startswith("linux"):
        pytest.skip("only Linux exchanges directories at once")
    one, two = made(tmp_path / "one", "1"), made(tmp_path / "two", "2")
    assert not at_once or files.exchange_at_once(one, two)
    exchange(one, two)
    texts = [(path / "text").read_text() for path in (one, two)]
    assert texts == (["1", "2"] if at_once else ["2", "1"])
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux exchanges at once")
def test_a_reader_beside_a_writer_always_sees_a_directory(tmp_path: Path) -> None:
    target, missing, stop = made(tmp_path / "a", "0"), [], threading.Event()

    def look() -> None:
        while not stop.is_set():
            if not target.is_dir():
                missing.append(target)

    reader = threading.Thread(target=look)
    reader.start()
    for number in range(300):
        with replacing_directory(target) as fresh:
            write_text(fresh / "text", str(number))
    stop.set()
    reader.join()
    assert not missing
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_link_is_followed(tmp_path: Path) -> None:
    made(tmp_path / "disk", "old")
    (tmp_path / "name").symlink_to(tmp_path / "disk")
    with replacing_directory(tmp_path / "name") as fresh:
        (fresh / "text").write_text("new")
    assert (tmp_path / "name").is_symlink()
    assert (tmp_path / "disk/text").read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"disk", "name"}
    write_text(tmp_path / "plain", "old")
    (tmp_path / "other").symlink_to("plain")
    write_text(tmp_path / "other", "new")
    assert (tmp_path / "other").is_symlink()
    assert (tmp_path / "plain").read_text() == "new"


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_umask_decides_the_mode(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        with replacing_directory(tmp_path / "a") as fresh:
            write_text(fresh / "text", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o777 & ~mask
    assert (tmp_path / "a/text").stat().st_mode & 0o777 == 0o666 & ~mask


def test_leftovers_of_dead_processes_are_removed_and_others_kept(tmp_path: Path) -> None:
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"],
        text=True,
        capture_output=True,
        check=True,
    ).stdout.strip()
    old = made(tmp_path / f".a.{dead}.0123abcd.tmp", "old")
    new = made(tmp_path / f".a.{dead}.0123abce.tmp", "new")
    mine = made(tmp_path / f".a.{os.getpid()}.0123abcf.tmp", "mine")
    other = made(tmp_path / f".ab.{dead}.0123abcd.tmp", "of another name")
    for path in (old, mine, other):
        os.utime(path, (0, 0))
    with replacing_directory(tmp_path / "a") as fresh:
        write_text(fresh / "text", "x")
    assert {path.name for path in tmp_path.iterdir()} == {"a", new.name, mine.name, other.name}


def test_a_reader_sees_one_state_of_a_directory(tmp_path: Path) -> None:
    target = made(tmp_path / "a", "0")
    (target / "other").write_text("0")
    writes = iter(range(1, 4))

    def read() -> tuple[str, str]:
        text = (target / "text").read_text()
        for number in writes:  # a writer exchanges the directory between the two files
            with replacing_directory(target) as fresh:
                for name in ("text", "other"):
                    write_text(fresh / name, str(number))
            break
        return text, (target / "other").read_text()

    assert read_directory(target, read) == ("3", "3")
    with pytest.raises(FileNotFoundError):
        read_directory(tmp_path / "b", (tmp_path / "b/text").read_text)


def test_an_adapter_is_read_whole_while_others_are_written(tmp_path: Path) -> None:
    def stored(value: float) -> storage.Stored:
        return storage.Stored(
            name=f"{value:g}",
            config={"method": "lora"},
            backbone={"towers": {"vision": {"width": 1, "depth": 1, "weights": ""}}},
            tensors={"a": torch.full((64,), value)},
        )

    target, stop = tmp_path / "a", threading.Event()
    storage.write(target, stored(0))

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            storage.write(target, stored(number % 7))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(150):
            read = storage.read(target)
            assert torch.equal(read.tensors["a"], torch.full((64,), float(read.name)))
    finally:
        stop.set()
        writer.join()
