"""Training and evaluation of a task on its encoder."""
