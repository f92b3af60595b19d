"""Reads a run config from YAML and `key=value` overrides, and names the place of each mistake.

    YAML -> OmegaConf (overrides, ${interpolation}) -> the pydantic class of the task

The library that reads each stage detects the mistakes. This module adds the file and line, or the
override, that the value came from. A ConfigError lists all mistakes, one sentence a line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import (
    GrammarParseError,
    InterpolationKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from mmadapters.errors import first_line
from mmadapters.suggest import nearest

from .bombs import too_long_when_resolved, too_much
from .environment import from_environment, restored
from .errors import ConfigError
from .keys import sections_at, with_defaults
from .problems import Place, S, Source, dotted, validate
from .renamed import NewNames, new_path
from .schema import JobConfig, Section
from .tasks import TASKS, config_class, one_of

# The key that marks a file of each kind. `mmadapters train` reads jobs; `continual`, `multitask`
# and `compare` read one kind each.
KINDS = {"job": "task", "continual": "jobs", "multitask": "tasks", "comparison": "methods"}
_OF_JOBS = ("overrides", "contrast_overrides")  # keys that hold changes to the config of a job
# For each kind but jobs: its command, and the content of its list.
_COMMANDS = {
    "continual": ("continual", "jobs to be learned in turn"),
    "multitask": ("multitask", "tasks to be learned together"),
    "comparison": ("compare", "methods to be compared"),
}


def read_config(name_or_path: str, overrides: Sequence[str] = ()) -> JobConfig:
    """Reads the config of a YAML file, or of a name that ships with the package.

    Args:
        overrides: `dotted.key=value`, values in YAML. A mapping is merged into a section and
            replaces any other value: `adapter={method: lora, rank: 4}`.

    Raises:
        ConfigError: all mistakes, one sentence a line, with file and line or override.
    """
    return _read(_open(name_or_path), overrides)


def read_as(cls: type[S], name_or_path: str, overrides: Sequence[str] = ()) -> S:
    """Reads a file of another kind, which `cls` describes, like `read_config`.

    Raises:
        ConfigError: as `read_config`.
    """
    source = _open(name_or_path)
    return _finish(source, _parse(source), overrides, cls)


def from_data(
    data: Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    source: str = "the job",
    environment: Iterable[Any] = (),
) -> JobConfig:
    """Returns the config of the data that `JobConfig.to_save` gave, with changes.

    Args:
        overrides: as of `read_config`.
        source: where the data came from, for messages.
        environment: the places of values that come from environment variables, as
            `environment.described` gave them.

    Raises:
        ConfigError: as `read_config`.
    """
    text = yaml.safe_dump(_literal(restored(dict(data), environment)), allow_unicode=True)
    return _read(Source(source, text, lines=False), overrides)


def _literal(data: Any) -> Any:
    """Returns plain data with escaped interpolations: they were resolved when it was written."""
    if isinstance(data, dict):
        return {key: _literal(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_literal(value) for value in data]
    if not isinstance(data, str):
        return data
    return re.sub(r"(\\*)\$\{", lambda match: 2 * match[1] + "\\${", data)


def _read(source: Source, overrides: Sequence[str]) -> JobConfig:
    tree = _parse(source)
    task = _task(source, tree, overrides)
    return _finish(source, tree, overrides, config_class(task))


def _finish(source: Source, tree: DictConfig, overrides: Sequence[str], cls: type[S]) -> S:
    # An override replaces a key of the file by either name: only overrides must not have both.
    names = NewNames()
    for override in overrides:
        _override(source, tree, override, cls, names)
    tree = OmegaConf.create(with_defaults(cls, _plain(tree)))
    data = _resolve(source, tree)
    config = validate(source, cls, data)
    config.remember(from_environment(tree, data, cls))
    return config


def config_names(kind: str = "job") -> dict[str, str]:
    """Returns the shipped configs of a kind: name -> the first comment line."""
    head = re.compile(rf"^{KINDS[kind]}:", re.MULTILINE)
    texts = _shipped()
    return {name: _summary(text) for name, text in texts.items() if head.search(text)}


def _shipped() -> dict[str, str]:
    """Returns the texts of all shipped configs by name."""
    folder = resources.files("mmadapters.configs")
    files = sorted((file for file in folder.iterdir()), key=lambda file: file.name)
    return {
        file.name.removesuffix(".yaml"): file.read_text("utf-8")
        for file in files
        if file.name.endswith(".yaml")
    }


def _summary(text: str) -> str:
    first = text.lstrip().partition("\n")[0]
    return first.lstrip("# ").strip() if first.startswith("#") else ""


def _open(name_or_path: str) -> Source:
    path = Path(name_or_path)
    if path.is_dir():
        raise ConfigError(f"{name_or_path} is a folder; give a YAML file or the name of a config")
    if path.is_file():
        try:
            return Source(name_or_path, path.read_text("utf-8-sig"))
        except UnicodeDecodeError:
            raise ConfigError(f"{name_or_path} is not a text file in UTF-8") from None
        except OSError as error:
            raise ConfigError(f"{name_or_path} cannot be read: {error.strerror}") from None
    names = _shipped()
    name = name_or_path.removesuffix(".yaml")
    if name in names:
        return Source(f"{name}.yaml", names[name])
    if name in TASKS:
        raise ConfigError(
            f"{name!r} is a task, not a config: give a YAML file that says `task: {name}`, or one "
            f"of the configs that ship with the package: {', '.join(names) or 'none'}"
        )
    if path.suffix or len(path.parts) > 1:
        raise ConfigError(f"there is no file {name_or_path!r}{nearest(path.stem, names)}")
    raise ConfigError(f"no config is called {name!r}{nearest(name, names)}; {one_of(names)}")


def _parse(source: Source) -> DictConfig:
    """Returns the tree of the YAML text and fills the source's origins."""
    try:
        node = yaml.compose(source.text, Loader=yaml.SafeLoader)
        if node is None:
            raise ConfigError(
                f"{source.name} is empty; a config says at least task, backbone, data"
            )
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(
                f"{source.line(node.start_mark)}: a config is a mapping of keys to values"
            )
        if (reason := too_much(source, node)) is not None:
            raise ConfigError(reason)
        problems = list(_origins(source, node, (), ()))
        if problems:
            raise ConfigError("\n".join(problems))
        tree = OmegaConf.create(source.text)
    except yaml.MarkedYAMLError as error:
        place = source.line(error.problem_mark or error.context_mark)
        raise ConfigError(f"{place}: not valid YAML: {_yaml_problem(error)}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{source.name}: not valid YAML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{source.name} is nested too deeply") from None
    except OmegaConfBaseException as error:
        path = _steps(error.full_key or "")
        raise ConfigError(f"{source.at(path)}: {_omegaconf_problem(error)}") from None
    assert isinstance(tree, DictConfig)
    return _with_new_names(source, tree)


def _with_new_names(source: Source, tree: DictConfig) -> DictConfig:
    data = _plain(tree)
    renamed = NewNames().of(data, source.at)
    if renamed == data:
        return tree
    source.origins = {new_path(path): place for path, place in source.origins.items()}
    return OmegaConf.create(renamed)


def _origins(
    source: Source, node: yaml.Node, path: Place, around: tuple[yaml.Node, ...]
) -> Iterator[str]:
    """Records the line of every value below a node; yields a sentence for each repeated key."""
    if node in around:  # an alias of a mapping around it, which OmegaConf refuses with its line
        return
    around = (*around, node)
    if isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            source.origins[(*path, str(index))] = source.line(value.start_mark)
            yield from _origins(source, value, (*path, str(index)), around)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    merged = [value for key, value in node.value if key.tag == "tag:yaml.org,2002:merge"]
    for value in merged:
        parts = value.value if isinstance(value, yaml.SequenceNode) else [value]
        for part in reversed(parts):
            yield from _origins(source, part, path, around)
    for key, value in node.value:
        if value in merged or not isinstance(key, yaml.ScalarNode):
            continue
        name = key.value
        if name in lines:
            place, key_path = source.line(key.start_mark), dotted((*path, name))
            yield f"{place}: {key_path} is written twice, first on line {lines[name]}; keep one"
        lines[name] = key.start_mark.line + 1
        source.written((*path, name), source.line(key.start_mark))
        yield from _origins(source, value, (*path, name), around)


def _yaml_problem(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or str(error)
    if "found character" in problem and "\\t" in problem:
        return "a tab where indentation must be spaces"
    if "mapping values are not allowed" in problem:
        return "a second ': ' on the line; put the text in quotes"
    return " ".join(problem.split())


def _omegaconf_problem(error: OmegaConfBaseException) -> str:
    problem = first_line(error)
    if isinstance(error, GrammarParseError):
        return f"not an interpolation ${{key}}: {problem}"
    return problem.removeprefix("KeyError raised while resolving interpolation: ").strip('"')


def _task(source: Source, tree: DictConfig, overrides: Sequence[str]) -> str:
    """Returns the task that the file or an override names."""
    task, place = _plain(tree).get("task"), source.at(("task",))
    for override in overrides:
        key, value = _split(override)
        if key == ("task",):
            task, place = value, _override_place(override)
    if task is None:
        for kind, (command, listed) in _COMMANDS.items():
            if KINDS[kind] in tree:
                raise ConfigError(f"{source.name} lists {listed}: give it to mmadapters {command}")
        raise ConfigError(
            f"{source.name}: there is no key 'task', which says what kind of job this is; "
            f"{one_of(TASKS)}"
        )
    try:
        config_class(str(task))
    except ValueError as error:
        raise ConfigError(f"{place}: {error}") from None
    return str(task)


def _override_place(override: str) -> str:
    return f"in the override {override!r}"


def _split(override: str) -> tuple[Place, Any]:
    """Returns the path and the value of `dotted.key=value`."""
    key, equals, text = override.partition("=")
    path = _steps(key.strip())
    if not equals or not all(path):
        raise ConfigError(f"{_override_place(override)}: write key=value, e.g. trainer.epochs=3")
    try:
        if (
            bomb := too_much(
                Source("the value", text, lines=False), yaml.compose(text, yaml.SafeLoader)
            )
        ) is not None:
            raise ConfigError(f"{_override_place(override)}: {bomb}")
        return path, _plain(OmegaConf.from_dotlist([f"value={text}"]))["value"]
    except yaml.MarkedYAMLError as error:
        problem = f"the value is not valid YAML: {_yaml_problem(error)}"
    except yaml.YAMLError as error:
        problem = f"the value is not valid YAML: {error}"
    except RecursionError:
        problem = "the value is nested too deeply"
    except OmegaConfBaseException as error:
        problem = _omegaconf_problem(error)
    raise ConfigError(f"{_override_place(override)}: {problem}")


def _override(
    source: Source, tree: DictConfig, override: str, cls: type[Section], names: NewNames
) -> None:
    def place(path: Sequence[str]) -> str:
        return _override_place(override)

    for path, value in _leaves(*_split(override), cls):
        new = names.path(path, place)
        _set(source, tree, _of_a_job(new), names.of(value, place, path), place(new))


def _of_a_job(path: Place) -> Place:
    """Returns a path whose steps below `overrides` are joined to one dotted key.

    They name a place in a job's own config, so `overrides.data.options.test=9` must change that
    option alone and not replace the section `data`.
    """
    for length, step in enumerate(path, start=1):
        if step in _OF_JOBS and length < len(path):
            return *path[:length], ".".join(path[length:])
    return path


def _leaves(path: Place, value: Any, cls: type[Section]) -> Iterator[tuple[Place, Any]]:
    """Yields the path of each value that a mapping sets, also in the sections below it."""
    if isinstance(value, Mapping) and sections_at(cls, path):
        for key, inner in value.items():
            yield from _leaves((*path, str(key)), inner, cls)
    else:
        yield path, value


def _set(source: Source, tree: DictConfig, path: Place, value: Any, place: str) -> None:
    known: Any = _plain(tree)
    above = ".".join(path[:-1])
    try:
        if "." in path[-1]:
            if OmegaConf.select(tree, above) is None:
                OmegaConf.update(tree, above, {}, force_add=True)
            with open_dict(tree):
                OmegaConf.select(tree, above)[path[-1]] = value
        else:
            OmegaConf.update(tree, ".".join(path), value, merge=False, force_add=True)
    except (OmegaConfBaseException, TypeError) as error:
        raise ConfigError(f"{place}: {first_line(error)}") from None
    # A value that this override turned into a mapping comes from the override.
    for length, step in enumerate(path[:-1], start=1):
        known = known.get(step) if isinstance(known, Mapping) else known
        if not isinstance(known, (Mapping, list)):
            source.written(path[:length], place)
            break
        if isinstance(known, list):
            break
    source.written(path, place)


def _resolve(source: Source, tree: DictConfig) -> dict[str, Any]:
    """Returns the tree as plain data with all interpolations resolved."""
    plain = _plain(tree)
    if (reason := too_long_when_resolved(plain)) is not None:
        raise ConfigError(f"{source.name}: {reason}")
    problems = list(_unresolved(source, tree, ()))
    if problems:
        raise ConfigError("\n".join(problems))
    data = OmegaConf.to_container(tree, resolve=True)
    assert isinstance(data, dict)
    return data  # type: ignore[return-value]


def _unresolved(source: Source, node: DictConfig | ListConfig, path: Place) -> Iterator[str]:
    keys: Any = list(node) if isinstance(node, DictConfig) else range(len(node))
    for key in keys:
        here = (*path, str(key))
        try:
            value = node[key]
        except MissingMandatoryValue:
            yield f"{source.at(here)}: {dotted(here)} is left open (???); set it"
        except InterpolationKeyError as error:
            name = re.search(r"key '(.*)' not found", str(error))
            written = name[1] if name else "?"
            known = list(_keys(OmegaConf.to_container(node._get_root(), resolve=False)))
            yield (
                f"{source.at(here)}: {dotted(here)} refers to ${{{written}}}, and there is no "
                f"such key{nearest(written, known)}"
            )
        except OmegaConfBaseException as error:
            yield f"{source.at(here)}: {dotted(here)}: {_omegaconf_problem(error)}"
        else:
            # The target of an interpolation is checked at its own place.
            if isinstance(value, (DictConfig, ListConfig)) and value._get_parent() is node:
                yield from _unresolved(source, value, here)


def _keys(data: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield f"{prefix}{key}"
            yield from _keys(value, f"{prefix}{key}.")


def _plain(tree: DictConfig) -> dict[Any, Any]:
    data = OmegaConf.to_container(tree, resolve=False)
    assert isinstance(data, dict)
    return data


def _steps(key: str) -> Place:
    """Returns the steps of `a.b[0].c`."""
    return tuple(re.sub(r"\[(\w+)\]", r".\1", key).split("."))
