"""The recipes that made the shipped encoders: `python -m mmadapters.zoo.pretrain <name> …`."""
