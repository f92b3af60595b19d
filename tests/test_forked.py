"""Programs that tests fork are what they would be if they were started by themselves."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import forked
import pytest

PROGRAM = """
import json, os, sys
from pathlib import Path
told = {"modules": list(sys.modules), "variables": dict(os.environ), "arguments": sys.argv[1:]}
rank = os.environ.get("RANK", "0")
Path(sys.argv[1], rank).write_text(json.dumps(told | {"folder": os.getcwd(), "name": __name__}))
print("wrong", rank, file=sys.stderr)
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def test_a_program_has_its_arguments_and_everything_imported(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINT", "red")
    monkeypatch.chdir(tmp_path)
    done = forked.run(program, str(tmp_path), "b")
    assert (done.returncode, done.stderr) == (0, "wrong 0\n")
    told = json.loads((tmp_path / "0").read_text())
    assert (told["name"], told["arguments"]) == ("__main__", [str(tmp_path), "b"])
    assert (told["folder"], told["variables"]["TINT"]) == (str(tmp_path), "red")
    assert set(forked.PRELOADED) <= set(told["modules"])
    assert "RANK" not in told["variables"]


def test_a_group_has_the_variables_of_the_launcher_of_torch(program: Path, tmp_path: Path) -> None:
    done = forked.run(program, str(tmp_path), processes=2)
    assert done.stderr.split() == ["wrong", "0", "wrong", "1"]
    for rank in ("0", "1"):
        variables = json.loads((tmp_path / rank).read_text())["variables"]
        assert (variables["RANK"], variables["LOCAL_RANK"]) == (rank, rank)
        assert (variables["WORLD_SIZE"], variables["LOCAL_WORLD_SIZE"]) == ("2", "2")
        assert {"MASTER_ADDR", "MASTER_PORT"} <= variables.keys()


@pytest.mark.parametrize(
    ("last", "code"),
    [
        ("raise SystemExit(3)", 3),
        ("raise ValueError('seven')", 1),
        ("import signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
    ],
)
def test_failures_have_their_exit_code_and_words(
    program: Path, tmp_path: Path, last: str, code: int
) -> None:
    program.write_text(f"{PROGRAM}{last}\n")
    done = forked.run(program, str(tmp_path))
    assert done.returncode == code
    assert ("ValueError: seven" in done.stderr) is (code == 1)


def test_a_program_that_does_not_end_is_killed(program: Path, tmp_path: Path) -> None:
    program.write_text("import time; time.sleep(600)")
    with pytest.raises(TimeoutError, match="still running after 1"):
        forked.run(program, timeout=1)
