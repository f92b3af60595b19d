"""Configs: YAML, overrides and interpolation; what a mistake is told as, and where."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field

from mmadapters.tasks.config.file import config_names, from_data, read_config
from mmadapters.tasks.config.keys import describe_keys
from mmadapters.tasks.config.schema import DataConfig, JobConfig, Section, TrainerConfig
from mmadapters.tasks.config.tasks import TASKS, TaskClasses, config_class

BASE = "task: segmentation\nbackbone:\n  name: nano/vit\ndata:\n  source: builtin/scenes\n"
THERE = list(TASKS)


class LinearHead(Section):
    kind: Literal["linear"] = "linear"
    """One layer."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of features."""


class MaskHead(Section):
    kind: Literal["mask"] = "mask"
    """A transformer."""
    layers: int = Field(default=2, ge=1)
    """Of the transformer."""


class ProbeData(DataConfig):
    size: tuple[int, int] = (64, 64)
    """Height and width."""


class ProbeConfig(JobConfig):
    task: Literal["probe"] = "probe"
    head: LinearHead | MaskHead = Field(default=LinearHead(), discriminator="kind")
    data: ProbeData
    trainer: TrainerConfig = TrainerConfig(epochs=30, batch_size=8)


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> str:
    """A config with what no task has now: a union of sections, a section's own defaults."""
    monkeypatch.setitem(TASKS, "probe", TaskClasses(f"{__name__}:ProbeConfig", task="none"))
    return BASE.replace("segmentation", "probe")


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def file(text: str) -> str:
        Path("job.yaml").write_text(text, encoding="utf-8")
        return "job.yaml"

    return file


def problems(path: str, *overrides: str) -> list[str]:
    with pytest.raises(ValueError) as error:
        read_config(path, overrides)
    return str(error.value).splitlines()


def test_a_file_gives_the_class_of_its_task_with_defaults(write) -> None:
    config = read_config(write(BASE))
    assert type(config) is config_class("segmentation")
    assert (config.name, config.output, config.trainer) == (
        *("adapter", "runs/adapter"),
        TrainerConfig(),
    )


def test_interpolation_reaches_what_was_written_overridden_and_left_to_its_default(write) -> None:
    path = write(BASE + "output: out/${name}-${seed}-${trainer.batch_size}\n")
    assert read_config(path, ["name=lora", "trainer.batch_size=4"]).output == "out/lora-0-4"


def test_overrides_are_yaml_and_reach_keys_that_the_file_does_not_have(write) -> None:
    config = read_config(
        write(BASE + "trainer:\n"),
        [
            "trainer.learning_rate=1e-4",
            "trainer.early_stopping=null",
            "evaluation.groups=[accent, speaker]",
            "data.keep.train.accent=[us]",
            "data.splits[validation]=dev",
        ],
    )
    assert config.trainer.learning_rate == 1e-4
    assert config.trainer.early_stopping is None
    assert config.evaluation.groups == ("accent", "speaker")
    assert config.data.keep == {"train": {"accent": ["us"]}}
    assert config.data.splits == {"validation": "dev"}


def test_a_mapping_is_merged_into_a_section_and_replaces_any_other_value(write) -> None:
    path = write(BASE + "trainer: {epochs: 3}\nadapter: {method: double_seq_bn, size: 8}\n")
    config = read_config(path, ["trainer={batch_size: 4}", "adapter={method: lora, rank: 4}"])
    assert (config.trainer.epochs, config.trainer.batch_size) == (3, 4)
    assert config.adapter == {"method": "lora", "rank": 4}


def test_a_later_override_wins(write) -> None:
    assert read_config(write(BASE), ["seed=1", "seed=2"]).seed == 2


def test_a_section_keeps_the_defaults_that_its_task_gives_it(write, probe: str) -> None:
    config = read_config(write(probe + "trainer: {log_every: 1}\n"))
    assert (config.trainer.epochs, config.trainer.batch_size) == (30, 8)
    shown = {key.path: key.default for key in describe_keys("probe")}
    assert (shown["trainer.epochs"], shown["trainer.batch_size"]) == (30, 8)


@pytest.mark.parametrize(
    ("text", "line", "sentence"),
    [
        ("trainer:\n  epoch: 3\n", 7, "trainer has no key 'epoch'; did you mean 'epochs'?"),
        ("epochs: 3\n", 6, "a config has no key 'epochs'; did you mean 'trainer.epochs'?"),
        (
            "trainer.epochs: 3\n",
            6,
            "a config has no key 'trainer.epochs'; write 'epochs' below a section 'trainer'",
        ),
        ("trainer:\n  batch_size: 0\n", 7, "trainer.batch_size must be a whole number ≥ 1, not 0"),
        ("seed: 0.5\n", 6, "seed must be a whole number, not 0.5"),
        ("trainer: {epochs: true}\n", 6, "trainer.epochs must be a number > 0, not true"),
        ("trainer: {epochs: .inf}\n", 6, "trainer.epochs must be a number > 0, not Infinity"),
        ("name: 2024\n", 6, "name must be text, not 2024; put it in quotes"),
        (
            "trainer:\n  schedule: cosin\n",
            7,
            'trainer.schedule must be cosine, linear or constant, not "cosin"; did you mean '
            "'cosine'?",
        ),
        (
            "trainer: {mode: bitfti}\n",
            6,
            "trainer.mode must be adapter, full, head, none, fusion or the name of a method, not "
            "'bitfti'; did you mean 'bitfit'?",
        ),
        (
            "  splits: {val: dev}\n",
            6,
            "data.splits cannot have the key 'val'; it takes 'train', 'validation' or 'test'",
        ),
        (
            "  fractions:\n    train: 0.5\n",
            6,
            "data.fractions: give the shares of validation and test; train is the rest",
        ),
        (
            "evaluation: 3\n",
            6,
            "evaluation must be a section, keys with values below it, not 3",
        ),
        (
            "adapter:\n  method: loar\n",
            7,
            "adapter.method: no method is called 'loar'; did you mean 'lora'?",
        ),
        (
            "adapter:\n  method: lora\n  rnk: 3\n",
            8,
            "adapter.rnk: LoRAConfig has no option 'rnk'; did you mean 'rank'?",
        ),
        (
            "adapter:\n  method: union\n  configs:\n    - method: bitfit\n"
            "    - method: lora\n      rank: 0\n",
            11,
            "adapter.configs.1.rank must be a whole number of at least 1, not 0",
        ),
        ("output: runs/${nme}\n", 6, "output refers to ${nme}, and there is no such key"),
        ("output: ${output}\n", 6, "output: Recursive interpolation detected"),
        ("output: ???\n", 6, "output is left open (???); set it"),
        ("output: ${name\n", 6, "not an interpolation ${key}"),
        ("name: a\nseed: 1\nname: b\n", 8, "name is written twice, first on line 6; keep one"),
        ("  options: {train: 1, train: 2}\n", 6, "data.options.train is written twice"),
        ("name: a: b\n", 6, "not valid YAML: a second ': ' on the line; put the text in quotes"),
        ("name:\n\t- a\n", 7, "not valid YAML: a tab where indentation must be spaces"),
        ("name: [a\n", 7, "not valid YAML"),
        ("name: !!python/object:os.system x\n", 6, "not valid YAML: could not determine"),
        ("1: x\n", 6, "a config: keys are text, not 1"),
    ],
)
def test_a_mistake_has_its_line_and_one_sentence(
    write, text: str, line: int, sentence: str
) -> None:
    (problem,) = problems(write(BASE + text))
    assert problem.startswith(f"job.yaml:{line}: {sentence}")


def test_all_mistakes_are_told_at_once(write) -> None:
    path = write(BASE + "trainer:\n  epoch: 3\n  mode: bitft\nadapter: {method: lora, rnk: 1}\n")
    told = problems(path, "seed=x")
    assert [problem.partition(": ")[0] for problem in sorted(told)] == [
        "in the override 'seed=x'",
        "job.yaml:7",
        "job.yaml:8",
        "job.yaml:9",
    ]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("trainer.epoch=3", "trainer has no key 'epoch'; did you mean 'epochs'?"),
        ("trainer.batch_size=many", 'trainer.batch_size must be a whole number ≥ 1, not "many"'),
        ("adapter={method: lora, rnk: 1}", "adapter.rnk: LoRAConfig has no option 'rnk'"),
        ("adapter.rank=4", "adapter needs a key 'method'"),
        ("adapter=lora", 'adapter must be a mapping, not "lora"'),
        ("name.x=3", 'name must be text, not {"x": 3}'),
        ("task=segmentatoin", "no task is called 'segmentatoin'; did you mean 'segmentation'?"),
        ("trainer.epochs={", "the value is not valid YAML"),
        ("seed", "write key=value, e.g. trainer.epochs=3"),
        ("=3", "write key=value"),
        ("trainer..epochs=3", "write key=value"),
        ("output=${nme}", "output refers to ${nme}"),
    ],
)
def test_a_mistake_in_an_override_names_the_override(write, override: str, sentence: str) -> None:
    (problem,) = problems(write(BASE), override)
    assert problem.startswith(f"in the override {override!r}: {sentence}")


def test_what_is_missing_is_named_with_what_it_is(write) -> None:
    assert problems(write("task: segmentation\nbackbone: {}\n")) == [
        "job.yaml:2: backbone needs a key 'name' (The encoder's name, as "
        "`mmadapters.load_backbone` takes it: timm/…, hf/…, open_clip/…, torchaudio/…, nano/…)",
        "job.yaml: a config needs a section 'data', with at least source",
    ]
    assert problems(write("name: x\n")) == [
        "job.yaml: there is no key 'task', which says what kind of job this is; there are "
        "segmentation, asr, vqa, retrieval, captioning, classification"
    ]
    assert problems(write("# nothing\n")) == [
        "job.yaml is empty; a config says at least task, backbone, data"
    ]


def test_merged_mappings_keep_the_lines_on_which_their_keys_stand(write, probe: str) -> None:
    shared = "limit: &few {train: 3.5}\n"
    told = problems(write(probe + "  " + shared + "  splits: {<<: *few}\n"))
    assert told == [
        "job.yaml:6: data.splits.train must be a valid string, not 3.5",
        "job.yaml:6: data.limit.train must be a valid integer, got a number with a fractional "
        "part, not 3.5",
    ]


def test_a_union_of_sections_is_checked_by_its_kind(write, probe: str) -> None:
    assert read_config(write(probe), ["head.kind=mask"]).head == MaskHead()  # type: ignore[attr-defined]
    assert problems(write(probe + "head: {kind: msk}\n")) == [
        "job.yaml:6: head.kind must be one of 'linear', 'mask'"
    ]
    assert problems(write(probe + "head:\n  kind: mask\n  layers: 0\n")) == [
        "job.yaml:8: head.layers must be a whole number ≥ 1, not 0"
    ]
    assert problems(write(probe + "  size: [3]\n")) == [
        "job.yaml:6: data.size must be 2 whole numbers, not [3]"
    ]


def test_names_that_are_no_config_say_what_there_is(tmp_path: Path) -> None:
    shipped = next(iter(config_names()))
    assert problems(shipped[:-1])[0].startswith(
        f"no config is called {shipped[:-1]!r}; did you mean {shipped!r}?"
    )
    assert problems("segmentation")[0].startswith(
        "'segmentation' is a task, not a config: give a YAML file that says `task: segmentation`"
    )
    assert problems(f"{tmp_path}/none.yaml") == [f"there is no file '{tmp_path}/none.yaml'"]
    assert "is a folder" in problems(str(tmp_path))[0]
    (tmp_path / "picture.yaml").write_bytes(b"\x89PNG\xff")
    assert "is not a text file in UTF-8" in problems(f"{tmp_path}/picture.yaml")[0]


@pytest.mark.parametrize("name", config_names())
def test_every_shipped_config_is_valid_says_what_it_is_and_survives_a_round_trip(name: str) -> None:
    config = read_config(name)
    assert config_names()[name]
    assert from_data(config.model_dump(mode="json")) == config


def test_resolved_values_are_not_resolved_again(write) -> None:
    config = read_config(write(BASE + r"name: cost\${x}" + "\noutput: here\n"))
    assert config.name == "cost${x}"
    assert from_data(config.model_dump(mode="json")) == config


def test_changes_of_a_saved_job_are_checked_without_lines_that_nobody_sees(write) -> None:
    saved = read_config(write(BASE)).model_dump(mode="json") | {"seeds": 3}
    with pytest.raises(ValueError, match=r"^runs/a: a config has no key 'seeds'; did you mean"):
        from_data(saved, source="runs/a")


@pytest.mark.parametrize("task", THERE)
def test_every_key_of_a_task_has_a_type_a_default_and_a_description(task: str) -> None:
    keys = describe_keys(task)
    assert [key.path for key in keys if not key.description or not key.type] == []
    assert {"backbone.name", "data.source"} <= {key.path for key in keys if key.required}
    assert len({key.path for key in keys}) == len(keys)
    assert next(key for key in keys if key.path == "task").default_text == f'"{task}"'


def test_keys_tell_types_and_bounds_in_words() -> None:
    types = {key.path: key.type for key in describe_keys("segmentation")}
    assert types["trainer.max_steps"] == "whole number ≥ 1 or null"
    assert types["trainer.warmup"] == "number ≥ 0 and < 1"
    assert types["trainer.schedule"] == "cosine, linear or constant"
    assert types["backbone.pretrained"] == "true or false or text"
    assert types["evaluation.groups"] == "list of text"


def test_help_does_not_wait_for_torch() -> None:
    program = (
        "import sys\n"
        "from mmadapters.tasks.config.file import config_names\n"
        "from mmadapters.tasks.config.keys import describe_keys\n"
        f"assert config_names() and all(describe_keys(task) for task in {THERE})\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False\n", "")
