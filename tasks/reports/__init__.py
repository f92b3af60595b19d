"""What a run shows: a page, charts, tables and the console."""
