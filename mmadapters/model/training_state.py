"""The `state_dict` of a model in training: all that is trained, and not the frozen encoder.

Loops of other libraries (transformers' `Trainer`, Lightning, accelerate) write `state_dict()` at
every checkpoint. While parameters are trainable it leaves out the tensors of the encoder that are
as they were at `init`, and lists a tensor of several names once, as safetensors demands. One more
entry, `_extra_state`, holds a SHA-256 of what was left out for each child of the encoder (JSON in
UTF-8, as uint8), so that a checkpoint is not taken for one of another encoder. It has the name that
`nn.Module` gives to such entries, which torch.distributed.checkpoint and others know.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

KEY = "_extra_state"
_BACKBONE = "backbone."


class TrainingState:
    """Shortens the `state_dict` of a model, and completes a short one before it is loaded."""

    def __init__(self, model: nn.Module) -> None:
        """
        Args:
            model: the whole model; its child `backbone` is the encoder.
        """
        self._model = model
        self._original = {
            name: (tensor, tensor.shape)
            for name, tensor in tensors_of(model).items()
            if name.startswith(_BACKBONE)
        }
        # The digests of the last checkpoint, and the tensors that they are of.
        self._digests: tuple[list, dict[str, str]] = ([], {})

    def forget_replaced(self) -> None:
        """Lets go of tensors that the encoder no longer has."""
        there = tensors_of(self._model)
        self._original = {
            name: known for name, known in self._original.items() if there.get(name) is known[0]
        }

    def changed(self, names: Iterable[str]) -> None:
        """Notes that tensors of the encoder, by its own names, no longer are those of `init`."""
        for name in names:
            self._original.pop(_BACKBONE + name, None)

    def note_trained(self) -> None:
        """Notes which tensors are trainable now: frozen again, they no longer are those of `init`.

        `train`, which loops call whenever they begin or end, calls it.
        """
        self._original = {
            name: known for name, known in self._original.items() if not known[0].requires_grad
        }

    def of_encoder(self, *, buffers: bool) -> dict[str, Tensor]:
        """Returns the trained, new and changed tensors of the encoder, each once, by its names.

        Args:
            buffers: take all its buffers too, which may have changed in training.
        """
        self.note_trained()
        tensors: dict[int, tuple[str, Tensor]] = {}
        for name, tensor in tensors_of(self._model).items():
            if name.startswith(_BACKBONE) and not self._is_frozen(name, tensor, buffers=buffers):
                tensors.setdefault(id(tensor), (name.removeprefix(_BACKBONE), tensor))
        return dict(tensors.values())

    def clear(self) -> None:
        """Lets go of all tensors."""
        self._original = {}

    def shorten(
        self, state: MutableMapping[str, Any], prefix: str, *, buffers: bool, encoder: bool
    ) -> None:
        """Removes what is frozen, and all names but the first of a tensor, from a `state_dict`.

        Args:
            prefix: stands before the names of this model's tensors.
            buffers: keep the encoder's buffers, which may change in training.
            encoder: keep the whole encoder.
        """
        self.note_trained()
        left_out: dict[str, Tensor] = {}
        kept: set[int] = set()
        for name, tensor in tensors_of(self._model).items():
            if not encoder and self._is_frozen(name, tensor, buffers=buffers):
                left_out[name] = tensor
            elif id(tensor) not in kept:
                kept.add(id(tensor))
                continue
            state.pop(prefix + name, None)
        text = json.dumps(self._digest(left_out), sort_keys=True)
        state[prefix + KEY] = torch.frombuffer(bytearray(text, "utf-8"), dtype=torch.uint8)

    def complete(self, state: MutableMapping[str, Any], prefix: str) -> None:
        """Adds what `shorten` removed to a `state_dict`, with the values that the model has.

        Raises:
            ValueError: the encoder has other values than the one of the checkpoint.
        """
        recorded = state.pop(prefix + KEY, None)
        if recorded is None:
            return
        tensors = tensors_of(self._model)
        given = {
            id(t): state[prefix + name] for name, t in tensors.items() if prefix + name in state
        }
        absent = {name: t for name, t in tensors.items() if prefix + name not in state}
        left_out = {
            name: tensor
            for name, tensor in absent.items()
            if name.startswith(_BACKBONE) and id(tensor) not in given
        }
        _check(_read(recorded), self._digest(left_out))
        self.changed(n.removeprefix(_BACKBONE) for n in tensors if prefix + n in state)
        for name, tensor in absent.items():
            if name in left_out:
                state[prefix + name] = tensor
            elif id(tensor) in given:
                state[prefix + name] = given[id(tensor)]

    def _is_frozen(self, name: str, tensor: Tensor, *, buffers: bool) -> bool:
        """Returns whether a tensor is the encoder's and is as it was at `init`."""
        original, shape = self._original.get(name, (None, None))
        if original is not tensor or shape != tensor.shape:
            return False
        return isinstance(tensor, nn.Parameter) or not buffers

    def _digest(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Returns a SHA-256 of tensors by child of the encoder, anew only if one has changed."""
        now = [(name, id(t), t.dtype, _version(t)) for name, t in tensors.items()]
        if now != self._digests[0]:
            children: dict[str, Any] = {}
            for name, tensor in tensors.items():
                child = name.removeprefix(_BACKBONE).split(".")[0]
                digest = children.setdefault(child, hashlib.sha256())
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                values = tensor.detach().cpu().contiguous().flatten()
                digest.update(values.view(torch.uint8).numpy().data)
            self._digests = (now, {child: d.hexdigest() for child, d in children.items()})
        return self._digests[1]


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Returns the parameters and persistent buffers of a model themselves, by all their names."""
    state = nn.Module.state_dict(model, keep_vars=True)
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def _version(tensor: Tensor) -> int:
    """Returns a number that changes when a tensor is changed in place."""
    return 0 if tensor.is_inference() else tensor._version


def _read(recorded: Tensor) -> dict[str, str]:
    try:
        digests = json.loads(bytes(recorded.cpu().numpy()))
    except (ValueError, TypeError):
        digests = None
    if not isinstance(digests, dict):
        raise ValueError(f"the entry {KEY!r} of the checkpoint is damaged: take an earlier one")
    return digests


def _check(recorded: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Raises ValueError unless what was left out of a checkpoint is what the encoder has."""
    differ: Iterable[str] = sorted(
        child for child in {*recorded, *here} if recorded.get(child) != here.get(child)
    )
    if differ:
        raise ValueError(
            f"the checkpoint was trained on an encoder with other values or another dtype in "
            f"{', '.join(differ)}, which it does not hold as they were frozen: load the encoder "
            "that was trained on (a head with random values must be made trainable before training)"
        )
