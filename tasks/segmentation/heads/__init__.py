"""Segmentation heads: from the maps of an encoder's blocks to class logits."""
