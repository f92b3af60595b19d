"""Recipes of the shipped encoders: `python -m mmadapters.tasks.zoo.pretrain <name> …`."""
