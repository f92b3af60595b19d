"""Training: resuming, processes, accumulation, what is trained and kept, and bad rows."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from application.training.tints import NAME, Pictures, job, task_and_model
from safetensors.torch import load_file
from transformers import TrainingArguments

from mmadapters.tasks.core.errors import DataError
from mmadapters.tasks.data.batches import EpochBatches
from mmadapters.tasks.training.checkpoint import last_checkpoint
from mmadapters.tasks.training.divergence import LossWatch
from mmadapters.tasks.training.encoder_trainer import parameter_groups, use_one_gpu
from mmadapters.tasks.training.evaluate import evaluate, validated
from mmadapters.tasks.training.trainer import TaskTrainer

PROGRAM = Path(__file__).with_name("train_tints.py")
LONG = {"epochs": 4, "batch_size": 8, "evaluate_every": 5, "learning_rate": 1e-2}


def program(
    folder: Path, settings: dict[str, Any], *, kill_at: int | None = None, processes: int = 1
) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    arguments = [str(folder), json.dumps(settings)]
    arguments += [] if kill_at is None else [str(kill_at)]
    return forked.run(PROGRAM, *arguments, processes=processes)


def figures(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "figures.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The figures of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    done = program(folder, LONG)
    assert done.returncode == 0, done.stderr
    return figures(folder)


def test_a_run_that_was_killed_twice_goes_on_to_the_same_bits(
    whole: dict[str, Any], tmp_path: Path
) -> None:
    # Once in an epoch, with dropout and augmentation drawn on, and once at its end.
    for kill_at in (12, 24):
        killed = program(tmp_path, LONG, kill_at=kill_at)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = program(tmp_path, LONG)
    assert done.returncode == 0, done.stderr
    resumed = figures(tmp_path)
    assert resumed.pop("resumed") == "checkpoint-20"
    assert resumed == {key: value for key, value in whole.items() if key != "resumed"}


def test_training_learns(whole: dict[str, Any]) -> None:
    assert whole["accuracy"] > 0.5
    assert sum(whole["losses"][-5:]) < sum(whole["losses"][:5])


def test_two_processes_get_the_metrics_of_one(whole: dict[str, Any], tmp_path: Path) -> None:
    # Dropout would draw other numbers in each process for its own share.
    settings = {**LONG, "epochs": 2, "dropout": False}
    for folder, processes in (("one", 1), ("two", 2)):
        done = program(tmp_path / folder, settings, processes=processes)
        assert done.returncode == 0, done.stderr
    one, two = figures(tmp_path / "one"), figures(tmp_path / "two")
    assert two["indices"] == one["indices"] == list(range(50))
    assert two["best"] == one["best"]
    assert two["answers"] == one["answers"]
    assert two["validation"] == pytest.approx(one["validation"])


def test_a_checkpoint_that_was_cut_short_is_passed_over(tmp_path: Path) -> None:
    assert program(tmp_path, LONG, kill_at=13).returncode == -signal.SIGKILL
    checkpoint = last_checkpoint(tmp_path)
    assert checkpoint is not None
    (checkpoint / "whole").unlink()
    (checkpoint / "optimizer.pt").write_bytes(b"")
    before = last_checkpoint(tmp_path)
    assert before is not None
    assert before.name == "checkpoint-5"


def train(folder: Path, *, rows: Any = None, model: Any = None, **settings: Any) -> TaskTrainer:
    config = job(**settings)
    if model is None:
        task, model = task_and_model(config)
    else:
        task = task_and_model(config)[0]
    trainer = TaskTrainer(
        task,
        model,
        train=Pictures(64) if rows is None else rows,
        validation=Pictures(24, seed=1),
        folder=folder,
        quiet=True,
    )
    trainer.train()
    return trainer


def test_only_adapter_and_head_are_trained_and_saved(tmp_path: Path) -> None:
    _, model = task_and_model(job())
    frozen = {n: p.clone() for n, p in model.encoder.backbone.state_dict().items()}
    trainer = train(tmp_path, model=model)
    for name, tensor in model.encoder.backbone.state_dict().items():
        assert torch.equal(tensor, frozen[name]), name
    saved = load_file(last_checkpoint(tmp_path) / "model.safetensors")  # type: ignore[operator]
    assert saved
    assert all(key.startswith(("head.", f"encoder.adapters.{NAME}.")) for key in saved)
    assert not list(tmp_path.rglob("*.bin"))
    optimised = {id(p) for g in trainer.optimizer.param_groups for p in g["params"]}
    assert optimised == {id(p) for p in model.parameters() if p.requires_grad}


def test_accumulated_parts_give_the_gradients_of_the_whole_batch(tmp_path: Path) -> None:
    results = []
    for parts in (1, 4):
        config = job()
        _, model = task_and_model(config)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        train(
            tmp_path / str(parts), model=model, accumulation=parts, max_steps=5, learning_rate=1e-3
        )
        results.append(model.head[1].weight.detach().clone())
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)


def test_readers_and_validation_leave_what_the_model_draws_as_it_is(tmp_path: Path) -> None:
    # The head has dropout.
    runs = [{"workers": 0}, {"workers": 2}, {"workers": 0, "evaluate_every": 3}]
    losses = []
    for number, settings in enumerate(runs):
        log = train(tmp_path / str(number), **settings).state.log_history
        losses.append([entry["loss"] for entry in log if "loss" in entry])
    assert len(losses[0]) == 16
    assert losses[1] == losses[0]
    assert losses[2] == losses[0]


def test_the_best_validation_model_is_kept_not_the_last(tmp_path: Path) -> None:
    trainer = train(tmp_path, epochs=4, evaluate_every=4, learning_rate=0.3)
    logs = {
        log["step"]: log["eval_accuracy"]
        for log in trainer.state.log_history
        if "eval_accuracy" in log
    }
    best = max(logs.values())
    assert trainer.state.best_global_step == max(s for s, value in logs.items() if value == best)
    trainer.load_best()
    found = evaluate(trainer.task, trainer.task_model, Pictures(24, seed=1), batch_size=8)
    assert trainer.task.score(found.records, bootstrap=0)["accuracy"].value == best


def test_early_stopping_ends_a_run_that_no_longer_improves(tmp_path: Path) -> None:
    trainer = train(tmp_path, epochs=50, evaluate_every=2, early_stopping=3, learning_rate=1e-5)
    assert trainer.state.global_step < 100


def test_training_stops_at_a_loss_that_stays_without_a_value(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not finite from step \d on, .* learning rate") as caught:
        train(tmp_path, epochs=50, learning_rate=1e30, max_grad_norm=0, warmup=0)
    assert "\n" not in str(caught.value)
    for file in tmp_path.rglob("*.safetensors"):  # no checkpoint holds what was destroyed
        assert all(torch.isfinite(value).all() for value in load_file(file).values())


def test_single_losses_without_a_value_are_passed_over() -> None:
    watch = LossWatch()
    for step, loss in enumerate([1.0, float("inf"), float("nan"), 1.0, float("nan")], 1):
        watch.see(torch.tensor(loss), step)
        watch.check(learning_rate=0.1, parameters=[torch.ones(2)])
    with pytest.raises(ValueError, match=r"from step 5 on, at the learning rate 0\.1;"):
        watch.check(learning_rate=0.1, parameters=[torch.tensor([1, float("nan")])])


def test_trunk_stays_in_eval_mode_while_adapters_train(tmp_path: Path) -> None:
    _, model = task_and_model(job())
    seen = []
    handle = model.encoder.backbone.blocks[0].register_forward_pre_hook(
        lambda module, _: seen.append((module.training, model.encoder.adapters.training))
    )
    train(tmp_path, model=model, epochs=1)
    handle.remove()
    assert (False, True) in seen
    assert not any(trunk for trunk, _ in seen)


def test_head_and_adapter_have_learning_rates_of_their_own() -> None:
    config = job(learning_rate=1e-3, head_learning_rate=1e-2, weight_decay=0.1)
    _, model = task_and_model(config)
    groups = parameter_groups(model, config.trainer)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == (1e-2 if name.startswith("head.") else 1e-3)
            assert decays[id(parameter)] == (0.1 if parameter.dim() > 1 else 0.0)


def test_bad_rows_are_replaced_and_counted(tmp_path: Path) -> None:
    trainer = train(tmp_path, rows=Pictures(32, broken=(3, 4, 20)), epochs=2)
    assert sorted(trainer.problems) == [3, 4, 20]
    assert trainer.problems[3].reason == "there is no picture"
    assert trainer.state.global_step == 8


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_rows_are_refused_where_the_config_says_so(tmp_path: Path, workers: int) -> None:
    config = job(workers=workers)
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"on_error": "refuse"})}
    )
    task, model = task_and_model(config)
    trainer = TaskTrainer(
        task,
        model,
        train=Pictures(32, broken=(3,)),
        validation=None,
        folder=tmp_path,
        quiet=True,
    )
    with pytest.raises(DataError, match="row 3 cannot be used: there is no picture") as raised:
        trainer.train()
    assert "\n" not in str(raised.value)


def test_evaluation_skips_bad_rows_and_keeps_the_order() -> None:
    task, model = task_and_model(job())
    found = evaluate(task, model, Pictures(10, broken=(2, 5)), batch_size=4)
    assert [record["index"] for record in found.records] == [0, 1, 3, 4, 6, 7, 8, 9]
    assert [problem.index for problem in found.problems] == [2, 5]
    assert [record["row"]["group"] for record in found.records][:4] == [
        *("even", "odd", "odd", "even")
    ]
    with pytest.raises(DataError, match="no row of the split can be used"):
        evaluate(task, model, Pictures(2, broken=(0, 1)), batch_size=4)


def rows_of(batches: EpochBatches) -> list[list[tuple[int, int]]]:
    return list(batches)


def test_every_row_has_its_turn_once_in_an_epoch() -> None:
    batches = EpochBatches(40, 8, seed=3)
    rows = [row for batch in batches for row, _ in batch]
    assert sorted(rows) == list(range(40))
    again = [row for batch in batches for row, _ in batch]
    assert again == rows
    batches.set_epoch(1)
    assert [row for batch in batches for row, _ in batch] != rows


@pytest.mark.parametrize("lengths", [None, list(range(50))])
def test_processes_and_parts_share_the_batches_of_one(lengths: list[int] | None) -> None:
    whole = rows_of(EpochBatches(50, 12, seed=1, lengths=lengths))
    shares = [
        rows_of(EpochBatches(50, 12, seed=1, accumulation=3, rank=r, world=2, lengths=lengths))
        for r in range(2)
    ]
    assert len(whole) == 4
    for step, batch in enumerate(whole):
        parts = [shares[r][3 * step + part] for part in range(3) for r in range(2)]
        assert [pair for part in parts for pair in part] == batch


def test_rows_of_similar_lengths_share_a_batch() -> None:
    lengths = torch.randint(1, 1000, (400,)).tolist()
    spread = [
        max(lengths[row] for row, _ in batch) - min(lengths[row] for row, _ in batch)
        for batch in EpochBatches(400, 8, seed=0, lengths=lengths)
    ]
    assert sum(spread) / len(spread) < 30


def test_fewer_rows_than_a_batch_fill_one() -> None:
    (batch,) = EpochBatches(3, 8, seed=0)
    assert len(batch) == 8
    assert {row for row, _ in batch} == {0, 1, 2}


def test_a_batch_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="make it a multiple of 6"):
        EpochBatches(50, 8, seed=0, accumulation=3, world=2)
    with pytest.raises(ValueError, match="no rows"):
        EpochBatches(0, 8, seed=0)


def test_a_process_trains_on_one_gpu_and_says_how_to_use_all(tmp_path: Path) -> None:
    """With several GPUs transformers counts them in `_n_gpu` and takes nn.DataParallel."""
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    use_one_gpu(arguments)
    assert arguments.n_gpu <= 1
    arguments._n_gpu = 2
    with pytest.warns(UserWarning, match=r"one of 2 GPUs is used: .*torchrun --nproc-per-node 2"):
        use_one_gpu(arguments)
    assert arguments.n_gpu == 1


def test_of_equal_models_the_latest_is_kept(tmp_path: Path) -> None:
    trainer = train(tmp_path, epochs=1, evaluate_every=2, learning_rate=1e-12, workers=0)
    values = {log["eval_accuracy"] for log in trainer.state.log_history if "eval_accuracy" in log}
    assert len(values) == 1
    assert trainer.state.best_global_step == trainer.state.global_step == 8
    assert [path.name for path in (tmp_path / "checkpoints").glob("best-*")] == [
        "best-8.safetensors"
    ]


def test_the_loss_chooses_the_model_where_the_config_says_so(tmp_path: Path) -> None:
    config = job(epochs=1, evaluate_every=2, learning_rate=0.1, workers=0)
    evaluation = config.evaluation.model_copy(update={"deciding": "loss"})
    task, model = task_and_model(config.model_copy(update={"evaluation": evaluation}))
    rows = Pictures(24, seed=1, broken=(3,))
    trainer = TaskTrainer(
        task, model, train=Pictures(64), validation=rows, folder=tmp_path, quiet=True
    )
    trainer.train()
    logs = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert len(logs) == 4
    assert trainer.state.best_global_step == min(logs, key=lambda step: (logs[step], -step))
    trainer.load_best()
    again = validated(task, model, rows)
    assert again["loss"].value == pytest.approx(min(logs.values()))
    assert again["loss"].count == 23


def test_a_figure_that_is_not_measured_is_named(tmp_path: Path) -> None:
    config = job(max_steps=2, evaluate_every=1)
    evaluation = config.evaluation.model_copy(update={"deciding": "Dice"})
    task, model = task_and_model(config.model_copy(update={"evaluation": evaluation}))
    trainer = TaskTrainer(
        task, model, train=Pictures(8), validation=Pictures(8), folder=tmp_path, quiet=True
    )
    with pytest.raises(ValueError, match=r"evaluation\.deciding is Dice, .* they have accuracy"):
        trainer.train()
