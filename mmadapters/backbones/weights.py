"""Reading files of weights, and loading them into a model strictly.

Weight files are data: safetensors, or what `torch.load(weights_only=True)` accepts. Nothing in them
is executed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Reads the tensors of a .safetensors or state-dict file to the CPU, and executes nothing.

    Of a training checkpoint the `state_dict` or `model` entry is read.

    Raises:
        ValueError: the file is missing or damaged, or holds NaN or other things than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no weight file {str(path)!r}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    # Each format has its own errors for a damaged file; torch's alone come from four modules.
    except Exception as error:
        raise ValueError(
            f"{str(path)!r} is not a file of tensors that can be read safely (safetensors, or a "
            f"state dict without other objects): {type(error).__name__}"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not _is_state(state):
        raise ValueError(f"{str(path)!r} holds no state dict: names with one tensor each")
    broken = [k for k, t in state.items() if t.is_floating_point() and t.isnan().any()]
    if broken:
        raise ValueError(f"{str(path)!r} holds NaN in {first_few(broken)}")
    return dict(state)


def _is_state(state: Any) -> bool:
    return (
        isinstance(state, Mapping)
        and bool(state)
        and all(isinstance(k, str) and isinstance(t, Tensor) for k, t in state.items())
    )


def fit(model: nn.Module, state: Mapping[str, Tensor], *, name: str, source: str) -> None:
    """Copies a state dict into a model, which must have exactly its names and shapes.

    Args:
        name: names the model in errors.
        source: says in errors where the state dict comes from.

    Raises:
        ValueError: tensors are missing, unexpected or of another shape.
    """
    present = model.state_dict(keep_vars=True)
    # One tensor under two names is stored once.
    stored = {id(present[key]) for key in state if key in present}
    missing = [
        key for key, tensor in present.items() if key not in state and id(tensor) not in stored
    ]
    unexpected = [key for key in state if key not in present]
    shapes = [
        f"{key} {tuple(state[key].shape)} where the model has {tuple(present[key].shape)}"
        for key in state
        if key in present and present[key].shape != state[key].shape
    ]
    check_fit(name, source, missing=missing, unexpected=unexpected, shapes=shapes)
    model.load_state_dict(state, strict=False)


def check_fit(
    name: str, source: str, *, missing: list[str], unexpected: list[str], shapes: list[str]
) -> None:
    """Raises ValueError with the first few names of all that does not fit, if anything does not."""
    problems = [
        f"{len(keys)} {kind} ({first_few(keys)})"
        for keys, kind in (
            (missing, "missing"),
            (unexpected, "unexpected"),
            (shapes, "of another shape"),
        )
        if keys
    ]
    if problems:
        raise ValueError(f"{source} does not fit {name}: {'; '.join(problems)}")


def first_few(names: Iterable[str]) -> str:
    """Joins the first three names, with "…" if there are more."""
    names = list(names)
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
