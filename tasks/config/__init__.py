"""Run configs: their keys, files, overrides and mistakes."""
