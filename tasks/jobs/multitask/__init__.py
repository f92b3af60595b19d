"""`mmadapters multitask`: tasks learned together."""
