"""The error and the warning of the readers of configs."""

from __future__ import annotations


class ConfigError(ValueError):
    """A config cannot be used. The message holds one sentence a line, each with its place."""


class RenamedKeyWarning(UserWarning):
    """A config uses the old name of a key, which is still read."""
