"""Streams: what enters and leaves the blocks of a tower beside or instead of its own tokens."""
