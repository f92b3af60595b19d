"""Training from the kept states of the frozen trunk."""
