"""The sections and keys of a run config. Every task adds its own in `<task>/config.py`.

Nothing here imports torch, so that `mmadapters train segmentation --help` answers at once. The
string below an attribute is its description, which `--help` prints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, field_validator

LOSS = "loss"  # the value of evaluation.deciding that is no metric of any task
Split = Literal["train", "validation", "test"]
LONGEST_NAME = 200  # bytes of a run's name; file systems take 255, with what is added to it
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class FromEnvironment:
    """A text of a config that holds values of environment variables.

    Attributes:
        text: the text with interpolations in place of the values (${oc.env:DATA}/pets).
        value: the resolved text.
        variables: the values of the variables by name.
    """

    text: str
    value: str
    variables: Mapping[str, str]


class Section(BaseModel):
    """A mapping of the YAML file. Unknown keys are errors, and values are fixed once read."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )
    _environment: dict[tuple[str, ...], FromEnvironment] = PrivateAttr(default_factory=dict)

    @property
    def environment(self) -> Mapping[tuple[str, ...], FromEnvironment]:
        """The texts that came from environment variables, by their path."""
        return self._environment

    def remember(self, values: Mapping[tuple[str, ...], FromEnvironment]) -> None:
        """Keeps which texts came from environment variables; called once, after reading."""
        self._environment.update(values)

    def to_save(self) -> dict[str, Any]:
        """Returns the config as plain data for a file: without values of environment variables."""
        data = self.model_dump(mode="json")
        for path, value in self._environment.items():
            _replace(data, path, value)
        return data


def _replace(data: Any, path: tuple[str, ...], value: FromEnvironment) -> None:
    """Puts the interpolation in place of its value, unless something else is there by now."""
    around: Any = None
    key: Any = None
    for step in path:
        around, key = data, int(step) if isinstance(data, list) else step
        there = range(len(data)) if isinstance(data, list) else data
        if not isinstance(data, (list, dict)) or key not in there:
            return
        data = data[key]
    if data == value.value:
        around[key] = value.text


def _name_of_a_folder(value: str) -> str:
    """Returns the name of a run, which becomes the name of a folder.

    Raises:
        ValueError: it leads to another folder, or is no name that a folder can have.
    """
    if value in ("", ".", "..") or len(value.encode("utf-8", "replace")) > LONGEST_NAME:
        raise ValueError(f"{value!r} cannot name a folder: give 1 to {LONGEST_NAME} letters")
    if not value.isprintable() or set(value) & set("/\\"):
        raise ValueError(
            f"{value!r} cannot name a folder: take out slashes and what cannot be seen; "
            "output=… says where a run is written"
        )
    return value


FolderName = Annotated[str, AfterValidator(_name_of_a_folder)]


class BackboneConfig(Section):
    """The encoder."""

    name: str
    """The encoder's name, as `mmadapters.load_backbone` takes it: timm/…, hf/…, open_clip/…,
    torchaudio/…, nano/…"""
    pretrained: bool | str = False
    """true downloads the library's own weights, a text the weights of this tag (open_clip). With
    false and no `weights` the encoder is untrained; nano encoders always have their weights."""
    weights: str | None = None
    """A local file of weights to load instead of downloaded ones."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the library's constructor or config, over its defaults (img_size: 224)."""
    processor: str | None = None
    """Hub name or folder of the tokenizer and the normalisation. Needed where the backbone's name
    does not determine them; names of nano and open_clip encoders do."""
    layerdrop: bool = False
    """Drop layers of a speech encoder at random in training, as the encoder's config says."""
    spec_augment: bool = False
    """Mask features of a speech encoder at random in training (SpecAugment), as its config says."""
    freeze_front_end: bool = True
    """Keep the convolutions of a speech encoder frozen also in `trainer.mode: full`."""


class DataConfig(Section):
    """The data set, its splits and columns."""

    source: str
    """A hub name; a folder with metadata.csv or .jsonl; a .csv, .json(l), .parquet or .tar file, or
    a glob of them; or builtin/NAME for data that is generated or that a package ships."""
    root: str | None = None
    """The folder from which relative paths in the tables start; by default the folder of the
    table."""
    trust_paths: bool | None = None
    """Whether a table may name files outside its folder (or `root`). By default absolute paths of
    this machine may, and paths that climb out by `..` and URLs may not. true allows all, false
    none, links included."""
    name: str | None = None
    """The configuration of a hub data set, where it has several."""
    revision: str | None = None
    """The revision of a hub data set: a branch, tag or commit; by default the newest."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of a builtin source."""
    streaming: bool = False
    """Read the training rows while the model trains: those of a hub data set as they download, and
    those of tables, folders and tars in blocks; needs trainer.max_steps."""
    separator: str | None = Field(default=None, min_length=1, max_length=1)
    """The character between the cells of a CSV file; by default it is recognised: a comma, a tab, a
    semicolon or a bar."""
    header: tuple[str, ...] | None = None
    """The names of the columns of a CSV file whose first line is a row already ([file_name,
    text])."""
    quoting: bool | None = None
    """Whether a " encloses a cell of a CSV file (true) or is a character like others (false); by
    default the file shows it."""
    encoding: str | None = None
    """The encoding of text files (cp1252); by default UTF-8, or UTF-16 where it is recognised."""
    split_column: str | None = None
    """The column that names the split of each row; a column "split" is recognised by its name."""
    splits: dict[Split, str | tuple[str, ...]] = Field(default_factory=dict)
    """The source's names of the splits, where they are not train, validation and test
    (validation: dev); a list of names puts several together (train: ["1", "2"])."""
    fractions: dict[Split, float] = Field(default_factory=dict)
    """Shares of the training rows, between 0 and 1, that become the validation and the test split
    where the source has none."""
    columns: dict[str, str] = Field(default_factory=dict)
    """The source's column of each role that the task reads (image: picture_path)."""
    keep: dict[Split, dict[str, list[Any]]] = Field(default_factory=dict)
    """By split and column: keep only rows whose value in the column is one of these."""
    drop: dict[Split, dict[str, list[Any]]] = Field(default_factory=dict)
    """By split and column: leave out rows whose value in the column is one of these."""
    limit: dict[Split, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """The largest number of rows of a split, 1 or more; they are drawn with `seed`."""
    bits: int | None = Field(default=None, ge=1, le=16)
    """Number of bits in use, 1 to 16, in pictures that have 16 bits a channel (12 for most cameras
    of microscopes and X-ray detectors). null: 8, 10 or 12 if a sample of the training pictures has
    no value above, else 16. Pictures of 8 bits are not changed."""
    on_error: Literal["skip", "refuse"] = "skip"
    """skip leaves out rows that cannot be used and counts them; refuse ends the run."""
    seed: int = 0
    """Seed of the random choice of rows for `fractions` and `limit`."""

    @field_validator("splits")
    @classmethod
    def _splits(cls, value: dict[Split, Any]) -> dict[Split, Any]:
        for split, names in value.items():
            if isinstance(names, str):
                continue
            if not names or len(set(names)) < len(names):
                raise ValueError(f"{split} needs a list of names without repetition")
            for other, some in value.items():
                twice = set(names) & ({some} if isinstance(some, str) else set(some))
                if twice and other != split:
                    raise ValueError(f"{min(twice)!r} is in {split} and in {other}")
        return value

    @field_validator("fractions")
    @classmethod
    def _fractions(cls, value: dict[str, float]) -> dict[str, float]:
        if "train" in value:
            raise ValueError("give the shares of validation and test; train is the rest")
        if any(not 0 < share < 1 for share in value.values()) or sum(value.values()) >= 1:
            raise ValueError("shares lie between 0 and 1 and sum to less than 1")
        return value


class TrainerConfig(Section):
    """The training."""

    mode: str = "adapter"
    """The parameters that are trained: adapter (the head and the adapter of the `adapter` section),
    full (head and encoder), head, none (the encoder is only evaluated), fusion (the attention over
    the members of `composition`), or the name of a method (bitfit, lora, …) for an adapter with its
    defaults."""
    adapter_drop: int | tuple[int, int] = 0
    """AdapterDrop: the number of lowest blocks without adapters, 0 or more. A pair [least, most]
    draws the number anew for each step."""

    @field_validator("adapter_drop")
    @classmethod
    def _adapter_drop(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        least, most = value if isinstance(value, tuple) else (value, value)
        if not 0 <= least <= most:
            raise ValueError("give a number of blocks, or a pair [least, most]")
        return value

    epochs: float = Field(default=10.0, gt=0)
    """Passes over the training split, above 0."""
    max_steps: int | None = Field(default=None, ge=1)
    """Number of optimiser steps; replaces `epochs`."""
    batch_size: int = Field(default=32, ge=1)
    """Examples of one optimiser step, in all processes and accumulated parts together."""
    accumulation: int = Field(default=1, ge=1)
    """Parts into which the batch of a step is cut to save memory."""
    eval_batch_size: int | None = Field(default=None, ge=1)
    """Examples of one evaluation batch in each process; by default `batch_size`."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate of the adapter; in mode full that of encoder and head, unless they have
    their own."""
    head_learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate of the head; by default `learning_rate`."""
    backbone_learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate of the encoder in mode full; by default `learning_rate`."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Weight decay of matrices; vectors (biases, norms, scales) are not decayed."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup: float = Field(default=0.1, ge=0, lt=1)
    """Share of all steps, from 0 to below 1, in which the learning rate rises to its peak."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients with a larger norm are scaled down to this one; 0 leaves them unchanged."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type in which autocast computes; trained parameters stay in fp32."""
    gradient_checkpointing: bool = False
    """Recompute the blocks in the backward pass instead of keeping their states; saves memory."""
    trunk_dropout: bool | None = None
    """Apply the encoder's own dropout in training; by default only in mode full."""
    evaluate_every: int | None = Field(default=None, ge=1)
    """Steps between evaluations on the validation split; by default once an epoch."""
    early_stopping: int | None = Field(default=None, ge=1)
    """Stop after this number of evaluations without a new best; by default never."""
    save_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints that --resume starts from; by default one at each evaluation. Must
    be a multiple or a divisor of `evaluate_every`."""
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Number of processes that read and decode data. auto takes all cores but one, at most 8. If
    the model runs on the CPU, auto takes at most one, and none for cached states or where new
    processes are not forked. The environment variable MMADAPTERS_WORKERS sets another number for
    auto."""
    cache_trunk: Literal["auto", "memory", "disk", "off"] = "auto"
    """Compute the frozen trunk (the part of the encoder below the first adapter) once for each row
    and keep its states: in memory, or on disk, where later runs read them; off computes it in every
    step. auto caches where this saves time, in memory if the states fit."""

    @field_validator("cache_trunk", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads an off without quotes as false

    views: int | None = Field(default=None, ge=1)
    """Number of augmented versions of each row, fixed in advance so that their states can be
    cached. By default every pass draws a new one, which cannot be cached."""
    cache_dtype: Literal["auto", "same", "bf16", "fp16"] = "auto"
    """Type in which cached states are stored. same stores them as they are computed; auto takes
    bf16 or fp16 if that is the `precision`, else same."""
    cache_budget: float = Field(default=16.0, gt=0)
    """Largest size of the cached states on each machine, in GiB."""
    cache_folder: str | None = None
    """Folder of the states that are cached on disk; by default $MMADAPTERS_CACHE, or mmadapters in
    the user's cache folder (~/.cache)."""
    log_every: int = Field(default=10, ge=1)
    """Steps between two points of the learning curve."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    wandb: bool = False
    """Report to Weights & Biases (its package must be installed)."""
    device: Literal["auto", "cpu"] = "auto"
    """auto uses the accelerator of the machine if there is one; cpu never does."""


class EvaluationConfig(Section):
    """The evaluation and the report."""

    deciding: str | None = None
    """The figure on the validation split by which the best checkpoint is chosen: a metric of the
    task, or loss (the training loss). Of equal checkpoints the latest is kept. null: the first
    metric of the task."""
    bootstrap: int = Field(default=1000, ge=0)
    """Number of bootstrap resamples for the 95 % intervals; 0 computes no intervals."""
    before: bool = False
    """Evaluate the test split also before training (for a zero-shot or pretrained head)."""
    groups: tuple[str, ...] = ()
    """Columns whose values divide the rows into groups; each group gets its own metrics (accent,
    speaker)."""
    pictures: int = Field(default=12, ge=0)
    """Number of examples in the report."""
    adapter_drop: int | None = Field(default=None, ge=0)
    """Number of lowest blocks without adapters in evaluation and prediction; by default
    `trainer.adapter_drop`, or 0 where that is a pair."""


class JobConfig(Section):
    """The whole file. Tasks subclass it and set their own `head`, `data` and other sections."""

    task: str
    """The kind of job: segmentation, asr, vqa, retrieval, captioning or classification."""
    name: FolderName = "adapter"
    """Name of the run and of its adapter."""
    output: str = "runs/${name}"
    """The run directory."""
    seed: int = 0
    """Seed of initialisation, order of the rows, and augmentation."""
    backbone: BackboneConfig
    """The encoder."""
    adapter: dict[str, Any] = Field(default_factory=lambda: {"method": "double_seq_bn"})
    """The method and its options: {method: lora, rank: 8, sites: ["vision.blocks.[6-9].*"]}."""
    members: dict[str, str] = Field(default_factory=dict)
    """Further adapters: name -> directory of an earlier run or of its adapter. They are not
    trained."""
    composition: Any = None
    """The adapters that act: a name, or a composition such as {fuse: [usa, german]} or
    {stack: [german, ${name}]}. By default the adapter of this run alone."""
    data: DataConfig
    """The data set, its splits and columns."""
    trainer: TrainerConfig = TrainerConfig()
    """The training."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """The evaluation and the report."""

    @field_validator("composition")
    @classmethod
    def _composition(cls, value: Any) -> Any:
        if value is None:
            return None
        from mmadapters.composition import parse

        composition = parse(value)
        return None if composition is None else composition.to_data()
