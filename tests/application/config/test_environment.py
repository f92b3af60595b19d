"""Values of environment variables stand in no saved file, and saved configs still work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mmadapters.tasks.config.environment import described, masked, unread
from mmadapters.tasks.config.file import from_data, read_config
from mmadapters.tasks.config.schema import JobConfig
from mmadapters.tasks.jobs.comparison.config import read_comparison, read_contenders
from mmadapters.tasks.jobs.continual.config import contrast_jobs, read_continual, read_jobs
from mmadapters.tasks.jobs.folder import make_folder, run_folder
from mmadapters.tasks.jobs.multitask.config import read_multitask, read_tasks

SECRET = "xyzzy-9f1c"
CONFIG: dict[str, Any] = {
    "task": "classification",
    "name": "pets",
    "backbone": {"name": "nano/vit", "options": {"token": "${oc.env:TOKEN}"}},
    "data": {
        "source": "${oc.env:PLACE}/pets",
        "root": "${data.source}/images",
        "options": {
            "list": ["a", "key=${oc.env:TOKEN}&b=\\${c}"],
            "decoded": "${oc.decode:${oc.env:TOKEN}}",
            "default": "${oc.env:NOT_SET,cats}",
        },
    },
    "trainer": {
        "precision": "${oc.env:PRECISION}",
        "batch_size": "${oc.decode:${oc.env:NUMBER}}",
    },
}


@pytest.fixture(autouse=True)
def _variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "place/pets").mkdir(parents=True)
    (tmp_path / "pets.yaml").write_text(yaml.safe_dump(CONFIG))
    for name, value in (
        *(("TOKEN", SECRET), ("PRECISION", "bf16"), ("NUMBER", "7")),
        ("PLACE", str(tmp_path / "place")),
    ):
        monkeypatch.setenv(name, value)


def saved(config: JobConfig) -> tuple[dict[str, Any], list[Any]]:
    return config.to_save(), described(config.environment)


def test_a_saved_config_has_interpolations_in_place_of_values(tmp_path: Path) -> None:
    config = read_config("pets.yaml")
    assert config.backbone.options == {"token": SECRET}
    assert config.data.options["list"][1] == f"key={SECRET}&b=${{c}}"
    data, places = saved(config)
    assert data["backbone"]["options"] == {"token": "${oc.env:TOKEN}"}
    assert data["data"]["source"] == "${oc.env:PLACE}/pets"
    assert data["data"]["root"] == "${oc.env:PLACE}/pets/images"
    assert data["data"]["options"] == {
        "list": ["a", "key=${oc.env:TOKEN}&b=\\${c}"],
        "decoded": "${oc.env:TOKEN}",
        "default": "${oc.env:NOT_SET,cats}",
    }
    # What is no text, or one of the values that a key lists, is no secret.
    assert (data["trainer"]["batch_size"], data["trainer"]["precision"]) == (7, "bf16")
    assert SECRET not in repr((data, places))
    assert str(tmp_path) not in repr((data, places))
    text = f"no such file: {config.data.source}/1.png"
    assert masked(text, config.environment) == "no such file: ${oc.env:PLACE}/pets/1.png"


def test_a_saved_config_reads_the_values_that_it_was_saved_with() -> None:
    config = read_config("pets.yaml")
    data, places = saved(config)
    again = from_data(data, environment=places)
    assert again.model_dump() == config.model_dump()
    changed = from_data(data, ["data.source=${oc.env:TOKEN}"], environment=places)
    assert changed.data.source == SECRET
    assert changed.to_save()["data"]["source"] == "${oc.env:TOKEN}"


def test_a_saved_config_reads_no_other_value(monkeypatch: pytest.MonkeyPatch) -> None:
    data, places = saved(read_config("pets.yaml"))
    monkeypatch.setenv("TOKEN", "of somebody else")
    monkeypatch.delenv("PLACE")
    again = from_data(data, environment=places)
    assert again.backbone.options == {"token": "${oc.env:TOKEN}"}
    assert again.data.source == "${oc.env:PLACE}/pets"
    assert unread(again.data.model_dump()) == "${oc.env:PLACE}/pets"
    # Nor where nothing says that a variable was there, or what its value was.
    monkeypatch.setenv("TOKEN", SECRET)
    for wrong in ([], [{"path": ["backbone", "options", "token"], "check": "a$b"}], [3], [{}]):
        again = from_data(data, environment=wrong)
        assert again.backbone.options == {"token": "${oc.env:TOKEN}"}


def test_a_path_is_read_on_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, places = saved(read_config("pets.yaml"))
    (tmp_path / "elsewhere/pets/images").mkdir(parents=True)
    monkeypatch.setenv("PLACE", str(tmp_path / "elsewhere"))
    assert from_data(data, environment=places).data.source == str(tmp_path / "elsewhere/pets")


def test_jobs_of_several_read_the_variable_themselves() -> None:
    (Path("nano.yaml")).write_text(
        yaml.safe_dump(CONFIG | {"backbone": {"name": "nano/vit"}, "data": {"source": "a"}})
    )
    changes = {"data.options": {"token": "${oc.env:TOKEN}"}}
    listed = [
        {"config": "nano.yaml", "overrides": {"name": name, **changes}} for name in ("one", "two")
    ]
    overrides = {"trainer.cache_folder": "${oc.env:TOKEN}"}
    several = {"name": "two", "jobs": listed, "contrast_overrides": overrides}
    Path("two.yaml").write_text(yaml.safe_dump(several))
    continual = read_continual("two.yaml")
    jobs = read_jobs(continual)
    full = contrast_jobs(continual, jobs)
    Path("both.yaml").write_text(
        yaml.safe_dump({"tasks": listed, "trainer": {"cache_folder": "${oc.env:TOKEN}"}})
    )
    multitask = read_multitask("both.yaml")
    tasks = read_tasks(multitask)
    methods = {"lora": {"adapter": {"method": "lora"}}}
    Path("compare.yaml").write_text(
        yaml.safe_dump({"job": "nano.yaml", "methods": methods, "overrides": changes | overrides})
    )
    comparison = read_comparison("compare.yaml")
    contenders = read_contenders(comparison).values()
    for job in (*jobs, *full, *tasks, *contenders):
        assert job.data.options == {"token": SECRET}
        assert SECRET not in repr(job.to_save())
    for job in (*full, *tasks, *contenders):
        assert job.trainer.cache_folder == SECRET
    for config in (continual, multitask, comparison):
        assert SECRET in repr(config)
        assert SECRET not in repr(config.to_save())


def test_a_run_goes_on_with_another_value_and_from_a_file_of_an_earlier_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read_config("pets.yaml")
    make_folder(tmp_path / "run", config)
    assert SECRET not in (tmp_path / "run/config.yaml").read_text()
    (tmp_path / "run/metrics.txt").write_text("work")
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    (earlier / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    (earlier / "metrics.txt").write_text("work")
    for folder in (tmp_path / "run", earlier):
        with run_folder(folder, config, resume=True, overwrite=False) as resumed:
            assert resumed.goes_on
    monkeypatch.setenv("TOKEN", "another")
    with run_folder(
        tmp_path / "run", read_config("pets.yaml"), resume=True, overwrite=False
    ) as resumed:
        assert resumed.goes_on
