"""One YAML file per runnable job; installed as `mmadapters.configs`."""
