"""The adapter directory of a run: adapter, head and everything that rebuilds the task.

Three kinds share the format of `mmadapters.adapters.storage`: an adapter with its head; a head
alone (`trainer.mode: head`); and a whole encoder with its head (`full`), whose tensors have the
string prefix `backbone/`. Each names the encoder that it was trained on and loads on no other.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

import mmadapters
from mmadapters import AdapterModel
from mmadapters.adapters import storage
from mmadapters.adapters.identity import check_backbone
from mmadapters.adapters.shapes import TooLarge, at_most
from mmadapters.composition import parse
from mmadapters.errors import first_line
from mmadapters.files import read_directory
from mmadapters.limits import BLOCKS, PARAMETERS
from mmadapters.model import bundles

from .config.environment import described
from .config.schema import BackboneConfig, JobConfig
from .core.device import default_device
from .core.files import check_readable
from .core.model import TaskModel
from .core.saved import VERSION, read_metadata
from .core.task import Task
from .encoders.speech import layer_drop, without_layer_drop
from .registry import task_class

FOLDER = "adapter"
_FULL = "backbone/"
_SPARE = 1 << 26  # values that may be made for a moment while a model is built
_OF_DEPTH = ("depth", "layers", "blocks", "stages")  # in the names of options that count blocks
_IN_A_BLOCK = 50  # tensors of one block and of what is made with it


@dataclass(frozen=True)
class Opened:
    """The task and model of a directory, ready to evaluate and predict, and its metadata."""

    task: Task
    model: TaskModel
    metadata: dict[str, Any]


def make_backbone(config: BackboneConfig) -> nn.Module:
    """Loads the encoder of a config, without LayerDrop and SpecAugment unless the config asks for
    them."""
    try:
        backbone = mmadapters.load_backbone(
            config.name, pretrained=config.pretrained, weights=config.weights, **config.options
        )
    except (TypeError, AttributeError, KeyError, AssertionError) as error:
        if not config.options:
            raise
        # Libraries raise them for options that they do not know or cannot use.
        raise ValueError(
            f"backbone.options ({', '.join(config.options)}) do not fit {config.name}: "
            f"{first_line(error)}"
        ) from None
    settings: Any = getattr(backbone, "config", None)
    if not config.layerdrop:
        without_layer_drop(backbone)
    if not config.spec_augment and hasattr(settings, "apply_spec_augment"):
        settings.apply_spec_augment = False
    return backbone


def modules_active_in_training(
    config: BackboneConfig, encoder: AdapterModel
) -> tuple[nn.Module, ...]:
    """Returns the modules of a speech encoder that must be in train mode for LayerDrop and
    SpecAugment.

    Raises:
        ValueError: the config asks for one of them, and the encoder would not do it.
    """
    wanted: list[nn.Module] = []
    if config.spec_augment:
        wanted = [m for m in encoder.backbone.modules() if hasattr(m, "_mask_hidden_states")]
        if not wanted:
            raise ValueError(
                f"backbone.spec_augment is for speech encoders of transformers, and {config.name} "
                "has no such masks: take it out"
            )
    if config.layerdrop:
        try:
            runner, share = layer_drop(encoder)
        except ValueError:
            raise ValueError(
                f"backbone.layerdrop is for speech encoders, and {config.name} is none: take it out"
            ) from None
        if not share:
            torchaudio = config.name.startswith("torchaudio/")
            key = "encoder_layer_drop" if torchaudio else _layer_drop_key(encoder)
            raise ValueError(
                f"backbone.layerdrop drops layers as the encoder's config says, and that of "
                f"{config.name} drops none: set backbone.options.{key} above 0, or take it out"
            )
        wanted.append(runner)
    return tuple(wanted)


def _layer_drop_key(encoder: AdapterModel) -> str:
    settings = getattr(encoder.backbone, "config", None)
    return "encoder_layerdrop" if hasattr(settings, "encoder_layerdrop") else "layerdrop"


def save(
    directory: Path,
    task: Task,
    model: TaskModel,
    *,
    mode: str,
    metrics: dict[str, Any],
    whole: bool = True,
) -> None:
    """Writes the directory; see `storage.write`.

    Args:
        mode: the `trainer.mode` of the training.
        metrics: figures to store with the adapter, as plain data.
        whole: whether the weights of the encoder are written too in mode full. A directory without
            them only shows that the rest can be written.

    Raises:
        ValueError: a whole encoder (mode full) would be saved with a composition.
    """
    encoder = model.encoder
    metadata = {
        "version": VERSION,
        "mmadapters": mmadapters.__version__,
        "task": task.name,
        "mode": mode,
        "job": task.config.to_save(),
        "state": task.state,
        "metrics": metrics,
    }
    if task.config.environment:
        metadata["environment"] = described(task.config.environment)
    name = task.config.name
    if (composition := parse(task.config.composition)) is not None:
        if mode == "full":
            raise ValueError(
                "an encoder trained as a whole is not saved with a composition of adapters: take "
                "composition out of the config"
            )
        encoder.save_composition(directory, composition, head=model.head, metadata=metadata)
        return
    if name in encoder.adapter_names:
        encoder.save_adapter(directory, name, head=model.head, metadata=metadata)
        return
    tensors = {}
    if mode == "full" and whole:
        tensors = {_FULL + key: value for key, value in encoder.backbone.state_dict().items()}
    stored = storage.Stored(
        name=name,
        config={},
        backbone=encoder.identity(),
        tensors=tensors,
        head=dict(model.head.state_dict()),
        metadata=metadata,
    )
    storage.write(directory, stored)


def adapter_directory(path: str | os.PathLike) -> Path:
    """Returns the adapter directory at `path`, which may also be a run directory.

    Raises:
        FileNotFoundError: `path` is neither.
        PermissionError: this user may not read a folder of the path.
    """
    directory = Path(path)
    check_readable(directory)
    for candidate in (directory, directory / FOLDER):
        if (candidate / storage.JSON_FILE).is_file():
            return candidate
    raise FileNotFoundError(
        f"{directory} is no adapter directory ({storage.JSON_FILE}, {storage.WEIGHTS_FILE}) and no "
        f"run with one in {FOLDER}/"
    )


def open_directory(
    path: str | os.PathLike, *, overrides: Sequence[str] = (), device: str | None = None
) -> Opened:
    """Opens an adapter directory or a run directory and returns its task and model.

    Args:
        overrides: changes to the job that is saved there ("backbone.weights=elsewhere.bin").
        device: by default the accelerator of this machine, or the CPU.

    Raises:
        FileNotFoundError, ValueError: the directory cannot be read (see `storage.read`), belongs to
            another encoder, or has no task.
    """
    directory = adapter_directory(path)
    opened = read_directory(directory, lambda: _open(directory, overrides))
    opened.model.to(device or default_device()).eval()
    return opened


def _open(directory: Path, overrides: Sequence[str]) -> Opened:
    from .config.file import from_data

    stored = storage.read(directory)
    metadata = stored.metadata
    missing = [key for key in ("task", "mode", "job", "state") if key not in metadata]
    if missing:
        raise ValueError(
            f"{directory} holds an adapter without a task (no {', '.join(missing)}): load it with "
            "AdapterModel.load_adapter"
        )
    read = read_metadata(metadata, str(directory / storage.JSON_FILE))
    environment = metadata.get("environment", ())
    config: JobConfig = from_data(
        read.job, overrides, source=str(directory), environment=environment
    )
    if config.task != read.task:
        raise ValueError(f"{directory} is for the task {read.task}, and its job for {config.task}")
    task = task_class(config.task)(config, metadata["state"])
    check_size(config.backbone, str(directory))
    encoder = mmadapters.init(make_backbone(config.backbone))
    drop = blocks_dropped(config)
    if stored.config.get("method") == bundles.METHOD:
        composition, _ = encoder.load_composition(directory)
        encoder.set_active_adapters(composition, drop=drop)
    elif stored.config:
        encoder.load_adapter(directory)
        encoder.set_active_adapters(stored.name, drop=drop)
    else:
        check_backbone(stored.backbone, encoder.identity(), allow_different_weights=False)
    if metadata["mode"] == "full":
        _restore(encoder, stored, directory)
    model = _built(task, encoder, stored, directory)
    return Opened(task, model, metadata)


def _built(task: Task, encoder: AdapterModel, stored: storage.Stored, directory: Path) -> TaskModel:
    """Returns the task's model with the head that is stored.

    Raises:
        ValueError: the config asks for another head than the one that is stored.
    """
    held = sum(value.numel() for value in stored.head.values())
    try:
        # Beside the head itself some are made for a moment, such as copies and initial values.
        with at_most(_SPARE + 8 * held):
            model = task.build(encoder)
    except TooLarge:
        raise ValueError(
            f"{directory} does not fit its own config, which asks for a far larger head than the "
            f"{held:,} values that are there"
        ) from None
    shapes = {key: value.shape for key, value in model.head.state_dict().items()}
    for key in sorted(shapes.keys() | stored.head.keys()):
        here = tuple(shapes[key]) if key in shapes else "none"
        there = tuple(stored.head[key].shape) if key in stored.head else "none"
        if here != there:
            raise ValueError(
                f"{directory} does not fit its own config: {key} of the head has shape {there}, "
                f"and the config needs {here}"
            )
    model.head.load_state_dict(stored.head)
    return model


def check_size(config: BackboneConfig, source: str) -> None:
    """Counts the parameters of an encoder that a file asks for by options of its own.

    The encoder is built without memory.

    Args:
        source: says in errors where the config comes from.

    Raises:
        ValueError: it has more parameters or blocks than the limits allow.
    """
    if not config.options:
        return
    for key, value in numbers(config.options):
        most = BLOCKS if any(word in key for word in _OF_DEPTH) else PARAMETERS
        if (reason := most.passed(value)) is not None:
            raise ValueError(f"{source}: backbone.options.{key} asks for {reason}")
    try:
        with at_most(PARAMETERS.value, tensors=BLOCKS.value * _IN_A_BLOCK, allocate=False):
            mmadapters.load_backbone(config.name, **config.options)
    except TooLarge as error:
        raise ValueError(
            f"{source}: backbone.options ask for an encoder with {error}; the limits are "
            f"{BLOCKS.value:,} blocks and {PARAMETERS.value:,} parameters ({BLOCKS.variable} and "
            f"{PARAMETERS.variable} set others)"
        ) from None
    except (
        Exception
    ):  # without values not every encoder can be built; loading it says what is wrong
        return


def numbers(data: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Yields the numbers in plain data, each with its dotted key."""
    if isinstance(data, dict):
        for name, value in data.items():
            yield from numbers(value, f"{key}.{name}" if key else str(name))
    elif isinstance(data, list | tuple):
        for value in data:
            yield from numbers(value, key)
    elif isinstance(data, int | float) and not isinstance(data, bool):
        yield key, data


def blocks_dropped(config: JobConfig) -> int:
    """Returns the number of lowest blocks without adapters outside training."""
    drop = config.trainer.adapter_drop
    trained = 0 if isinstance(drop, tuple) else drop
    return trained if config.evaluation.adapter_drop is None else config.evaluation.adapter_drop


def load_member(encoder: AdapterModel, name: str, path: str | os.PathLike) -> None:
    """Adds the adapter of a run or adapter directory to an encoder, under another name.

    Raises:
        FileNotFoundError, ValueError: it cannot be loaded (see `AdapterModel.load_adapter`), or the
            run trained no single adapter.
    """
    directory = adapter_directory(path)
    config = storage.read(directory).config
    if not config or config.get("method") == bundles.METHOD:
        held = "a composition of adapters" if config else "a head without an adapter"
        raise ValueError(f"members.{name}: {directory} holds {held}; name the run of one adapter")
    encoder.load_adapter(directory, name)


def _restore(encoder: AdapterModel, stored: storage.Stored, directory: Path) -> None:
    tensors = {key.removeprefix(_FULL): value for key, value in stored.tensors.items()}
    try:
        encoder.backbone.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{directory} does not fit its encoder: {error}") from None
