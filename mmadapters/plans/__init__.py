"""From a composition of adapters to a plan of what acts at every site."""
