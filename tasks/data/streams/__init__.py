"""Streams: rows of tables and folders on this machine that are read in blocks."""
