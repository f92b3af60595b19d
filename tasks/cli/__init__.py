"""The command line `mmadapters`."""
