"""How many processes read data, by where the model runs and what the config says."""

from __future__ import annotations

import pytest

from mmadapters.tasks import reading
from mmadapters.tasks.config import TrainerConfig


def test_the_config_decides_where_it_gives_a_number() -> None:
    assert reading.readers(TrainerConfig(workers=3)) == 3
    assert reading.readers(TrainerConfig(workers=0)) == 0


def test_a_model_on_the_cpu_keeps_its_cores() -> None:
    assert reading.readers(TrainerConfig(device="cpu")) == 0


@pytest.mark.parametrize(
    ("cores", "sharing", "wanted"), [(16, 1, 8), (4, 1, 3), (1, 1, 0), (16, 4, 3), (None, 1, 0)]
)
def test_beside_an_accelerator_each_core_but_one_reads(
    monkeypatch: pytest.MonkeyPatch, cores: int | None, sharing: int, wanted: int
) -> None:
    monkeypatch.setattr(reading, "default_device", lambda: "cuda")
    monkeypatch.setattr(reading.os, "cpu_count", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(sharing))
    assert reading.readers(TrainerConfig()) == wanted


@pytest.mark.parametrize("wrong", [-1, "many", 1.5])
def test_workers_are_a_number_or_auto(wrong: object) -> None:
    with pytest.raises(ValueError, match="workers"):
        TrainerConfig(workers=wrong)  # type: ignore[arg-type]
