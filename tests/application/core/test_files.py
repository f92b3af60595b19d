"""Files that cannot be opened are refused with a true sentence."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mmadapters.tasks.core.errors import BadRow
from mmadapters.tasks.core.files import open_file, output_names, why_unopened
from mmadapters.tasks.data.media import read_audio, read_image
from mmadapters.tasks.jobs.prediction import expand


def test_files_that_cannot_be_opened_say_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    os.mkfifo(tmp_path / "pipe")
    reasons = {
        "nowhere.wav": r"^no such file: .*nowhere\.wav$",
        "file/a.wav": r"^no such file: .*a part of this path is a file",
        "dangling": r"dangling is a link to .*gone, where there is no file$",
        "circle": r"circle is a link that leads in a circle$",
        "pipe": r"pipe is no regular file",
        ".": r"^cannot open .*: Is a directory",
        "x" * 300: r"x… is longer than a path may be$",
        "a\0b": r"^no such file: .* null character",
    }
    for name, reason in reasons.items():
        for read in (open_file, read_image, lambda path: read_audio(path, 16_000)):
            with pytest.raises(BadRow, match=reason):
                read(f"{tmp_path}/{name}")
    with open_file(tmp_path / "file") as file:
        assert file.read() == b"x"


def test_a_file_that_this_user_may_not_read_is_there(tmp_path: Path) -> None:
    path = tmp_path / "locked.wav"
    path.write_bytes(b"x")
    path.chmod(0)
    if os.geteuid():
        with pytest.raises(BadRow, match=r"locked\.wav cannot be opened: this user has no perm"):
            open_file(path)
    # Nothing is locked for the superuser.
    said = why_unopened(path, PermissionError(errno.EACCES, "Permission denied"))
    assert said == f"{path} cannot be opened: this user has no permission to read it"
    other = why_unopened(path, OSError(errno.EIO, os.strerror(errno.EIO)))
    assert other == f"{path} cannot be opened: Input/output error"


def test_a_folder_stands_for_the_files_that_a_task_reads(tmp_path: Path) -> None:
    for name in ("b.wav", "a.WAV", ".c.wav", "cover.jpg", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "d.wav").mkdir()
    names = [Path(name).name for name in expand(str(tmp_path), (".wav", ".flac"))]
    assert names == ["a.WAV", "b.wav"]
    assert expand("a text " * 100, (".wav",)) == ["a text " * 100]
    with pytest.raises(ValueError, match=r"d\.wav has no file that is read \(\.wav\)"):
        expand(str(tmp_path / "d.wav"), (".wav",))


@pytest.mark.parametrize(
    ("inputs", "names"),
    [
        (["x/a.png", "x/a_2.png", "y/a.png"], ["x/a", "x/a_2", "y/a"]),
        (["x/a.png", "x/b.png"], ["a", "b"]),
        (["a.png", "a.jpg", "a_2.png", "a.gif"], ["a", "a_3", "a_2", "a_4"]),
        (["x/a.png", "x/a.png", "x/A.png"], ["a", "a_2", "A_3"]),
        (["x/a.b.png", "../z.png"], ["here/x/a.b", "z"]),
        ([], []),
    ],
)
def test_output_names_keep_folders_and_are_unique(
    inputs: list[str], names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert output_names(inputs) == names
