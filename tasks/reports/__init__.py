"""The results of runs and how they are shown: pages, charts, tables and the console."""
