"""Values that come from environment variables (`${oc.env:TOKEN}`), which no file of a run states.

A saved file holds the interpolation in place of the value. Beside it stands a salted hash of the
value, so that the file reads the variable again only where it has the same value, or names a file:
a file from a stranger cannot ask for other variables of the machine that opens it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .keys import field_at
from .schema import FromEnvironment, Section

# What names the run, its place and its parts is public, and is needed to open it.
PUBLIC = (
    *(("task",), ("name",), ("output",), ("backbone", "name")),
    *(("trainer", "mode"), ("adapter", "method")),
)
_CALL = re.compile(r"oc\.env(?=\s*:)")
_RESOLVER = "mmadapters.env"
_MARK = f"environment{secrets.token_hex(8)}x"
_MARKED = re.compile(_MARK + "([0-9a-f]+)x")
_LONG = 4  # letters from which a value is also masked within other texts


def from_environment(
    tree: DictConfig, data: Mapping[str, Any], cls: type[Section]
) -> dict[tuple[str, ...], FromEnvironment]:
    """Returns the texts of a config that hold values of environment variables, by their path.

    Args:
        tree: the config with its interpolations.
        data: the same as plain data, resolved.
        cls: the class of the config.
    """
    plain = OmegaConf.to_container(tree, resolve=False)
    if not any(_CALL.search(text) for _, text in _texts(plain)):
        return {}
    _register()
    marked = OmegaConf.create(_replaced(plain))
    values = {}
    for path, value in _texts(data):
        text = _at(marked, path)
        if not isinstance(text, str) or not _MARKED.search(text) or path in PUBLIC:
            continue
        if _is_a_choice(cls, path, value):
            continue
        names = [json.loads(bytes.fromhex(code))[0] for code in _MARKED.findall(text)]
        variables = {name: os.environ[name] for name in names if name in os.environ}
        values[path] = FromEnvironment(_unmarked(text), value, variables)
    return values


def _register() -> None:
    if OmegaConf.has_resolver(_RESOLVER):
        return
    omegaconf: Any = OmegaConf
    with warnings.catch_warnings():  # the older name is deprecated in the newest version
        warnings.simplefilter("ignore")
        older = getattr(omegaconf, "register_new_resolver", None)
        (older or omegaconf.register_resolver)(_RESOLVER, _mark)


def _at(tree: Any, path: Sequence[str]) -> Any:
    """Returns the resolved value at a path."""
    for step in path:
        if isinstance(tree, ListConfig):
            tree = tree[int(step)]
        else:  # keys of options may be numbers
            tree = tree[next(key for key in tree if str(key) == step)]
    return tree


def _mark(name: str, *default: Any) -> str:
    """Returns a mark that stands for the value of a variable; YAML reads it as a text."""
    return f"{_MARK}{json.dumps([name, *default]).encode().hex()}x"


def _unmarked(text: str) -> str:
    """Returns a text with interpolations in place of marks."""

    def call(match: re.Match[str]) -> str:
        name, *default = json.loads(bytes.fromhex(match[1]))
        written = "".join("," + (d if isinstance(d, str) else json.dumps(d)) for d in default)
        return f"${{oc.env:{name}{written}}}"

    return _MARKED.sub(call, text.replace("${", "\\${"))


def _replaced(plain: Any) -> Any:
    if isinstance(plain, Mapping):
        return {key: _replaced(value) for key, value in plain.items()}
    if isinstance(plain, list):
        return [_replaced(value) for value in plain]
    return _CALL.sub(_RESOLVER, plain) if isinstance(plain, str) else plain


def _texts(data: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields the texts of plain data with their paths."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield from _texts(value, (*path, str(key)))
    elif isinstance(data, list):
        for number, value in enumerate(data):
            yield from _texts(value, (*path, str(number)))
    elif isinstance(data, str):
        yield path, data


def _is_a_choice(cls: type[Section], path: tuple[str, ...], value: str) -> bool:
    """Whether a value is one of those that its key lists, which is no secret."""
    field = field_at(cls, path)

    def listed(annotation: Any) -> bool:
        if get_origin(annotation) is Literal:
            return value in get_args(annotation)
        return any(listed(part) for part in get_args(annotation))

    return field is not None and listed(field.annotation)


def described(values: Mapping[tuple[str, ...], FromEnvironment]) -> list[dict[str, Any]]:
    """Returns the places of interpolations in a saved config, each with the hash of its value."""
    return [
        {"path": list(path), "check": _check(value.value, secrets.token_hex(8))}
        for path, value in values.items()
    ]


def _check(value: str, salt: str) -> str:
    """Returns a salted hash that takes long to guess."""
    digest = hashlib.scrypt(value.encode(), salt=salt.encode(), n=2**14, r=8, p=1)
    return f"{salt}${digest.hex()[:32]}"


def restored(data: Any, places: Iterable[Any]) -> Any:
    """Returns a saved config with the values of those interpolations that may be read here.

    A variable is read if the value is the saved one, or a path at which something is. Others stay
    as they are written.

    Args:
        data: plain data.
        places: as `described` gave them; what is malformed is passed over.
    """
    for place in places:
        path, check = (
            (place.get("path"), place.get("check")) if isinstance(place, dict) else ("", 0)
        )
        if not isinstance(path, list) or not path or not isinstance(check, str):
            continue
        data = _with(data, path, check)
    return data


def _with(data: Any, path: list[Any], check: str) -> Any:
    if path and isinstance(data, Mapping) and path[0] in data:
        return {**data, path[0]: _with(data[path[0]], path[1:], check)}
    if path and isinstance(data, list) and str(path[0]).isdecimal() and int(path[0]) < len(data):
        place = int(path[0])
        return [*data[:place], _with(data[place], path[1:], check), *data[place + 1 :]]
    if path or not isinstance(data, str) or not _only_environment(data):
        return data
    written = data.replace("\\${", "${")
    try:
        value = OmegaConf.create({"value": data})["value"]
    except OmegaConfBaseException:  # the variable is not set
        return written
    salt = check.partition("$")[0]
    if isinstance(value, str) and (os.path.exists(value) or _check(value, salt) == check):
        return value
    return written


def _only_environment(text: str) -> bool:
    """Whether all interpolations of a text are of environment variables, without others inside."""
    calls = re.findall(r"(?<!\\)\$\{([^{}$]*)\}", text)
    return text.count("${") - text.count("\\${") == len(calls) and all(
        _CALL.match(call) for call in calls
    )


def unread(data: Any) -> str | None:
    """Returns the first text of plain data that names an environment variable, or None."""
    return next((text for _, text in _texts(data) if "${oc.env:" in text), None)


def masked(text: str, values: Mapping[tuple[str, ...], FromEnvironment]) -> str:
    """Returns a text with interpolations in place of the values of environment variables."""
    for value in values.values():
        for name, secret in value.variables.items():
            if len(secret) >= _LONG:
                text = text.replace(secret, f"${{oc.env:{name}}}")
    return text
