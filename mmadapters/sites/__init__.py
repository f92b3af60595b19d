"""The named points of an encoder at which adapters act."""
