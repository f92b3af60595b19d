"""Semantic segmentation with heads on the maps of a frozen vision transformer."""
