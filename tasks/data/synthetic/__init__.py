"""Synthetic data that tasks and pretraining draw from: scenes (`scenes`) and speech (`speech`)."""
