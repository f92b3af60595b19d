"""Data sets: finding, reading, checking and batching their rows."""
