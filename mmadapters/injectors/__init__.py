"""How adapters act on the modules of a running encoder: hooks, computed weights, interception."""
