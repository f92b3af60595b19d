"""How many processes read data, by where the model runs and what the config says."""

from __future__ import annotations

import pytest

from mmadapters.tasks.config.schema import TrainerConfig
from mmadapters.tasks.data import workers


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MMADAPTERS_WORKERS", raising=False)


def test_the_environment_says_what_auto_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMADAPTERS_WORKERS", "5")
    assert workers.readers(TrainerConfig(device="cpu")) == 5
    assert workers.readers(TrainerConfig(device="cpu"), decoded=True) == 5
    assert workers.readers(TrainerConfig(workers=3)) == 3
    monkeypatch.setenv("MMADAPTERS_WORKERS", "all")
    with pytest.raises(ValueError, match="MMADAPTERS_WORKERS is 'all': set it to a number"):
        workers.readers(TrainerConfig())


def test_the_config_decides_where_it_gives_a_number() -> None:
    assert workers.readers(TrainerConfig(workers=3)) == 3
    assert workers.readers(TrainerConfig(workers=0)) == 0


@pytest.mark.parametrize(
    ("cores", "sharing", "methods", "wanted"),
    [(2, 1, ["fork"], 1), (16, 1, ["fork"], 1), (1, 1, ["fork"], 0), (2, 2, ["fork"], 0)]
    + [(16, 1, ["forkserver", "fork"], 0)],
)
def test_a_model_on_the_cpu_leaves_one_core(
    monkeypatch: pytest.MonkeyPatch, cores: int, sharing: int, methods: list[str], wanted: int
) -> None:
    monkeypatch.setattr(workers.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(workers.multiprocessing, "get_start_method", lambda allow_none: None)
    monkeypatch.setattr(workers.multiprocessing, "get_all_start_methods", lambda: methods)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(sharing))
    assert workers.readers(TrainerConfig(device="cpu")) == wanted
    assert workers.readers(TrainerConfig(device="cpu"), decoded=True) == 0
    assert workers.readers(TrainerConfig(device="cpu", workers=2), decoded=True) == 2


@pytest.mark.parametrize(
    ("cores", "sharing", "wanted"), [(16, 1, 8), (4, 1, 3), (1, 1, 0), (16, 4, 3), (None, 1, 0)]
)
def test_beside_an_accelerator_each_core_but_one_reads(
    monkeypatch: pytest.MonkeyPatch, cores: int | None, sharing: int, wanted: int
) -> None:
    monkeypatch.setattr(workers, "default_device", lambda: "cuda")
    monkeypatch.setattr(workers.os, "cpu_count", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(sharing))
    assert workers.readers(TrainerConfig()) == wanted


@pytest.mark.parametrize("wrong", [-1, "many", 1.5])
def test_workers_are_a_number_or_auto(wrong: object) -> None:
    with pytest.raises(ValueError, match="workers"):
        TrainerConfig(workers=wrong)  # type: ignore[arg-type]
