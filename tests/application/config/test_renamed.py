"""A key's old name is read everywhere, with one line that gives the new name, and never written."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from mmadapters.adapters import storage
from mmadapters.tasks.artifact import open_directory
from mmadapters.tasks.cli.app import app
from mmadapters.tasks.config.errors import ConfigError, RenamedKeyWarning
from mmadapters.tasks.config.file import from_data, read_config
from mmadapters.tasks.jobs.comparison.config import read_comparison, read_contenders
from mmadapters.tasks.jobs.continual.config import read_continual, read_jobs
from mmadapters.tasks.jobs.folder import make_folder, run_folder
from mmadapters.tasks.training.checkpoint import mark_whole

BASE = "task: segmentation\nbackbone:\n  name: nano/vit\ndata:\n  source: builtin/scenes\n"
OLD = "trainer.cache_prefix is now called trainer.cache_trunk"
JOB: dict[str, Any] = {
    "task": "classification",
    "name": "shapes",
    "output": "run",
    "backbone": {"name": "nano/vit"},
    "data": {
        "source": "builtin/scenes",
        "options": {"train": 16, "validation": 8, "test": 8},
        "columns": {"label": "count"},
    },
    "trainer": {"mode": "head", "max_steps": 1, "batch_size": 8, "tensorboard": False},
    "evaluation": {"bootstrap": 0, "pictures": 0},
}


@pytest.fixture(autouse=True)
def _there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def file(text: str) -> str:
    Path("job.yaml").write_text(text, encoding="utf-8")
    return "job.yaml"


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def ok(*arguments: str) -> str:
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_file_may_use_the_old_name() -> None:
    path = file(BASE + "trainer:\n  epochs: 3\n  cache_prefix: off\n")
    with pytest.warns(RenamedKeyWarning, match=f"^job.yaml:8: {OLD}") as told:
        config = read_config(path)
    assert len(told) == 1
    assert "\n" not in str(told[0].message)
    assert (config.trainer.epochs, config.trainer.cache_trunk) == (3, "off")
    assert "cache_prefix" not in json.dumps(config.model_dump(mode="json"))


@pytest.mark.parametrize(
    "override",
    ["trainer.cache_prefix=disk", "trainer={cache_prefix: disk}", "trainer[cache_prefix]=disk"],
)
@pytest.mark.parametrize("written", ["", "trainer: {cache_trunk: memory}\n"])
def test_an_override_may_use_the_old_name_and_wins(override: str, written: str) -> None:
    with pytest.warns(RenamedKeyWarning, match=r"in the override '.*': " + OLD):
        config = read_config(file(BASE + written), [override])
    assert config.trainer.cache_trunk == "disk"


def test_an_override_by_the_new_name_wins_over_the_old_name_in_a_file() -> None:
    path = file(BASE + "trainer: {cache_prefix: memory}\n")
    with pytest.warns(RenamedKeyWarning):
        assert read_config(path, ["trainer.cache_trunk=disk"]).trainer.cache_trunk == "disk"


def test_new_names_give_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_config(file(BASE + "trainer: {cache_trunk: disk}\n"), ["trainer.cache_trunk=off"])


@pytest.mark.filterwarnings("ignore::mmadapters.tasks.config.errors.RenamedKeyWarning")
def test_both_names_are_refused() -> None:
    both = "trainer:\n  cache_trunk: off\n  cache_prefix: off\n"
    with pytest.raises(ConfigError, match=r"^job.yaml:8: trainer.cache_trunk is given twice"):
        read_config(file(BASE + both))
    overrides = ["trainer.cache_prefix=off", "trainer={cache_trunk: off}"]
    for given in (overrides, overrides[::-1]):
        with pytest.raises(ConfigError, match=r"in the override .*cache_trunk is given twice"):
            read_config(file(BASE), given)


def test_a_wrong_value_is_told_at_the_line_of_the_old_name() -> None:
    path = file(BASE + "trainer:\n  cache_prefix: of\n")
    with (
        pytest.warns(RenamedKeyWarning),
        pytest.raises(ConfigError, match=r"^job.yaml:7: trainer.cache_trunk must be auto"),
    ):
        read_config(path)


def test_a_saved_job_may_have_the_old_name() -> None:
    saved = read_config(file(BASE)).model_dump(mode="json")
    del saved["trainer"]["cache_trunk"]
    saved["trainer"]["cache_prefix"] = "memory"
    with pytest.warns(RenamedKeyWarning, match=f"^runs/a: {OLD}"):
        assert from_data(saved, source="runs/a").trainer.cache_trunk == "memory"
    with pytest.warns(RenamedKeyWarning, match=f"^runs/a: {OLD}"):
        config = from_data(saved, ["trainer.cache_trunk=off"], source="runs/a")
    assert config.trainer.cache_trunk == "off"


@pytest.mark.parametrize(
    "changes", [{"trainer.cache_prefix": "off"}, {"trainer": {"cache_prefix": "off"}}]
)
def test_configs_of_several_jobs_may_use_the_old_name(changes: dict[str, Any]) -> None:
    job = {"config": "classify_scenes", "overrides": {"name": "a", **changes}}
    jobs = {"jobs": [job, {"config": "classify_scenes", "overrides": {"name": "b"}}]}
    with pytest.warns(RenamedKeyWarning, match="is now called jobs.0.overrides.trainer.cache_tr"):
        several = read_continual(file(yaml.safe_dump(jobs)))
    assert [job.trainer.cache_trunk for job in read_jobs(several)] == ["off", "auto"]
    methods = {"job": "classify_scenes", "methods": {"LoRA": {"trainer.mode": "lora", **changes}}}
    with pytest.warns(RenamedKeyWarning, match="now called methods.LoRA.trainer.cache_trunk"):
        comparison = read_comparison(file(yaml.safe_dump(methods)))
    assert read_contenders(comparison)["LoRA"].trainer.cache_trunk == "off"
    for config in (several, comparison):
        assert "cache_prefix" not in json.dumps(config.model_dump(mode="json"))


def test_a_run_that_began_under_the_old_name_is_resumed() -> None:
    folder = Path("run")
    config = read_config(file(BASE), ["trainer.cache_trunk=off"])
    make_folder(folder, config)
    written = (folder / "config.yaml").read_text("utf-8")
    assert "cache_trunk: 'off'" in written
    (folder / "config.yaml").write_text(written.replace("cache_trunk", "cache_prefix"), "utf-8")
    checkpoint = folder / "checkpoints" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    mark_whole(checkpoint)
    with (
        pytest.warns(RenamedKeyWarning, match=f"^run/config.yaml: {OLD}"),
        run_folder(folder, config, resume=True, overwrite=False) as resumed,
    ):
        assert resumed.checkpoint == checkpoint
    other = read_config("job.yaml", ["trainer.cache_trunk=disk"])
    with (
        pytest.warns(RenamedKeyWarning),
        pytest.raises(ValueError, match=r"another config \(trainer.cache_trunk\)"),
        run_folder(folder, other, resume=True, overwrite=False),
    ):
        pass


def test_the_command_line_prints_one_line_and_writes_the_new_name() -> None:
    trainer = {**JOB["trainer"], "cache_prefix": "off"}
    output = ok("train", file(yaml.safe_dump({**JOB, "trainer": trainer})), "--quiet")
    (line,) = [line for line in output.splitlines() if "cache_prefix" in line]
    assert line.startswith("warning: job.yaml:")
    assert line.endswith(f"{OLD}: write the new name")
    for path in ("run/config.yaml", f"run/adapter/{storage.JSON_FILE}", "run/report.html"):
        text = Path(path).read_text("utf-8")
        assert "cache_trunk" in text
        assert "cache_prefix" not in text


def test_an_adapter_directory_with_the_old_name_opens() -> None:
    ok("train", file(yaml.safe_dump(JOB)), "--quiet", "trainer.cache_trunk=off")
    saved = Path("run/adapter") / storage.JSON_FILE
    text = saved.read_text("utf-8").replace("cache_trunk", "cache_prefix")
    lines = [line for line in text.splitlines() if '"checksum"' not in line]  # as of that version
    saved.write_text("\n".join(lines), "utf-8")
    with pytest.warns(RenamedKeyWarning, match=f"^run/adapter: {OLD}"):
        opened = open_directory("run")
    assert opened.task.config.trainer.cache_trunk == "off"
    assert "cache_prefix is now called" in ok("evaluate", "run")
