"""Captioning: what an image shows, written by BLIP."""
