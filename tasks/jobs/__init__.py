"""Jobs from their config to a run directory."""
