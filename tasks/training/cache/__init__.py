"""Cached states of the frozen trunk, from which training passes start."""
