"""Jobs on real data with real weights, end to end, in as little time as shows the effect.

The README's figures are of longer runs of the same configs.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from mmadapters.tasks.config.file import read_config
from mmadapters.tasks.jobs.run import train
from mmadapters.tasks.reports.results import Run

pytestmark = pytest.mark.slow


def job(config: str, folder: Path, *changes: str) -> Run:
    fixed = [f"output={folder}", "trainer.tensorboard=false", "evaluation.bootstrap=200"]
    return train(read_config(config, [*fixed, *changes]), quiet=True)


def nuclei(shared_dir: Path, folder: Path, *changes: str) -> tuple[Run, Run]:
    """A ViT-S with an adapter, and with a head alone."""
    short = [
        f"data.source={shared_dir}/data/nuclei",
        f"backbone.weights={shared_dir}/weights/vit_small_patch14_focus.safetensors",
        *("data.limit.validation=4", "trainer.epochs=1", "trainer.batch_size=8"),
        *("trainer.learning_rate=2e-3", *changes),
    ]
    adapter = job("segment_nuclei", folder / "adapter", *short)
    head = job("segment_nuclei", folder / "head", *short, "trainer.mode=head")
    assert adapter.headline.value > head.headline.value
    assert adapter.facts["trained_share"] <= 0.05
    assert not adapter.problems["test"]
    assert (folder / "adapter/report.html").stat().st_size > 50_000
    return adapter, head


@pytest.mark.release
def test_nuclei_with_a_vit_small(shared_dir: Path, tmp_path: Path) -> None:
    adapter, head = nuclei(shared_dir, tmp_path, "transforms.size=392", "transforms.crop=196")
    assert adapter.headline.count == head.headline.count == 100
    assert adapter.headline.value >= 0.80


def test_a_few_nuclei_with_a_vit_small(shared_dir: Path, tmp_path: Path) -> None:
    """As above, at a tenth of the cost: from 96 small pictures, measured on 12."""
    adapter, head = nuclei(
        *(shared_dir, tmp_path, "transforms.size=196", "transforms.crop=98"),
        *("data.limit.train=96", "data.limit.test=12", "head.channels=64", "inference.flip=false"),
    )
    assert adapter.headline.count == head.headline.count == 12


def test_spoken_digits_of_people_that_the_encoder_never_heard(
    shared_dir: Path, tmp_path: Path
) -> None:
    source = f"data.source={shared_dir}/data/spoken_digits"
    short = ["trainer.max_steps=100", "trainer.batch_size=12"]
    run = job("asr_digits", tmp_path / "run", source, *short)
    assert run.before is not None
    assert run.before["WER"].value > 0.8
    assert run.headline.value < 0.5 * run.before["WER"].value
    assert set(run.scores["test"].groups["accent"]) == {"Belgian-French", "German", "Greek", "USA"}
    assert len(run.scores["test"].groups["speaker"]) == 6
    assert run.facts["trained_share"] <= 0.05


def test_emoji_by_name(shared_dir: Path, tmp_path: Path) -> None:
    source = f"data.source={shared_dir}/data/emoji"
    short = ["trainer.epochs=1", "adapter.dropout=0", "data.limit.validation=32"]
    run = job("retrieve_emoji", tmp_path / "run", source, *short)
    assert run.before is not None
    name = "text-to-image R@10"
    assert run.scores["test"][name].value > 1.5 * run.before[name].value
    assert run.facts["trained_share"] <= 0.05
