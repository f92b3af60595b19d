"""Jobs from their config to a run directory; predictions, inspection and the demo."""
