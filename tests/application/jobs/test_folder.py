"""Run directories: no start, no crash and no second run takes away what is there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from mmadapters.tasks import artifact
from mmadapters.tasks.artifact import open_directory
from mmadapters.tasks.cli.app import app
from mmadapters.tasks.config.file import read_config
from mmadapters.tasks.core.errors import AlreadyFinished
from mmadapters.tasks.jobs import run as runs
from mmadapters.tasks.jobs.folder import RunState, make_folder, run_folder, state_of
from mmadapters.tasks.jobs.lock import locked
from mmadapters.tasks.jobs.multitask.config import MultitaskConfig
from mmadapters.tasks.training.checkpoint import mark_whole

CONFIG: dict[str, Any] = {
    "task": "classification",
    "name": "shapes",
    "output": "runs/${name}",
    "backbone": {"name": "nano/vit"},
    "adapter": {"method": "double_seq_bn", "size": 4, "sites": ["vision.blocks.7.*"]},
    "data": {
        "source": "builtin/scenes",
        "options": {"train": 16, "validation": 8, "test": 8},
        "columns": {"label": "count"},
    },
    "trainer": {"max_steps": 2, "batch_size": 8, "tensorboard": False, "workers": 0},
    "evaluation": {"bootstrap": 0, "pictures": 0},
}
RUN = Path("runs/shapes")


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["train", "shapes.yaml", "--quiet", *arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config and its finished run."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "shapes.yaml").write_text(yaml.safe_dump(CONFIG))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = call()
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(autouse=True)
def _there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """The bytes of all files of a folder, and when each was written."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def unchanged() -> Iterator[None]:
    """The finished run is the same after the test, and nothing is left beside it."""
    before = contents(RUN)
    assert state_of(RUN) is RunState.FINISHED
    yield
    assert contents(RUN) == before
    assert {path.name for path in Path("runs").iterdir()} <= {"shapes", ".shapes.lock"}


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    "mistake",
    [
        "data.columns.label=cuont",
        "data.source=nowhere/at/all.csv",
        "backbone.name=nano/vti",
        "adapter.sites=[vision.blocks.99]",
    ],
)
def test_a_start_that_fails_leaves_the_run_that_it_was_to_replace(mistake: str) -> None:
    assert call(mistake, "--overwrite").exit_code == 1


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_run_that_ends_early_leaves_the_one_that_it_was_to_replace(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr("mmadapters.tasks.training.encoder_trainer.mark_whole", failing)
    config = read_config("shapes.yaml", ["trainer.save_every=1"])
    with pytest.raises(type(error)):
        runs.train(config, overwrite=True, quiet=True)


def test_an_interrupted_replacement_is_resumed_and_takes_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = contents(RUN)
    config = read_config("shapes.yaml", ["seed=1"])
    save = artifact.save

    def full(*args: Any, **kwargs: Any) -> None:
        if kwargs["whole"]:  # the disk was not full yet in the dry pass before training
            raise OSError(28, "No space left on device")
        save(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(artifact, "save", full)
        with pytest.raises(OSError, match="No space left"):
            runs.train(config, overwrite=True, quiet=True)
    assert contents(RUN) == before
    assert state_of(Path("runs/.shapes.new")) is RunState.UNFINISHED
    run = runs.train(config, resume=True, quiet=True)
    assert run.folder == RUN
    assert run.facts["steps"] == 2
    assert yaml.safe_load((RUN / "config.yaml").read_text())["seed"] == 1
    assert {path.name for path in Path("runs").iterdir()} == {"shapes", ".shapes.lock"}
    assert open_directory(RUN).model.encoder.adapter_names == ("shapes",)
    assert call("--overwrite").exit_code == 0
    assert yaml.safe_load((RUN / "config.yaml").read_text())["seed"] == 0


@pytest.mark.usefixtures("unchanged")
def test_a_finished_run_that_is_resumed_is_left_as_it_is() -> None:
    result = call("--resume")
    assert result.exit_code == 0
    assert "holds a finished run" in result.output.replace("\n", " ")
    with pytest.raises(AlreadyFinished):
        runs.train(read_config("shapes.yaml", []), resume=True)
    # What training does not read may differ.
    assert call("--resume", "evaluation.bootstrap=7").exit_code == 0
    assert call("--resume", "trainer.max_steps=3").exit_code == 1


@pytest.mark.usefixtures("unchanged")
def test_a_run_is_neither_written_over_nor_begun_again_without_a_flag() -> None:
    result = call()
    assert result.exit_code == 1
    assert "--overwrite" in result.output


@pytest.mark.parametrize("left", ["nothing", "config", "temporary", "incomplete", "rehearsal"])
def test_a_failed_start_blocks_nothing(left: str, tmp_path: Path) -> None:
    output = f"output={tmp_path / 'run'}"
    assert call(output, "data.columns.label=cuont").exit_code == 1
    assert not (tmp_path / "run").exists()
    config = read_config("shapes.yaml", [output, "seed=5"])
    if left == "temporary":
        (tmp_path / "run").mkdir()
        (tmp_path / "run/.config.yaml.tmp").write_text("task:")
    elif left != "nothing":
        make_folder(tmp_path / "run", config)
    if left == "rehearsal":
        (tmp_path / "run/.rehearsal.tmp").mkdir()
        (tmp_path / "run/.rehearsal.tmp/metrics.json").write_text("{}")
    if left == "incomplete":
        (tmp_path / "run/checkpoints/checkpoint-1").mkdir(parents=True)
    result = call(output)
    assert result.exit_code == 0, result.output
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["seed"] == 0


def test_an_unfinished_run_is_resumed_or_replaced_only_if_asked(tmp_path: Path) -> None:
    config = read_config("shapes.yaml", [])
    checkpoint = tmp_path / "run/checkpoints/checkpoint-3"
    make_folder(tmp_path / "run", config)
    checkpoint.mkdir(parents=True)
    mark_whole(checkpoint)
    with (
        pytest.raises(ValueError, match="unfinished run: pass --resume"),
        run_folder(tmp_path / "run", config, resume=False, overwrite=False),
    ):
        pass
    with run_folder(tmp_path / "run", config, resume=True, overwrite=False) as resumed:
        assert (resumed.place, resumed.checkpoint) == (tmp_path / "run", checkpoint)
        resumed.write()
        assert checkpoint.is_dir()
    with run_folder(tmp_path / "run", config, resume=False, overwrite=True) as replaced:
        replaced.write()
        assert replaced.place == tmp_path / ".run.new"
        assert checkpoint.is_dir()
        replaced.finish()
    assert not checkpoint.exists()


def test_keys_that_training_does_not_read_may_change_in_each_of_several_jobs(
    tmp_path: Path,
) -> None:
    def config(**changes: Any) -> MultitaskConfig:
        jobs = [{"config": "a", "overrides": {"name": name, **changes}} for name in ("a", "b")]
        return MultitaskConfig.model_validate({"tasks": jobs})

    make_folder(tmp_path / "run", config(**{"evaluation": {"bootstrap": 1}, "seed": 1}))
    (tmp_path / "run/work").write_text("")
    changed = config(**{"evaluation": {"bootstrap": 2, "pictures": 3}, "seed": 1})
    with run_folder(tmp_path / "run", changed, resume=True, overwrite=False) as resumed:
        assert resumed.goes_on
    other = config(**{"evaluation": {"bootstrap": 1}, "seed": 2})
    with (
        pytest.raises(ValueError, match=r"another config \(tasks.0.overrides.seed"),
        run_folder(tmp_path / "run", other, resume=True, overwrite=False),
    ):
        pass


def test_other_files_are_never_taken_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for flags in ([], ["--resume"], ["--overwrite"]):
        result = call(f"output={tmp_path}", *flags)
        assert result.exit_code == 1
        assert "other files than a run" in result.output.replace("\n", " ")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_replacement_that_was_complete_but_not_renamed_takes_its_place(tmp_path: Path) -> None:
    """Where directories cannot be exchanged at once, a process may end between two renames."""
    config = read_config("shapes.yaml", [])
    make_folder(tmp_path / ".run.new", config)
    (tmp_path / ".run.new/metrics.json").write_text("{}")
    with (
        pytest.raises(AlreadyFinished),
        run_folder(tmp_path / "run", config, resume=True, overwrite=False),
    ):
        pass
    assert (tmp_path / "run/metrics.json").is_file()


HOLD = """
import sys, time
from pathlib import Path
from mmadapters.tasks.jobs.lock import locked
from mmadapters.tasks.jobs.multitask.config import MultitaskConfig
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_runs_never_write_to_one_directory(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        result = call(f"output={run}")
        assert result.exit_code == 1
        said = " ".join(result.output.split())
        assert f"is being written by process {other.pid} on {os.uname().nodename} since" in said
        assert not run.exists()
        other.send_signal(signal.SIGKILL)
    with locked(run), pytest.raises(ValueError, match=f"process {os.getpid()} on"), locked(run):
        pass
    assert not run.exists()
