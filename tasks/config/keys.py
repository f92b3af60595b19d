"""The keys of a run config, as the pydantic classes define them, for `--help` and messages.

Nothing here imports torch.
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from .schema import Section
from .tasks import config_class

_NAMES: dict[Any, str] = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    type(None): "null",
    Any: "anything",
}
_PLURALS: dict[Any, str] = {int: "whole numbers", float: "numbers"}
_BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


@dataclass(frozen=True)
class Key:
    """A key that a config may have.

    Attributes:
        path: its dotted path ("trainer.epochs").
        type: the values that it takes, in words.
        default: as JSON-ready data; None if the key is required.
        required: whether a config must have it.
        description: the text below the attribute of the class.
    """

    path: str
    type: str
    default: Any
    required: bool
    description: str

    @property
    def default_text(self) -> str:
        """The default in YAML, or "required"."""
        return "required" if self.required else json.dumps(self.default, ensure_ascii=False)


def describe_keys(task: str) -> list[Key]:
    """Returns every key of a task's config, with the keys of its sections, in the order of the
    classes.

    Raises:
        ValueError: no task has this name; the message suggests the nearest one.
    """
    return keys_of(config_class(task))


def keys_of(cls: type[Section]) -> list[Key]:
    """Returns every key of a config class, with the keys of its sections, in their order."""
    # Members of a union of sections (one for each kind of head) share some of their keys.
    keys: dict[str, Key] = {}
    for key in _keys(cls, "", None):
        keys.setdefault(key.path, key)
    return list(keys.values())


def _keys(cls: type[Section], prefix: str, instance: Section | None) -> Iterator[Key]:
    for name, field in cls.model_fields.items():
        default = default_of(name, field, instance)
        inner = sections(field.annotation)
        if not inner or container(field.annotation):
            yield Key(
                prefix + name,
                type_text(field),
                None if default is REQUIRED else to_jsonable_python(default),
                default is REQUIRED,
                " ".join(description(cls, name).split()),
            )
        for section in inner:
            given = default if isinstance(default, section) else None
            step = f"{name}[]." if container(field.annotation) else f"{name}."
            yield from _keys(section, prefix + step, given)


class _Required:
    """Marks a key without a default."""


REQUIRED = _Required()


def default_of(name: str, field: FieldInfo, instance: Section | None) -> Any:
    """Returns the value of a key that is not set: its value in `instance`, if that default of its
    section is given, else its own default, or REQUIRED."""
    if instance is not None:
        return getattr(instance, name)
    if field.is_required():
        return REQUIRED
    return field.get_default(call_default_factory=True, validated_data={})  # pydantic 2.10 asks it


def description(cls: type[Section], name: str) -> str:
    """Returns the string below the attribute, from the class or the nearest base that has one."""
    for base in cls.__mro__:
        field = getattr(base, "model_fields", {}).get(name)
        if field is not None and field.description:
            return field.description
    return ""


def with_defaults(
    cls: type[Section], given: Mapping[Any, Any], instance: Section | None = None
) -> dict[Any, Any]:
    """Returns the given keys and the defaults of all others, so that interpolation can refer to
    every key.

    A section with some of its keys given takes the others from the section's default, which is the
    one that `describe_keys` shows. An empty section counts as not given.
    """
    tree: dict[Any, Any] = dict(given)
    for name, field in cls.model_fields.items():
        default = default_of(name, field, instance)
        inner = sections(field.annotation)
        value = tree.get(name)
        if len(inner) == 1 and not container(field.annotation):
            known = default if isinstance(default, inner[0]) else None
            if isinstance(value, Mapping) or (value is None and known is not None):
                tree[name] = with_defaults(inner[0], value or {}, known)
                continue
        if name not in tree and default is not REQUIRED:
            tree[name] = to_jsonable_python(default)
    return tree


def field_at(cls: type[Section], path: Sequence[str]) -> FieldInfo | None:
    """Returns the field at a path, or None if the path leads into a value or to nothing."""
    *above, last = path
    for section in sections_at(cls, above):
        if last in section.model_fields:
            return section.model_fields[last]
    return None


def sections_at(cls: type[Section], path: Sequence[str]) -> list[type[Section]]:
    """Returns the section at a path, several if it is a union of sections, or none."""
    # The sections at the path so far, and the sections that a list or mapping there holds.
    there, listed = [cls], list[type[Section]]()
    for step in path:
        if listed and step.isdigit():
            there, listed = listed, []
            continue
        fields = [section.model_fields[step] for section in there if step in section.model_fields]
        there, listed = (
            [
                inner
                for field in fields
                if container(field.annotation) == inside
                for inner in sections(field.annotation)
            ]
            for inside in (False, True)
        )
    return there


def sections(annotation: Any) -> list[type[Section]]:
    """Returns the section classes in an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for inner in get_args(annotation) for section in sections(inner)]


def container(annotation: Any) -> bool:
    """Whether an annotation is a list or mapping, or a union with one."""
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        return any(container(inner) for inner in get_args(annotation))
    return get_origin(annotation) not in (None, Literal)


def type_text(field: FieldInfo) -> str:
    """Returns the values that a key takes, in words: `whole number ≥ 1 or null`."""
    return _words(field.annotation, _bounds(field.metadata))


def _bounds(metadata: Iterable[Any]) -> str:
    """Returns the limits in objects of annotated-types or in the fields of an Annotated."""
    flat = [part for item in metadata for part in getattr(item, "metadata", [item])]
    limits = [(sign, getattr(part, name, None)) for part in flat for name, sign in _BOUNDS.items()]
    return " and ".join(f"{sign} {limit:g}" for sign, limit in limits if limit is not None)


def _words(annotation: Any, bounds: str = "", *, plural: bool = False) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _words(inner[0], bounds or _bounds(inner[1:]), plural=plural)
    if origin in (Union, types.UnionType, Literal):
        # The values of a literal stand beside the other members of a union.
        parts = [value for part in inner for value in _alternatives(part, bounds)]
        return " or ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
    if origin is tuple and Ellipsis not in inner:
        return f"{len(inner)} {_words(inner[0], plural=True)}"
    if origin in (list, tuple, set):
        return f"list of {_words(inner[0], plural=True)}"
    if origin is dict and inner != (str, Any):
        return f"mapping of {_words(inner[0], plural=True)} to {_words(inner[1], plural=True)}"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    names = _PLURALS if plural and annotation in _PLURALS else _NAMES
    name = names.get(annotation) or getattr(annotation, "__name__", str(annotation))
    return f"{name} {bounds}".rstrip()


def _alternatives(annotation: Any, bounds: str) -> list[str]:
    """Returns the words for one member of a union or literal."""
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    if not isinstance(annotation, type) and not get_origin(annotation):
        return [str(annotation)]
    return [_words(annotation, bounds if annotation in (int, float) else "")]
