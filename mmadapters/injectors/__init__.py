"""Injectors let adapters act on the modules of a running encoder: hooks and computed weights."""
