"""Checkpoints of a run: they hold the trained tensors alone, and are never unpickled.

RUN/checkpoints/
    checkpoint-STEP/        model.safetensors, the state of transformers' `Trainer`, and the
                            empty file `whole`, which is written last
    best-STEP.safetensors   the tensors with the best validation metric so far
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from mmadapters.files import replacing_file

from ..core.model import TaskModel

CHECKPOINTS = "checkpoints"  # the folder of a run directory
WEIGHTS = "model.safetensors"
_WHOLE = "whole"


def mark_whole(checkpoint: Path) -> None:
    """Marks the folder of a checkpoint as completely written."""
    (checkpoint / _WHOLE).touch()


def last_checkpoint(folder: Path) -> Path | None:
    """Returns the newest complete checkpoint of a run directory, or None if there is none.

    A process that was killed may leave an incomplete one, which is passed over.
    """
    complete = [path.parent for path in (folder / CHECKPOINTS).glob(f"checkpoint-*/{_WHOLE}")]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def trained_tensors(model: TaskModel) -> dict[str, Tensor]:
    """Returns the tensors that training changes, by name.

    These are the trainable parameters, and the buffers of the modules that hold them. A parameter
    that several modules share is listed once.
    """
    parts = ["head.", "encoder.adapters.", "encoder.fusions."]
    if any(parameter.requires_grad for parameter in model.encoder.backbone.parameters()):
        parts.append("encoder.backbone.")
    tensors = {n: p.data for n, p in model.named_parameters() if p.requires_grad}
    tensors |= {n: b for n, b in model.named_buffers() if n.startswith(tuple(parts))}
    return tensors


def write_trained(model: TaskModel, path: Path) -> None:
    """Writes `trained_tensors` to a safetensors file, completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {k: t.detach().cpu().contiguous() for k, t in trained_tensors(model).items()}
    with replacing_file(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def read_trained(model: TaskModel, path: Path) -> None:
    """Copies the tensors of a file that `write_trained` wrote into the model.

    Raises:
        ValueError: the file belongs to another model.
    """
    tensors, stored = trained_tensors(model), load_file(path)
    if tensors.keys() != stored.keys() or any(
        tensor.shape != stored[key].shape for key, tensor in tensors.items()
    ):
        raise ValueError(
            f"{path} is a checkpoint of another model, as the config was changed after it was "
            "written: choose another output, or pass --overwrite"
        )
    for key, tensor in tensors.items():
        tensor.copy_(stored[key])
