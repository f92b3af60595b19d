"""Visual question answering on CLIP and BLIP."""
