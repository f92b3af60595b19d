"""Adapters as data: their modules, arithmetic, merging, summary and files."""
