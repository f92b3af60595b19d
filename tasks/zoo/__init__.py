"""The recipes that made the shipped encoders, and the check of their figures."""
