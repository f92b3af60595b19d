"""Keys that have a new name. The old name is still read, with a warning that gives the new one.

Old names are replaced as soon as a config is read, so nothing behind the reader knows them and
everything that is written has the new names.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .errors import ConfigError, RenamedKeyWarning

# The last steps of a key's path and the new name of its last step. The steps before them may be
# anything, since the configs of several jobs hold changes to a job's config.
RENAMED: dict[tuple[str, ...], str] = {("trainer", "cache_prefix"): "cache_trunk"}


# Returns the place of a path for messages: "job.yaml:7".
PlaceOf = Callable[[Sequence[str]], str]


class NewNames:
    """Replaces old names in a config, or in several changes to one, and refuses a key that is given
    by both of its names."""

    def __init__(self) -> None:
        # The name by which each renamed key was given, by the steps of its new path.
        self._given: dict[tuple[str, ...], str] = {}

    def of(self, data: Any, place_of: PlaceOf, path: tuple[str, ...] = ()) -> Any:
        """Returns the plain data that stand at `path`, with new names in all mappings.

        Raises:
            ConfigError: a key is given by its old and by its new name.
        """
        if isinstance(data, list):
            return [
                self.of(value, place_of, (*path, str(number))) for number, value in enumerate(data)
            ]
        if not isinstance(data, Mapping):
            return data
        return {
            self.path((*path, key), place_of)[-1] if isinstance(key, str) else key: self.of(
                value, place_of, (*path, str(key))
            )
            for key, value in data.items()
        }

    def path(self, path: tuple[str, ...], place_of: PlaceOf) -> tuple[str, ...]:
        """Returns the path of a key that is given, with its new name.

        Raises:
            ConfigError: the key was given by its other name before.
        """
        new = new_path(path)
        old_key, new_key = ".".join(path), ".".join(new)
        steps = tuple(new_key.split("."))
        if not any(steps[-len(old) :] == (*old[:-1], name) for old, name in RENAMED.items()):
            return path
        name = path[-1].rpartition(".")[2]
        if self._given.setdefault(steps, name) != name:
            raise ConfigError(
                f"{place_of(path)}: {'.'.join(steps)} is given twice, by this name and by its old "
                f"one: keep {'.'.join(steps)}"
            )
        if new != path:
            warnings.warn(
                f"{place_of(path)}: {old_key} is now called {new_key}: write the new name",
                RenamedKeyWarning,
                stacklevel=2,
            )
        return new


def new_path(path: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the path with the new name of its last key. A step may hold several, with dots."""
    steps = tuple(".".join(path).split("."))
    for old, name in RENAMED.items():
        if steps[-len(old) :] == old:
            return *path[:-1], ".".join((*path[-1].split(".")[:-1], name))
    return path
