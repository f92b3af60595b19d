"""Makes a plan from a composition: the modules that act at every site."""
