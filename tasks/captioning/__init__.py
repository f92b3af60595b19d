"""Captioning: BLIP writes what an image shows."""
