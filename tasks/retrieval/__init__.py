"""Retrieval of images by texts and of texts by images."""
