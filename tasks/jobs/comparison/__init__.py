"""`mmadapters compare`: several methods on one job, compared with plain bottlenecks."""
