"""Contracts and small tools that every room of the application uses."""
