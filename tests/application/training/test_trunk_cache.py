"""Training from kept states of the frozen encoder: the same run, without its lower part."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
from application.training import joint_tints
from application.training.trunk_jobs import (
    JOBS,
    PLAIN,
    changed,
    figures,
    fitted,
    pictures,
    trainer_of,
)

from mmadapters.tasks.data.examples import Examples
from mmadapters.tasks.reports.run_report import cache_text
from mmadapters.tasks.training.cache.cache import prepare
from mmadapters.tasks.training.checkpoint import last_checkpoint, trained_tensors
from mmadapters.tasks.training.trainer import TaskTrainer

PROGRAM = Path(__file__).with_name("train_trunk.py")


class Counted:
    """Rows that count how often one of them is read."""

    def __init__(self, rows: Any) -> None:
        self.rows, self.read = rows, 0
        self.column_names = rows.column_names

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Any) -> Any:
        self.read += not isinstance(key, str)
        return self.rows[key]


def image_job(folder: Path, **sections: Any) -> tuple[Any, Any, Any]:
    config, train, validation = JOBS["images"].make(folder)
    return changed(config, **sections), train, validation


def assert_same(training: TaskTrainer, other: TaskTrainer, tolerance: float = 1e-5) -> None:
    (losses, metrics), (again, measured) = figures(training), figures(other)
    assert len(losses) >= 4
    assert again == pytest.approx(losses, abs=tolerance)
    assert measured == [pytest.approx(entry, abs=tolerance) for entry in metrics]


@pytest.fixture(scope="module")
def plain_images(tmp_path_factory: pytest.TempPathFactory) -> TaskTrainer:
    """The job on images without kept states, after its training; no test may change it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("plain")
    return fitted("images", folder, cache_trunk="off", workers=0)[0]


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The settings with which a run finds the states that the job on images left on disk."""
    folder = tmp_path_factory.mktemp("disk")
    kept = {"cache_trunk": "disk", "cache_folder": str(folder / "cache")}
    _, told = fitted("images", folder / "first", **kept)
    assert told["cache"]["train"]["found"] == 0
    return kept


@pytest.mark.parametrize("name", list(JOBS))
def test_kept_states_train_the_same_model(name: str, tmp_path: Path) -> None:
    plain, told = fitted(name, tmp_path / "plain", cache_trunk="off")
    assert "cache" not in told
    kept, told = fitted(name, tmp_path / "kept", cache_trunk="memory")
    assert_same(plain, kept)
    assert told["cache"]["train"]["read"] == 8 * len(figures(kept)[0])
    assert isinstance(told["cache"]["validation"], dict)


@pytest.mark.parametrize("name", list(JOBS))
def test_a_task_that_says_it_draws_nothing_draws_nothing(name: str, tmp_path: Path) -> None:
    job = JOBS[name]
    config, rows, _ = job.make(tmp_path)
    training = trainer_of(
        config,
        rows,
        None,
        folder=tmp_path,
        backbone=None if job.backbone is None else job.backbone(),
    )
    assert training.task.randomness(rows) is None
    examples = Examples(training.task, rows, train=True)
    for row in range(4):
        one, other = (training.task.collate([_plain(examples[row, seed])]) for seed in (1, 2))
        for key, value in one.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, other[key]), key


def _plain(example: Any) -> Any:
    return {key: value for key, value in example.items() if key not in ("index", "problems")}


def test_later_epochs_read_no_row_and_run_no_lower_block(tmp_path: Path) -> None:
    runs, reads = [], []
    for epochs in (2, 4):
        settings = {"epochs": epochs, "workers": 0}  # this process counts what is read
        config, train, validation = image_job(tmp_path, trainer=settings)
        rows, measured = Counted(train), Counted(validation)
        training = trainer_of(config, train, validation, folder=tmp_path / str(epochs))
        training.train_rows, training.validation_rows = rows, measured  # type: ignore[assignment]
        blocks = training.task_model.encoder.backbone.blocks
        calls: dict[int, list[None]] = {0: [], 3: [], 4: []}
        for block, own in calls.items():
            blocks[block].mlp.fc1.register_forward_hook(lambda *_, own=own: own.append(None))
        training.fit(None)
        runs.append({block: len(own) for block, own in calls.items()})
        reads.append((rows.read, measured.read))
    # Each row once, and a batch to look at from the middle of the split.
    assert reads[0] == reads[1] == (20 + 8, 10 + 2)
    assert runs[0][0] == runs[1][0]
    assert runs[0][3] == runs[1][3]
    assert runs[1][4] > runs[0][4]


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_views_are_those_of_a_run_that_draws_among_them_anew(where: str, tmp_path: Path) -> None:
    drawn = {"augment": {**PLAIN, "horizontal_flip": 0.5, "brightness": 0.3}}
    trainings = []
    for kept in ("off", where):
        folder = tmp_path / kept
        trainer = {"views": 3, "epochs": 4, "cache_trunk": kept, "cache_folder": str(tmp_path)}
        training, told = fitted("images", folder, data=image_job(folder, data=drawn), **trainer)
        trainings.append(training)
    assert_same(*trainings)
    assert told["cache"]["train"]["views"] == 3
    seeds = {seed % 3 for batch in trainings[0].batches for _, seed in batch}  # type: ignore[union-attr]
    assert seeds == {0, 1, 2}


REFUSED = {
    "full": ({"trainer": {"mode": "full"}}, "trains the whole encoder"),
    "dropout": ({"trainer": {"trunk_dropout": True}}, "trainer.trunk_dropout"),
    "drawn": (
        {"data": {"augment": {**PLAIN, "horizontal_flip": 0.5}}},
        r"differ in every epoch \(data.augment.horizontal_flip\): set trainer.views",
    ),
    "budget": (
        {"trainer": {"cache_budget": 1e-6}},
        r"it would take .* GiB for 30 records, more than the budget of 1e-06 GiB",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_cannot_be_kept_is_refused_or_left_with_the_reason(case: str, tmp_path: Path) -> None:
    sections, reason = REFUSED[case]
    data = image_job(tmp_path, **sections)
    with pytest.raises(ValueError, match=f"trainer.cache_trunk memory: .*{reason}") as raised:
        fitted("images", tmp_path / "asked", data=data)
    assert "\n" not in str(raised.value)
    training, told = fitted("images", tmp_path / "auto", data=data, cache_trunk="auto")
    assert told["cache"]["where"] == "off"
    assert len(figures(training)[0]) == 4
    with pytest.raises(ValueError, match=reason):
        raise ValueError(told["cache"]["reason"])
    assert not list(tmp_path.rglob("*.states"))


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"trainer": {"epochs": 1}}, "passes over the training rows are too few"),
        ({"adapter": {"sites": ["vision"]}}, "from the first block on"),
    ],
    ids=["passes", "block"],
)
def test_auto_leaves_what_would_not_pay(
    sections: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    data = image_job(tmp_path, **sections)
    _, told = fitted("images", tmp_path, data=data, cache_trunk="auto")
    assert told["cache"]["where"] == "off"
    assert reason in told["cache"]["reason"]


def test_auto_keeps_in_memory_all_that_a_head_alone_reads(tmp_path: Path) -> None:
    data = image_job(tmp_path, trainer={"mode": "head"})
    plain, _ = fitted("images", tmp_path / "plain", data=data, cache_trunk="off")
    kept, told = fitted("images", tmp_path / "kept", data=data, cache_trunk="auto")
    assert_same(plain, kept)
    assert told["cache"]["where"] == "memory"
    assert told["cache"]["towers"] == {"vision": {"block": 8, "blocks": 8}}
    text = cache_text(told["cache"])
    assert text.startswith("computed once (vision up to block 8 of 8), ")
    assert text.endswith(f"read {4 * 8 + 2 * 10} times")


def test_a_ladder_is_fed_from_kept_states_of_every_rung(tmp_path: Path) -> None:
    data = image_job(tmp_path, adapter={"method": "ladder", "sites": ["vision"]})
    plain, _ = fitted("images", tmp_path / "plain", data=data, cache_trunk="off")
    kept, told = fitted("images", tmp_path / "kept", data=data)
    assert_same(plain, kept)
    assert told["cache"]["towers"]["vision"]["block"] == 8
    assert kept.cache.train is not None
    (tower,) = kept.cache.train.trunk.towers
    assert len(tower.layers) > 2


def test_a_drawn_drop_of_adapters_starts_at_the_lowest(tmp_path: Path) -> None:
    data = image_job(tmp_path, adapter={"sites": ["vision"]}, trainer={"adapter_drop": [3, 6]})
    plain, _ = fitted("images", tmp_path / "plain", data=data, cache_trunk="off")
    kept, told = fitted("images", tmp_path / "kept", data=data)
    assert_same(plain, kept)
    assert told["cache"]["towers"]["vision"]["block"] == 3


def test_a_head_that_reads_pixels_gets_them(tmp_path: Path) -> None:
    config, train, validation = JOBS["segments"].make(tmp_path)
    config = changed(config, head={"kind": "fpn"}, adapter={"sites": ["vision.blocks.[6-7].*"]})
    data = config, train, validation
    plain, _ = fitted("segments", tmp_path / "plain", data=data, cache_trunk="off")
    kept, _ = fitted("segments", tmp_path / "kept", data=data)
    assert_same(plain, kept)


def test_states_in_bf16_train_almost_the_same(plain_images: TaskTrainer, tmp_path: Path) -> None:
    _, told = fitted("images", tmp_path / "whole")
    half, halved = fitted("images", tmp_path / "half", cache_dtype="bf16")
    assert_same(plain_images, half, tolerance=0.05)
    sizes = [facts["cache"]["train"]["bytes"] for facts in (told, halved)]
    assert sizes[1] < 0.55 * sizes[0]
    assert halved["cache"]["dtype"] == "bfloat16"
    assert told["cache"]["dtype"] == "as they are"


def test_runs_in_bf16_keep_bf16(tmp_path: Path) -> None:
    plain, _ = fitted("images", tmp_path / "plain", cache_trunk="off", precision="bf16")
    kept, told = fitted("images", tmp_path / "kept", precision="bf16")
    assert_same(plain, kept, tolerance=0.05)
    assert told["cache"]["dtype"] == "bfloat16"


def test_a_later_run_finds_its_states_on_disk_and_mends_what_is_damaged(
    plain_images: TaskTrainer, tmp_path: Path
) -> None:
    kept = {"cache_trunk": "disk", "cache_folder": str(tmp_path / "cache")}
    first, told = fitted("images", tmp_path / "first", **kept)
    assert told["cache"]["train"]["found"] == 0
    # Another adapter in the same blocks, from another seed, which draws nothing of the examples.
    data = image_job(tmp_path, adapter={"size": 8}, seed=1)
    _, told = fitted("images", tmp_path / "other", data=data, **kept)
    assert told["cache"]["train"]["found"] == told["cache"]["validation"]["found"] == 1
    for file in (tmp_path / "cache").rglob("*.states"):
        damaged = bytearray(file.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        file.write_bytes(damaged)
    with pytest.warns(UserWarning, match="its checksum differs"):
        again, told = fitted("images", tmp_path / "again", **kept)
    assert told["cache"]["train"]["found"] == 0
    for training in (first, again):
        assert_same(plain_images, training)


@pytest.mark.parametrize(
    "sections",
    [
        {"adapter": {"sites": ["vision.blocks.[5-7].*"]}},
        {"data": {"size": 32}},
        {"trainer": {"cache_dtype": "bf16"}},
        {"backbone": {"options": {"num_classes": 3}}},
    ],
    ids=["block", "preprocessing", "dtype", "encoder"],
)
def test_states_of_something_else_are_not_taken(
    sections: dict[str, Any], on_disk: dict[str, Any], tmp_path: Path
) -> None:
    data = image_job(tmp_path, **sections)
    _, told = fitted("images", tmp_path / "other", data=data, **on_disk)
    assert told["cache"]["train"]["found"] == 0


def test_states_of_other_rows_are_not_taken(on_disk: dict[str, Any], tmp_path: Path) -> None:
    config, _, validation = image_job(tmp_path)
    others = pictures(20, first=1)
    _, told = fitted("images", tmp_path / "other", data=(config, others, validation), **on_disk)
    assert told["cache"]["train"]["found"] == 0
    assert told["cache"]["validation"]["found"] == 1


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_workers_read_kept_states(where: str, plain_images: TaskTrainer, tmp_path: Path) -> None:
    settings = {"workers": 1, "cache_folder": str(tmp_path)}
    kept, _ = fitted("images", tmp_path / "kept", cache_trunk=where, **settings)
    assert_same(plain_images, kept)


def test_a_resumed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    kept = {"cache_trunk": "disk", "cache_folder": str(tmp_path / "cache")}
    whole, _ = fitted("images", tmp_path / "run", **kept)
    checkpoint = min(
        (path.parent for path in (tmp_path / "run").rglob("whole")),
        key=lambda path: int(path.name.rpartition("-")[2]),
    )
    assert checkpoint != last_checkpoint(tmp_path / "run")
    config, train, validation = JOBS["images"].make(tmp_path)
    resumed = trainer_of(changed(config, trainer=kept), train, validation, folder=tmp_path / "run")
    told = resumed.fit(checkpoint)
    assert told["cache"]["train"]["found"] == 1
    for (name, tensor), other in zip(
        trained_tensors(whole.task_model).items(),
        trained_tensors(resumed.task_model).values(),
        strict=True,
    ):
        assert torch.equal(tensor, other), name


def test_bad_rows_are_passed_over_and_counted_as_ever(tmp_path: Path) -> None:
    config, train, validation = JOBS["images"].make(tmp_path)
    rows = [dict(train[index]) for index in range(len(train))]
    for bad in (3, 4, 11):
        rows[bad]["image"] = {"bytes": b"no picture", "path": None}
    train = type(train).from_list(rows)
    trainings = [
        fitted("images", tmp_path / kept, data=(config, train, validation), cache_trunk=kept)[0]
        for kept in ("off", "memory")
    ]
    assert_same(*trainings)
    assert sorted(trainings[1].problems) == [3, 4, 11]
    assert trainings[0].problems == trainings[1].problems


def test_preparing_leaves_the_model_and_all_random_states_as_they_were(tmp_path: Path) -> None:
    config, train, validation = JOBS["segments"].make(tmp_path)
    training = trainer_of(config, train, validation, folder=tmp_path)
    model = training.task_model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    cache = prepare(training.task, model, train, validation, passes=3, evaluations=3, quiet=True)
    assert cache.train is not None
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert np.array_equal(states[2], np.random.get_state()[1])  # type: ignore[index]
    assert modes == [module.training for module in model.modules()]
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_long_recordings_are_validated_plainly(tmp_path: Path) -> None:
    config, train, validation = JOBS["speech"].make(tmp_path)
    config = changed(config, chunks={"seconds": 0.5, "stride": 0.1})
    data = config, train, validation
    plain, _ = fitted("speech", tmp_path / "plain", data=data, cache_trunk="off")
    kept, told = fitted("speech", tmp_path / "kept", data=data)
    assert_same(plain, kept)
    assert "may be longer than 0.5 s and run in pieces" in told["cache"]["validation"]


def test_pictures_of_several_sizes_are_validated_plainly(tmp_path: Path) -> None:
    config, train, validation = JOBS["segments"].make(tmp_path)
    data = changed(config, trainer={"eval_batch_size": 4}), train, validation
    _, told = fitted("segments", tmp_path, data=data)
    assert "with trainer.eval_batch_size 1" in told["cache"]["validation"]


def test_crops_of_larger_pictures_are_drawn(tmp_path: Path) -> None:
    config, rows, _ = JOBS["segments"].make(tmp_path)
    for crop, drawn in ((64, None), (63, "transforms.crop")):
        training = trainer_of(
            changed(config, transforms={"crop": crop}), rows, None, folder=tmp_path
        )
        assert training.task.randomness(rows) == drawn


@pytest.mark.parametrize(
    ("name", "sections", "drawn"),
    [
        ("speech", {"augment": {"gain": 3.0}}, "augment.gain"),
        ("speech", {"augment": {"speed": (0.9, 1.1)}}, "augment.speed"),
        ("sounds", {"data": {"max_seconds": 0.4}}, "where longer recordings are cut"),
        ("sounds", {"data": {"augment_audio": {"shift": 0.1}}}, "data.augment_audio.shift"),
        ("clip-pairs", {"data": {"random_crop": 0.8}}, "data.random_crop"),
        ("segments", {"transforms": {"scale": (0.5, 1.0)}}, "transforms.scale"),
    ],
)
def test_what_draws_is_named(
    name: str, sections: dict[str, Any], drawn: str, tmp_path: Path
) -> None:
    config, rows, _ = JOBS[name].make(tmp_path)
    training = trainer_of(changed(config, **sections), rows, None, folder=tmp_path)
    assert training.task.randomness(rows) == drawn


def test_one_of_several_captions_is_drawn(tmp_path: Path) -> None:
    config, _, several = JOBS["clip-pairs"].make(tmp_path)
    training = trainer_of(config, several, None, folder=tmp_path)
    assert training.task.randomness(several) == "one of the captions of a row"


def test_tasks_that_are_trained_together_refuse_it(tmp_path: Path) -> None:
    made = joint_tints.tasks(cache_trunk="disk")
    with pytest.raises(ValueError, match="cannot be cached for several tasks that are trained"):
        joint_tints.trainer(tmp_path, made, joint_tints.joint(made, None))


def start(folder: Path, *, processes: int = 1, **settings: Any) -> forked.Started:
    folder.mkdir()
    arguments = (str(folder), "images", json.dumps(settings))
    return forked.start(PROGRAM, *arguments, processes=processes)


def told_by(process: forked.Started, folder: Path) -> dict[str, Any]:
    done = process.wait()
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "figures.json").read_text())


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_processes_of_a_group_fill_together(where: str, tmp_path: Path) -> None:
    found = {}
    for kept in ("off", where):
        settings = {"cache_trunk": kept, "cache_folder": str(tmp_path / "cache")}
        process = start(tmp_path / kept, processes=2, **settings)
        found[kept] = told_by(process, tmp_path / kept)
    assert found[where]["losses"] == pytest.approx(found["off"]["losses"], abs=1e-5)
    assert found[where]["metrics"] == [
        pytest.approx(entry, abs=1e-5) for entry in found["off"]["metrics"]
    ]
    assert found[where]["cache"]["where"] == where


def test_two_runs_at_once_share_one_cache(tmp_path: Path) -> None:
    settings = {"cache_trunk": "disk", "cache_folder": str(tmp_path / "cache")}
    folders = [tmp_path / name for name in ("one", "two")]
    runs = [start(folder, **settings) for folder in folders]
    one, two = (told_by(run, folder) for run, folder in zip(runs, folders, strict=True))
    assert one["losses"] == two["losses"]
    assert len(list((tmp_path / "cache").iterdir())) == 2  # training and validation rows
