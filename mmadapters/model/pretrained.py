"""`save_pretrained` and `from_pretrained`: a model's adapters in one directory, with a card.

    adapters.json         the format, the adapters and fusions, what acts, and the encoder
    NAME/                 an adapter directory for each adapter, as `save_adapter` writes it
    fusions/0/ …          the same for each AdapterFusion
    modules.safetensors   tensors of the encoder that are trainable or new, such as a classifier's
    README.md             the card

The encoder itself is not written: it is frozen, and its library has it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..composition import from_data, parse
from ..errors import first_line
from ..files import read_directory, replacing_directory, same_directory
from . import fusion as fusions
from . import saving
from .encoder import AdaptedEncoder
from .store import AdapterStore
from .training_state import tensors_of

FORMAT = 1
INDEX, MODULES, CARD = "adapters.json", "modules.safetensors", "README.md"
_FUSIONS = "fusions"


def save(model: AdaptedEncoder, directory: str | os.PathLike) -> None:
    """See `AdapterModel.save_pretrained`."""
    store = model.store
    target = Path(directory)
    _check_replaceable(target)
    if store.merged:
        raise ValueError(
            f"the adapter {store.merged[0].name!r} is merged into the encoder: call reset_adapter "
            "first, or keep the merged encoder by its library's own means after detach()"
        )
    modules = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in model.trained_of_encoder().items()
    }
    if not store.adapter_names and not modules:
        raise ValueError("there is no adapter to save: add one first")
    index = {
        "format": FORMAT,
        "adapters": list(store.adapter_names),
        "fusions": list(store.fusion_names),
        "active": None if store.composition is None else store.composition.to_data(),
        "backbone": store.identity(),
    }
    with replacing_directory(target) as fresh:
        for name in store.adapter_names:
            saving.save(store, fresh / name, name=name, head=None, metadata=None)
        for number, name in enumerate(store.fusion_names):
            fusions.save(store, fresh / _FUSIONS / str(number), name)
        if modules:
            save_file(modules, fresh / MODULES, metadata={"format": "pt"})
        (fresh / CARD).write_text(_card(store, modules), "utf-8")
        (fresh / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def load(
    model: AdaptedEncoder, directory: str | os.PathLike, *, allow_different_weights: bool
) -> None:
    """Adds everything that a directory of `save` holds, or nothing if it raises.

    Raises:
        FileNotFoundError, ValueError: see `AdapterModel.from_pretrained`.
    """
    folder = Path(directory)
    read_directory(
        folder, lambda: _load(model, folder, allow_different_weights=allow_different_weights)
    )


def _load(model: AdaptedEncoder, folder: Path, *, allow_different_weights: bool) -> None:
    """Loads one state of a directory, or nothing if it raises."""
    store = model.store
    with store.all_or_nothing(), _restored(store) as give, same_directory(folder):
        index = read_index(folder)
        modules = _read_modules(folder)
        _check_modules(store.backbone, modules, folder)
        try:
            composition = None if index["active"] is None else parse(from_data(index["active"]))
        except (RecursionError, TypeError) as error:
            raise ValueError(
                f"{folder / INDEX}: active is no composition: {first_line(error)}"
            ) from None
        # Adapters may depend on these parts, so they are compared with an encoder that has them.
        give(modules)
        for name in index["adapters"]:
            saving.load(
                store, folder / name, name=name, allow_different_weights=allow_different_weights
            )
        for number in range(len(index["fusions"])):
            fusions.load(store, folder / _FUSIONS / str(number))
        store.activate(composition, 0)
    model.training_state.changed(modules)


@contextlib.contextmanager
def _restored(store: AdapterStore) -> Iterator[Callable[[Mapping[str, Tensor]], None]]:
    """Yields a function that gives the encoder values; after an error it has those of before."""
    tensors = tensors_of(store.backbone)
    before: dict[str, Tensor] = {}

    def give(values: Mapping[str, Tensor]) -> None:
        for name in values:
            before.setdefault(name, tensors[name].detach().clone())
        put(values)

    def put(values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in values.items():
                tensors[name].copy_(value)
        if values:
            store.identity(anew=True)

    try:
        yield give
    except BaseException:
        put(before)
        raise


def is_saved(directory: str | os.PathLike) -> bool:
    """Returns whether `save` wrote a directory."""
    return (Path(directory) / INDEX).is_file()


def only_adapter(directory: str | os.PathLike) -> Path:
    """Returns the directory of the only adapter in a directory of `save`.

    Raises:
        ValueError: it holds several adapters or none.
    """
    folder = Path(directory)
    names = read_index(folder)["adapters"]
    if len(names) != 1:
        raise ValueError(
            f"{folder} holds the adapters {', '.join(names) or '(none)'}: load one of them by its "
            f"own directory, {folder / (names or ['NAME'])[0]}, or all with "
            "AdapterModel.from_pretrained"
        )
    return folder / names[0]


def read_index(folder: Path) -> dict[str, Any]:
    """Reads the list of what a directory holds.

    Raises:
        FileNotFoundError: `save` did not write the directory.
        ValueError: the list is damaged or of a format that is not known.
    """
    file = folder / INDEX
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} is not a directory of save_pretrained: it has no {INDEX}"
        )
    try:
        index = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read: {first_line(error)}") from None
    lists = isinstance(index, dict) and [index.get("adapters"), index.get("fusions")]
    if not lists or not all(_are_names(names) for names in lists):
        raise ValueError(f"{file} is damaged: it has no lists of adapters and fusions")
    version = index.get("format")
    if type(version) is not int or version != FORMAT:  # true equals 1
        raise ValueError(f"{file} has format {version!r}; this version reads {FORMAT}")
    return {"active": None, **index}


def _are_names(names: Any) -> bool:
    """Returns whether a value is a list of names that lead to no other directory."""
    return isinstance(names, list) and all(
        isinstance(name, str) and name and not name.startswith(".") and Path(name).name == name
        for name in names
    )


def _check_replaceable(target: Path) -> None:
    """Raises ValueError unless `target` is free, empty, or was written by `save`."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target} is a file; choose another path")
    inside = [path.name for path in target.iterdir()]
    if inside and INDEX not in inside:
        raise ValueError(
            f"{target} holds {min(inside)}, which save_pretrained did not write and which would be "
            "lost; choose another path"
        )


def _read_modules(folder: Path) -> dict[str, Tensor]:
    file = folder / MODULES
    if not file.is_file():
        return {}
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read: {first_line(error)}") from None


def _check_modules(backbone: nn.Module, modules: Mapping[str, Tensor], folder: Path) -> None:
    there = tensors_of(backbone)
    for name, tensor in modules.items():
        if name not in there or there[name].shape != tensor.shape:
            has = tuple(there[name].shape) if name in there else "none"
            raise ValueError(
                f"{folder} holds {name} of shape {tuple(tensor.shape)}, and the encoder has {has}: "
                "give it the module that was trained before loading (model.classifier = …)"
            )


def _card(store: AdapterStore, modules: Mapping[str, Tensor]) -> str:
    encoder = type(store.backbone).__name__
    name = getattr(getattr(store.backbone, "config", None), "_name_or_path", "")
    lines = ["---", "library_name: mmadapters", "tags: [adapters]"]
    lines += [f"base_model: {json.dumps(name)}"] if name else []
    lines += ["---", "", f"# Adapters for {encoder}", ""]
    lines += ["| adapter | method | parameters |", "|---|---|--:|"]
    for adapter_name in store.adapter_names:
        adapter = store.adapter(adapter_name)
        count = sum(parameter.numel() for parameter in adapter.parameters())
        lines.append(f"| {adapter_name} | {adapter.config.method} | {count:,} |")
    if modules:
        lines += ["", f"Parts of the encoder that were trained too: {', '.join(modules)}."]
    lines += [
        *("", "```python", "import mmadapters", ""),
        f"backbone = ...  # the {encoder} that they were trained on",
        'model = mmadapters.AdapterModel.from_pretrained("THIS FOLDER", backbone)',
        *("```", ""),
    ]
    return "\n".join(lines)
