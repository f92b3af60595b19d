"""The name of a run is the name of a folder, and leads to no other."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mmadapters.tasks.config.errors import ConfigError
from mmadapters.tasks.config.file import read_as, read_config
from mmadapters.tasks.jobs.comparison.config import ComparisonConfig
from mmadapters.tasks.jobs.continual.config import ContinualConfig
from mmadapters.tasks.jobs.multitask.config import MultitaskConfig

JOB = {"task": "classification", "backbone": {"name": "nano/vit"}, "data": {"source": "a"}}
SEVERAL = [{"config": "job.yaml"}] * 2
KINDS = {
    MultitaskConfig: {"tasks": SEVERAL},
    ContinualConfig: {"jobs": SEVERAL},
    ComparisonConfig: {"job": "job.yaml", "methods": {"lora": {}}},
}


@pytest.fixture(autouse=True)
def _there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_text(yaml.safe_dump(JOB))


@pytest.mark.parametrize(
    "name", ["../../evil", "..", ".", "", "/evil", "a/b", "a\\\\b", "a\x00b", "a" * 300]
)
def test_a_name_leads_to_no_other_folder(name: str) -> None:
    override = f'name="{name}"' if "\x00" not in name else 'name="a\\0b"'
    with pytest.raises(ConfigError, match="cannot name a folder"):
        read_config("job.yaml", [override])
    for kind, data in KINDS.items():
        Path("several.yaml").write_text(yaml.safe_dump(data))
        with pytest.raises(ConfigError, match="cannot name a folder"):
            read_as(kind, "several.yaml", [override])


@pytest.mark.parametrize("name", ["pets", "v1.2", "a b+c@d-e_f", "größe", ".hidden"])
def test_other_names_are_taken(name: str) -> None:
    assert read_config("job.yaml", [f"name={name}"]).output == f"runs/{name}"
