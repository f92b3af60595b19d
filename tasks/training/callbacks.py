"""transformers' callbacks of early stopping and of the progress bar, adapted to our trainers."""

from __future__ import annotations

from transformers import EarlyStoppingCallback
from transformers.trainer_callback import ProgressCallback


class Patience(EarlyStoppingCallback):
    """Early stopping without the demand that transformers itself loads the best model at the end.

    `EncoderTrainer` keeps and loads the best model.
    """

    def on_train_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        return


class Progress(ProgressCallback):
    """A progress bar that prints a line for each evaluation, and none for each log."""

    def on_log(self, args, state, control, logs=None, **kwargs):  # type: ignore[no-untyped-def]
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        if "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {float(logs['loss']):.3f}")
        values = [
            f"{key.removeprefix('eval_')} {value:.4g}"
            for key, value in logs.items()
            if key.startswith("eval_") and key != "eval_runtime"
        ]
        if values:
            self.training_bar.write(f"step {state.global_step}  validation  {'  '.join(values)}")
