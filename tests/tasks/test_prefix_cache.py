"""Training from kept states of the frozen encoder: the same run, without its lower part."""

from __future__ import annotations

from pathlib import Path

import pytest
from tasks.prefix_jobs import JOBS, figures, fitted


@pytest.mark.parametrize("name", list(JOBS))
def test_kept_states_train_the_same_model(name: str, tmp_path: Path) -> None:
    plain, told = fitted(name, tmp_path / "plain", cache_prefix="off")
    assert "cache" not in told
    kept, told = fitted(name, tmp_path / "kept", cache_prefix="memory")
    losses, metrics = figures(plain)
    again, measured = figures(kept)
    assert len(losses) >= 4
    assert again == pytest.approx(losses, abs=1e-5)
    assert measured == [pytest.approx(entry, abs=1e-5) for entry in metrics]
    assert told["cache"]["train"]["read"] == len(losses) * 8
    assert isinstance(told["cache"]["validation"], dict)
