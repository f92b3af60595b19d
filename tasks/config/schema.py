"""What a run config may say. Every task adds its own sections in `<task>/config.py`.

Nothing here imports torch: `mmadapters train segmentation --help` reads these classes alone.
The string below an attribute is its description, which `--help` prints.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class Section(BaseModel):
    """A mapping of the YAML file: unknown keys are errors, values do not change once read."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )


class BackboneConfig(Section):
    name: str
    """What `mmadapters.load_backbone` takes: timm/…, hf/…, open_clip/…, torchaudio/…, nano/…"""
    pretrained: bool | str = False
    """Download the library's own weights (or a tag of open_clip)."""
    weights: str | None = None
    """A local file of weights instead."""
    options: dict[str, Any] = Field(default_factory=dict)
    """What the library's constructor or config takes over its defaults (img_size: 224)."""
    processor: str | None = None
    """Hub name or folder of the tokenizer and the normalisation, where the backbone's own name
    does not say which; nano and open_clip names do."""
    layerdrop: bool = False
    """Let a speech encoder drop layers in training, as its config says."""
    spec_augment: bool = False
    """Let a speech encoder mask its features in training, as its config says."""
    freeze_front_end: bool = True
    """Keep a speech encoder's convolutions frozen in `trainer.mode: full` too, as is usual."""


class DataConfig(Section):
    source: str
    """A hub name, a folder with metadata.csv or .jsonl, a .csv, .json(l) or .parquet file (or a
    glob of them), or builtin/NAME for data that is made or that a package ships."""
    name: str | None = None
    """The configuration of a hub data set."""
    revision: str | None = None
    """The revision of a hub data set."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of a builtin source."""
    streaming: bool = False
    """Read the training split of a hub data set as it arrives; needs trainer.max_steps."""
    split_column: str | None = None
    """The column that names each row's split; "split" is found by itself."""
    splits: dict[Split, str] = Field(default_factory=dict)
    """What the source calls its splits, where not train, validation, test."""
    fractions: dict[Split, float] = Field(default_factory=dict)
    """Shares of validation and test, drawn from the training rows, where a split is missing."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Which column holds what the task needs (image: picture_path)."""
    keep: dict[Split, dict[str, list[Any]]] = Field(default_factory=dict)
    """Keep only the rows of a split whose columns have one of these values."""
    drop: dict[Split, dict[str, list[Any]]] = Field(default_factory=dict)
    """Leave out the rows of a split whose columns have one of these values."""
    limit: dict[Split, int] = Field(default_factory=dict)
    """Use at most so many rows of a split, drawn with the seed."""
    on_error: Literal["skip", "refuse"] = "skip"
    """A row that cannot be used is skipped and counted, or ends the run."""
    seed: int = 0
    """Draws fractions and limits."""

    @field_validator("fractions")
    @classmethod
    def _fractions(cls, value: dict[str, float]) -> dict[str, float]:
        if "train" in value:
            raise ValueError("give the shares of validation and test; train is the rest")
        if any(not 0 < share < 1 for share in value.values()) or sum(value.values()) >= 1:
            raise ValueError("shares lie between 0 and 1 and sum to less than 1")
        return value


class TrainerConfig(Section):
    mode: str = "adapter"
    """adapter (as the section says), full, head, none (evaluate the encoder as it is), fusion (the
    attention over the members of `composition`), or the name of a method for its defaults: bitfit,
    lora, …"""
    adapter_drop: int | tuple[int, int] = 0
    """AdapterDrop: no adapters in so many of the lowest blocks; [least, most]: drawn every step."""

    @field_validator("adapter_drop")
    @classmethod
    def _adapter_drop(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        least, most = value if isinstance(value, tuple) else (value, value)
        if not 0 <= least <= most:
            raise ValueError("give a number of blocks, or a pair [least, most]")
        return value

    epochs: float = Field(default=10.0, gt=0)
    """Passes over the training split."""
    max_steps: int | None = Field(default=None, ge=1)
    """Steps instead of epochs."""
    batch_size: int = Field(default=32, ge=1)
    """Examples of one optimiser step, over all processes and accumulated parts."""
    accumulation: int = Field(default=1, ge=1)
    """Parts into which a step's batch is cut to save memory."""
    eval_batch_size: int | None = Field(default=None, ge=1)
    """Examples of one evaluation batch on each process; that of training by default."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak rate of the adapter (of everything in mode full, unless backbone_learning_rate)."""
    head_learning_rate: float | None = Field(default=None, gt=0)
    """Peak rate of the head; learning_rate by default."""
    backbone_learning_rate: float | None = Field(default=None, gt=0)
    """Peak rate of the encoder in mode full; learning_rate by default."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Of matrices; vectors (biases, norms, scales) have none."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """After the warm-up."""
    warmup: float = Field(default=0.1, ge=0, lt=1)
    """The share of all steps over which the rate rises."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are scaled down to this norm; 0 leaves them."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the autocast regions; parameters stay in fp32."""
    gradient_checkpointing: bool = False
    """Compute blocks anew in backward instead of keeping their states."""
    trunk_dropout: bool | None = None
    """Let the encoder's own dropout act in training; by default only in mode full."""
    evaluate_every: int | None = Field(default=None, ge=1)
    """Steps between evaluations on the validation split; once an epoch by default."""
    early_stopping: int | None = Field(default=None, ge=1)
    """Stop after so many evaluations without a better one."""
    save_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints to resume from; at each evaluation by default. A multiple or a
    divisor of evaluate_every."""
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Processes that read and decode data; auto: one for each core but one, 8 at most, and one at
    most where the CPU trains and wants the cores (none there for kept states, or where processes
    are not forked)."""
    cache_trunk: Literal["auto", "memory", "disk", "off"] = "auto"
    """Compute what lies below the first adapter once and keep its states, in memory or on disk,
    where later runs find them; auto: where it pays, in memory if they fit there."""

    @field_validator("cache_trunk", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return "off" if value is False else value  # as YAML reads an off without quotes

    views: int | None = Field(default=None, ge=1)
    """Augment each row in so many ways and no more, so that their states can be kept; by default
    anew each time, which leaves nothing to keep."""
    cache_dtype: Literal["auto", "same", "bf16", "fp16"] = "auto"
    """In what states are kept; same: as they are; auto: bf16 or fp16 where that is the precision,
    else as they are."""
    cache_budget: float = Field(default=16.0, gt=0)
    """GiB that kept states may take, on each machine."""
    cache_folder: str | None = None
    """Where those on disk lie; by default $MMADAPTERS_CACHE, or mmadapters in the user's folder for
    caches (~/.cache)."""
    log_every: int = Field(default=10, ge=1)
    """Steps between points of the learning curve."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    wandb: bool = False
    """Report to Weights & Biases (its package must be installed)."""
    device: Literal["auto", "cpu"] = "auto"
    """The accelerator that is there, or the CPU all the same."""


class EvaluationConfig(Section):
    bootstrap: int = Field(default=1000, ge=0)
    """Resamples for the 95 % intervals; 0 leaves them out."""
    before: bool = False
    """Evaluate the test split before training too (a zero-shot or pretrained head)."""
    groups: tuple[str, ...] = ()
    """Columns by whose values every metric is broken down (accent, speaker)."""
    pictures: int = Field(default=12, ge=0)
    """Examples shown in the report."""
    adapter_drop: int | None = Field(default=None, ge=0)
    """Blocks without adapters when evaluating and predicting; those of training by default."""


class JobConfig(Section):
    """The whole file. Tasks subclass this and set their own `head`, `data` and other sections."""

    task: str
    """segmentation, asr, vqa, retrieval, captioning or classification."""
    name: str = "adapter"
    """Of the run and of its adapter."""
    output: str = "runs/${name}"
    """The run directory."""
    seed: int = 0
    """Of initialisation, order and augmentation."""
    backbone: BackboneConfig
    adapter: dict[str, Any] = Field(default_factory=lambda: {"method": "double_seq_bn"})
    """A method and its options: {method: lora, rank: 8, sites: ["vision.blocks.[6-9].*"]}."""
    members: dict[str, str] = Field(default_factory=dict)
    """Further adapters by name, from the directories of earlier runs; they stay as they are."""
    composition: Any = None
    """What acts: a name, or e.g. {fuse: [usa, german]}, {stack: [german, ${name}]}; by default the
    adapter of this run alone."""
    data: DataConfig
    trainer: TrainerConfig = TrainerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @field_validator("composition")
    @classmethod
    def _composition(cls, value: Any) -> Any:
        if value is None:
            return None
        from mmadapters.composition import parse

        composition = parse(value)
        return None if composition is None else composition.to_data()
