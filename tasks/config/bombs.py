"""Counts what a config would hold once its aliases and interpolations are written out.

A few hundred bytes can stand for billions of values: `b: [*a, *a, *a]`, `c: [*b, *b, *b]`, and the
same with `${a}${a}`. The counts are computed without writing anything out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from mmadapters.limits import DEPTH, NODES

from .problems import Source

_LONGEST = 1_000_000  # characters of all texts together
_REFERENCE = re.compile(r"\$\{([^${}]*)\}")
_SIXTIES = re.compile(r"[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?")


def too_much(source: Source, node: yaml.Node | None) -> str | None:
    """Returns words about a YAML text that holds too many values, is nested too deeply, or has a
    number that YAML 1.1 reads to the base 60; None if nothing is wrong."""
    sizes: dict[int, int] = {}
    reason: list[str] = []

    def size(node: yaml.Node, around: int) -> int:
        if id(node) in sizes or reason:
            return sizes.get(id(node), 1)
        if (words := DEPTH.passed(around)) is not None:
            reason.append(f"{source.line(node.start_mark)}: the config has {words}")
            return 1
        sizes[id(node)] = 1  # an alias of a value around it is refused elsewhere
        count = 1
        if isinstance(node, yaml.SequenceNode):
            count += sum(size(inner, around + 1) for inner in node.value)
        elif isinstance(node, yaml.MappingNode):
            count += sum(size(inner, around + 1) for pair in node.value for inner in pair)
        elif node.tag.endswith((":int", ":float")) and _SIXTIES.fullmatch(node.value):
            reason.append(
                f"{source.line(node.start_mark)}: YAML reads {node.value} as a number to the base "
                "60, as of minutes and seconds: write the number without a colon, or a text in "
                "quotes"
            )
        if (words := NODES.passed(count)) is not None and not reason:
            reason.append(f"{source.line(node.start_mark)}: the config has {words}")
        sizes[id(node)] = count
        return count

    if node is not None:
        size(node, 0)
    return reason[0] if reason else None


def too_long_when_resolved(tree: Mapping[Any, Any]) -> str | None:
    """Returns words about interpolations that would give too many values or too long texts.

    Args:
        tree: the config as plain data, its interpolations not resolved.
    """
    values: dict[str, Any] = {}
    _by_path(tree, "", values)
    weights: dict[str, int] = {}

    def weight(path: str, open_paths: frozenset[str]) -> int:
        """Returns the characters and values of the value at a path once it is resolved."""
        if path in weights:
            return weights[path]
        if path in open_paths or len(open_paths) > DEPTH.value or path not in values:
            return 1  # OmegaConf refuses it
        total = _weight(values[path], path, open_paths | {path})
        weights[path] = total
        return total

    def _weight(value: Any, path: str, open_paths: frozenset[str]) -> int:
        if isinstance(value, Mapping):
            return 1 + sum(weight(_joined(path, key), open_paths) for key in value)
        if isinstance(value, list):
            return 1 + sum(weight(_joined(path, key), open_paths) for key in range(len(value)))
        if not isinstance(value, str) or "${" not in value:
            return 1 + len(str(value)) // 8
        text = len(value) // 8
        inner = (name.strip().lstrip(".") for name in _REFERENCE.findall(value))
        return 1 + text + sum(weight(_dotted(name), open_paths) for name in inner)

    for path in list(values):
        if (total := weight(path, frozenset())) > _LONGEST:
            return (
                f"{path} would hold {total:,} values and characters once its ${{…}} are resolved, "
                f"more than {_LONGEST:,}: take interpolations out"
            )
    return None


def _by_path(value: Any, path: str, values: dict[str, Any]) -> None:
    if path:
        values[path] = value
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _by_path(inner, _joined(path, key), values)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _by_path(inner, _joined(path, index), values)


def _joined(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _dotted(name: str) -> str:
    return re.sub(r"\[(\w+)\]", r".\1", name)
