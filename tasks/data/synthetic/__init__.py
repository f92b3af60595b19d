"""Synthetic data for tasks and pretraining: drawn scenes (`scenes`) and speech (`speech`)."""
