"""Training and evaluation of the model of a task."""
