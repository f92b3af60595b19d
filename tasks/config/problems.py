"""Checks the values of a config and words each problem as a sentence with the value's place."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from mmadapters.suggest import nearest

from .errors import ConfigError
from .keys import description, field_at, keys_of, sections, sections_at, type_text
from .schema import Section

MODES = ("adapter", "full", "head", "none", "fusion")

Place = tuple[str, ...]
S = TypeVar("S", bound=Section)


@dataclasses.dataclass
class Source:
    """The text of a config, and the place where each of its values was written.

    Attributes:
        name: the file's name as the user gave it.
        text: the YAML.
        lines: whether places have line numbers; False for a text that the user cannot see.
        origins: path of a value -> its place.
    """

    name: str
    text: str
    lines: bool = True
    origins: dict[Place, str] = dataclasses.field(default_factory=dict)

    def at(self, path: Sequence[str]) -> str:
        """Returns the place of a value, or of the innermost written mapping around it."""
        for length in range(len(path), 0, -1):
            if (place := self.origins.get(tuple(path[:length]))) is not None:
                return place
        return self.name

    def line(self, mark: yaml.Mark | None) -> str:
        """Returns the place of a mark of the YAML parser."""
        return f"{self.name}:{mark.line + 1}" if self.lines and mark is not None else self.name

    def written(self, path: Place, place: str) -> None:
        """Records that the value at `path` now comes from `place`, with all values below it."""
        for known in [known for known in self.origins if known[: len(path)] == path]:
            del self.origins[known]
        self.origins[path] = place


def validate(source: Source, cls: type[S], data: dict[str, Any]) -> S:
    """Returns the config of plain data.

    Raises:
        ConfigError: a value is missing, unknown, of the wrong type or out of range; or the method
            does not take the options of the adapter section.
    """
    problems: list[str] = []
    config = None
    try:
        config = cls.model_validate(data)
    except ValidationError as error:
        problems += _pydantic_problems(source, cls, data, error)
    problems += _booleans(source, cls, data)
    problems += _adapter_problems(source, data.get("adapter"))
    problems += _mode_problems(source, data.get("trainer"))
    if problems or config is None:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return config


def _pydantic_problems(
    source: Source, cls: type[Section], data: dict[str, Any], error: ValidationError
) -> Iterator[str]:
    # A value that fits no member of a union has an error for each of them.
    by_path: dict[Place, list[Any]] = {}
    for item in error.errors(include_url=False):
        path = _data_path(data, item["loc"], absent=item["type"] == "missing")
        above = field_at(cls, path[:-1]) if path[:-1] else None
        if item["type"] == "missing" and above is not None and not sections(above.annotation):
            # A place of a list of fixed length, not a key.
            path, item = path[:-1], {**item, "type": "list_type"}
        by_path.setdefault(path, []).append(item)
    for path, items in by_path.items():
        place = source.at(path[:-1] if items[0]["type"] == "missing" else path)
        yield f"{place}: {_sentence(cls, data, path, items[0])}"


def _data_path(data: Any, steps: Sequence[Any], *, absent: bool) -> Place:
    """Returns pydantic's path of a value without its steps that name types: those in the data
    only."""
    path: list[str] = []
    for number, step in enumerate(steps):
        inside = (isinstance(data, Mapping) and step in data) or (
            isinstance(data, list) and isinstance(step, int) and step < len(data)
        )
        if inside:
            data = data[step]
        if inside or (absent and number == len(steps) - 1):
            path.append(str(step))
    return tuple(path)


def _sentence(cls: type[Section], data: dict[str, Any], path: Place, item: Any) -> str:
    kind, context = item["type"], item.get("ctx", {})
    name, value = dotted(path), _value(data, path)
    field = field_at(cls, path) if path else None
    if kind == "missing":
        return _missing(cls, path)
    if kind == "extra_forbidden":
        return _unknown(cls, path)
    if kind == "value_error":
        return f"{name}: {context['error']}" if name else str(context["error"])
    if kind == "union_tag_not_found":
        return f"{name} needs a key {context['discriminator']}"
    if kind == "union_tag_invalid":
        return f"{name}.{context['discriminator'][1:-1]} must be one of {context['expected_tags']}"
    if kind == "invalid_key":
        return f"{dotted(path[:-1]) or 'a config'}: keys are text, not {path[-1]}"
    if item["loc"][-1] == "[key]":
        takes = f"; it takes {context['expected']}" if "expected" in context else ""
        return f"{dotted(path[:-1])} cannot have the key {path[-1]!r}{takes}"
    if field is None:
        problem = item["msg"].replace("Input should be", "must be")
        return f"{name} {problem[0].lower()}{problem[1:]}, not {_show(value)}"
    if sections(field.annotation):
        return f"{name} must be a section, keys with values below it, not {_show(value)}"
    hint = ""
    if kind == "literal_error" and isinstance(value, str):
        hint = nearest(value, context["expected"].split("'")[1::2])
    if kind == "string_type" and isinstance(value, (int, float)):
        hint = "; put it in quotes"
    return f"{name} must be {_article(type_text(field))}, not {_show(value)}{hint}"


def _value(data: Any, path: Place) -> Any:
    for step in path:
        if isinstance(data, Mapping):
            data = next((value for key, value in data.items() if str(key) == step), None)
        elif isinstance(data, list) and step.isdigit() and int(step) < len(data):
            data = data[int(step)]
        else:
            return None
    return data


def _article(words: str) -> str:
    return (
        f"a {words}" if words.startswith(("whole number", "number", "list", "mapping")) else words
    )


def _missing(cls: type[Section], path: Place) -> str:
    field = field_at(cls, path)
    above = f"{dotted(path[:-1])} needs" if path[:-1] else "a config needs"
    inner = sections(field.annotation) if field is not None else []
    if inner:
        needs = [name for name, part in inner[0].model_fields.items() if part.is_required()]
        return f"{above} a section {path[-1]!r}, with at least {', '.join(needs) or 'one key'}"
    words = [description(section, path[-1]) for section in sections_at(cls, path[:-1])]
    about = " ".join(words[0].split()).rstrip(".") if words and words[0] else ""
    return f"{above} a key {path[-1]!r}{f' ({about})' if about else ''}"


def _unknown(cls: type[Section], path: Place) -> str:
    *above, key = path
    where = dotted(above) or "a config"
    if "." in key and field_at(cls, (*above, *key.split("."))) is not None:
        section, _, last = key.rpartition(".")
        return f"{where} has no key {key!r}; write {last!r} below a section {section!r}"
    valid = [name for section in sections_at(cls, above) for name in section.model_fields]
    hint = nearest(key, valid)
    keys = [known.path for known in keys_of(cls)]
    # The key of another section, written in the wrong one.
    elsewhere = [known for known in keys if known.rpartition(".")[2] == key]
    if elsewhere:
        hint = f"; did you mean {elsewhere[0]!r}?"
    return f"{where} has no key {key!r}{hint or '; it has ' + ', '.join(dict.fromkeys(valid))}"


def _booleans(source: Source, cls: type[Section], given: Any, path: Place = ()) -> Iterator[str]:
    """Yields a problem for each true or false in the place of a number; pydantic reads them as 1
    and 0."""
    if isinstance(given, Mapping):
        for key, value in given.items():
            yield from _booleans(source, cls, value, (*path, str(key)))
    elif isinstance(given, bool) and (field := field_at(cls, path)) is not None:
        wanted = type_text(field)
        if "number" in wanted and "true or false" not in wanted:
            problem = f"must be {_article(wanted)}, not {_show(given)}"
            yield f"{source.at(path)}: {dotted(path)} {problem}"


def _adapter_problems(source: Source, adapter: Any) -> Iterator[str]:
    if isinstance(adapter, Mapping):
        yield from _method_problems(source, dict(adapter), ("adapter",))


def _method_problems(source: Source, options: dict[str, Any], path: Place) -> Iterator[str]:
    """Yields the problems of a method's options, each with its key, as the method's own reader
    words them."""
    from mmadapters.methods import METHODS

    if (method := options.get("method")) not in METHODS:
        at, known = source.at((*path, "method")), ", ".join(sorted(METHODS))
        if method is None:
            yield f"{source.at(path)}: {dotted(path)} needs a key 'method', one of {known}"
        else:
            hint = nearest(str(method), METHODS) or f"; there are {known}"
            yield f"{at}: {dotted(path)}.method: no method is called {str(method)!r}{hint}"
        return
    parts = options.get("configs")
    if isinstance(parts, list) and all(isinstance(part, dict) for part in parts):
        inner = [
            _method_problems(source, dict(part), (*path, "configs", str(number)))
            for number, part in enumerate(parts)
        ]
        if problems := [problem for some in inner for problem in some]:
            yield from problems
            return
    while (problem := _method_problem(options)) is not None:
        # The option at fault gives the same problem alone as it does among the others.
        culprits = (
            key
            for key in options
            if key != "method" and _method_problem({"method": method, key: options[key]}) == problem
        )
        key = next(culprits, None)
        if key is None:
            yield f"{source.at(path)}: {dotted(path)}: {problem}"
            return
        named = problem.partition(" ")[0].partition(".")[0] == key
        what = f"{dotted(path)}.{problem}" if named else f"{dotted((*path, key))}: {problem}"
        yield f"{source.at((*path, key))}: {what}"
        del options[key]


def _method_problem(options: Mapping[str, Any]) -> str | None:
    from mmadapters.methods import from_dict

    try:
        from_dict(options)
    except ValueError as error:
        return str(error)
    except TypeError:  # a number where the method iterates over a list
        return "a value has a type that the method does not take"
    return None


def _mode_problems(source: Source, trainer: Any) -> Iterator[str]:
    mode = trainer.get("mode") if isinstance(trainer, Mapping) else None
    if not isinstance(mode, str):
        return
    from mmadapters.methods import METHODS

    choices = [*MODES, *sorted(METHODS)]
    if mode not in choices:
        yield (
            f"{source.at(('trainer', 'mode'))}: trainer.mode must be {', '.join(MODES)} or the "
            f"name of a method, not {mode!r}{nearest(mode, choices)}"
        )


def dotted(path: Sequence[str]) -> str:
    """Returns a path as the user writes it: `trainer.epochs`."""
    return ".".join(path)


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "…"
