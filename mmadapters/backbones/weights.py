"""Reading files of weights, and loading what fits of them into a model.

Weight files are data: safetensors, or what `torch.load(weights_only=True)` accepts. Nothing in them
is executed. A file must have all that the model's blocks depend on. It may have another head or
none, no pooler, or a second tower: a warning names what was left.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.dependence import tensors_behind
from ..injectors.selfcheck import like_parameters
from ..sites.tables import describe


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
    """Copies what fits of a state dict into a model.

    A warning names tensors outside of the trunk that are missing or of another shape, and those of
    the file that the model lacks.

    Args:
        name: names the model in errors.
        source: says in errors where the state dict comes from.

    Raises:
        ValueError: tensors of the trunk are missing, unexpected or of another shape.
    """
    present = model.state_dict(keep_vars=True)
    # One tensor under two names is stored once.
    stored = {id(present[key]) for key in state if key in present}
    missing = [
        key for key, tensor in present.items() if key not in state and id(tensor) not in stored
    ]
    unexpected = [key for key in state if key not in present]
    shapes = {
        key: f"{key} {tuple(state[key].shape)} where the model has {tuple(present[key].shape)}"
        for key in state
        if key in present and present[key].shape != state[key].shape
    }
    check_fit(model, name, source, missing=missing, unexpected=unexpected, shapes=shapes)
    fitting = {key: tensor for key, tensor in state.items() if key not in shapes}
    model.load_state_dict(fitting, strict=False)


def check_fit(
    model: nn.Module,
    name: str,
    source: str,
    *,
    missing: list[str],
    unexpected: list[str],
    shapes: Mapping[str, str],
) -> None:
    """Warns of what does not fit and is no part of the model's trunk.

    Args:
        missing: names of the model that the file lacks.
        unexpected: names of the file that the model lacks.
        shapes: names whose tensors have another shape, each with what a message says of it.

    Raises:
        ValueError: something of the trunk does not fit; has the first few names of all that does
            not.
    """
    if not (missing or unexpected or shapes):
        return
    trunk = _Trunk.of(model)
    if any(map(trunk.reads, (*missing, *shapes))) or any(map(trunk.is_block, unexpected)):
        problems = [
            f"{len(keys)} {kind} ({first_few(keys)})"
            for keys, kind in (
                (missing, "missing"),
                (unexpected, "unexpected"),
                ([*shapes.values()], "of another shape"),
            )
            if keys
        ]
        raise ValueError(f"{source} does not fit {name}: {'; '.join(problems)}")
    left = [
        f"{len(keys)} tensors {kind} ({first_few(keys)})"
        for keys, kind in (
            (missing, "that it lacks keep random values"),
            ([*shapes.values()], "of another shape keep random values"),
            (unexpected, "of it have no place in the model and are not used"),
        )
        if keys
    ]
    warnings.warn(f"{name} takes from {source} what fits: {'; '.join(left)}", stacklevel=2)


@dataclass(frozen=True)
class _Trunk:
    """The tensors of a model that adapters rely on: all that the states of its blocks depend on,
    the norms behind them, and projections into a shared space.

    Attributes:
        names: theirs; None for a model that has no site map, where all of them count.
        blocks: the names of the lists of blocks, each with a dot at the end.
    """

    names: frozenset[str] | None = None
    blocks: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: nn.Module) -> _Trunk:
        try:
            sites, example = describe(model)
        except ValueError:
            return cls()
        if example is None:
            return cls()
        # Or the random numbers that are drawn after it would be others.
        with torch.random.fork_rng(devices=[]):
            args, kwargs = like_parameters(model, example(model))
        behind = tensors_behind(model, sites.towers, lambda: model(*args, **kwargs))
        tensors = {id(tensor) for group in behind.values() for tensor in group.values()}
        modules = [block.module for block in sites.blocks()]
        for tower in sites.towers.values():
            modules += [] if tower.norm is None else [tower.norm.module]
            modules += [] if tower.embedding is None else [tower.embedding.module]
        for module in modules:
            tensors |= {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
        # open_clip projects texts by a matrix of the model itself.
        tensors |= {id(p) for p in model._parameters.values() if p is not None and p.dim() > 1}
        runs = {id(block.module) for block in sites.blocks()}
        lists = {
            name.rpartition(".")[0] + "."
            for name, module in model.named_modules()
            if id(module) in runs
        }
        # transformers puts this before the names of a model's trunk when there is a head beside it.
        prefix = getattr(model, "base_model_prefix", "")
        lists |= {f"{prefix}.{name}" for name in lists if prefix}
        present = model.state_dict(keep_vars=True)
        names = frozenset(name for name, tensor in present.items() if id(tensor) in tensors)
        return cls(names, tuple(lists))

    def reads(self, name: str) -> bool:
        """Says whether a tensor of the model belongs to the trunk."""
        return self.names is None or name in self.names

    def is_block(self, name: str) -> bool:
        """Says whether a name that the model lacks is one of a block."""
        return name.startswith(self.blocks)


def first_few(names: Iterable[str]) -> str:
    """Joins the first three names, with "…" if there are more."""
    names = list(names)
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
